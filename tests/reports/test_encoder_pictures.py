"""Pictures of an encoder: what is computed for them, from which frames, and that both encoders are in their places."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import run_here
from packed_stores import pack
from PIL import Image
from tiny_models import random_tensor, shake, tiny_config
from video_files import numbered_frames, read_numbers, write_video

import vicmae_command
from vicmae_hf import ViCMAEForPreTraining, ViCMAEImageProcessor, ViCMAEModel
from vicmae_hf.commands import pictures
from vicmae_hf.data.samples.pairs import load_frame_pairs
from vicmae_hf.data.sources.selection import list_files
from vicmae_hf.processors import build_processors
from vicmae_hf.reports import encoder_pictures
from vicmae_hf.reports.encoder_pictures import (
    PICTURES,
    WholeView,
    class_attention,
    nearest,
    principal_colours,
    read_film,
    read_frames,
    write_encoder_pictures,
)
from vicmae_hf.reports.film import draw_frame, write_film
from vicmae_hf.settings import ArgumentsError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images, then two videos of 40 frames of 30 per second."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(3):
        Image.fromarray(numbered_frames(1, 32, 48, seed=index)[0]).save(folder / f"{index}.png")
    for name in ("x.mp4", "y.mp4"):
        write_video(folder / name, numbered_frames(40, 64, 128, seed=ord(name[0])))
    return folder


def test_attention_is_that_of_the_class_token_in_the_last_layer():
    model = shake(ViCMAEModel(tiny_config())).eval()
    frames = random_tensor(3, 3, 16, 16)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        last = model(frames, output_attentions=True).attentions[-1]  # (3, heads, 17, 17)
    expected = last[:, :, 0, 1:].mean(1)
    model.set_attn_implementation("sdpa")
    found = class_attention(model, frames)
    torch.testing.assert_close(found, 16 * expected / expected.sum(1, keepdim=True))
    torch.testing.assert_close(found.mean(1), torch.ones(3))


def test_neighbours_are_the_nearest_of_other_files():
    features = torch.tensor([[1.0, 0.0], [9.0, 0.1], [1.0, 1.0], [0.0, 2.0], [1.0, 0.2]])
    indices, similarities = nearest(features, ["a", "a", "b", "c", "d"], torch.tensor([0, 3]))
    assert indices.tolist() == [[4, 2, 3], [2, 4, 1]]
    assert similarities[0].tolist() == pytest.approx([1 / 1.04**0.5, 0.5**0.5, 0])
    # Of one file, other frames; nothing else can be.
    assert nearest(features, ["a"] * 5, torch.tensor([0]))[0].tolist() == [[1, 4, 2, 3]]
    assert nearest(features[:1], ["a"], torch.tensor([0]))[0].shape == (1, 0)


def test_colours_are_the_first_three_components():
    """Four directions of falling spread, mixed by a rotation: the last, and the mean, are in no colour."""
    values = random_tensor(5 * 40, 4).double()
    values = values - values.mean(0)
    values = torch.linalg.qr(values)[0] * torch.tensor([100.0, 30.0, 10.0, 1.0])
    rotation = torch.linalg.qr(random_tensor(6, 6, seed=1).double())[0][:4]
    colours = principal_colours((values @ rotation + 7).unflatten(0, (5, 40)).float())
    assert colours.shape == (5, 40, 3)
    for component in range(3):
        column = values[:, component].numpy()
        low, high = np.quantile(column, [0.01, 0.99])
        expected = np.clip((column - low) / (high - low), 0, 1)
        found = colours[..., component].flatten().numpy()
        if np.corrcoef(found, expected)[0, 1] < 0:
            expected = np.clip((high - column) / (high - low), 0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_frames_are_whole_and_no_two_the_same(folder):
    dataset = load_frame_pairs(folder, 32, num_patches=16, color_augmentation=True)
    frames, names = read_frames(dataset, (32, 32))
    assert [names.count(str(folder / name)) for name in ("0.png", "1.png", "2.png")] == [1, 1, 1]
    assert names.count(str(folder / "x.mp4")) > 1
    assert len({frame.numpy().tobytes() for frame in frames}) == len(frames) == len(names)
    # A picture of 32 x 48: the middle.
    middle = torch.from_numpy(numbered_frames(1, 32, 48, seed=1)[0]).permute(2, 0, 1)[:, :, 8:40]
    torch.testing.assert_close(frames[names.index(str(folder / "1.png"))], middle)


def test_a_stream_gives_frames_and_no_film(folder, tmp_path):
    pack(folder, tmp_path / "store")
    stream = load_frame_pairs(tmp_path / "store", 32, streaming=True, num_patches=16)
    frames, names = read_frames(stream, (32, 32))
    assert len(frames) == len(names) == 5
    assert read_film(stream, (32, 32)) is None


@pytest.mark.parametrize(("height", "width"), [(40, 100), (100, 40), (7, 9)])
def test_a_frame_covers_the_view(height, width):
    """A picture that grows brighter from left to right keeps its middle, and has no bars."""
    ramp = torch.linspace(0, 255, width).round().to(torch.uint8).expand(3, height, width)
    view = WholeView((32, 64))([ramp])[0].float()
    assert view.shape == (3, 32, 64)
    assert view.mean() == pytest.approx(127.5, abs=3)
    assert (view.diff(dim=-1) >= 0).all()


def test_a_film_has_six_frames_a_second(folder):
    film = read_film(load_frame_pairs(folder), (64, 128))
    assert read_numbers(film) == [0, 5, 10, 15, 20, 25, 30, 35, 39]  # it ends after 40


def test_a_film_passes_over_damaged_files(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    write_video(tmp_path / "b.mp4", numbered_frames(10, 64, 128))
    dataset = load_frame_pairs(tmp_path)
    assert read_numbers(read_film(dataset, (64, 128))) == [0, 5, 9]
    assert list(dataset.bad_files.errors) == [str(tmp_path / "a.mp4")]


def test_frames_and_colours_of_a_film_are_in_their_places(tmp_path):
    frames = torch.zeros(3, 3, 16, 32, dtype=torch.uint8)
    frames[1] = 255
    trained = torch.zeros(3, 8, 3)
    trained[:, 3, 0] = 1.0  # the last patch of the upper row is red
    untrained = torch.tensor([0.0, 1.0, 0.0]).expand(3, 8, 3)
    path = tmp_path / "film.webp"
    write_film(frames, [trained, untrained], (2, 4), 5, path)
    with Image.open(path) as film:
        assert (film.n_frames, film.size) == (3, (3 * 448 + 12, 224 + 48))
        durations = []
        for index, level in enumerate([0, 255, 0]):
            film.seek(index)
            pixels = np.asarray(film.convert("RGB")).astype(int)
            durations.append(film.info["duration"])
            np.testing.assert_allclose(pixels[24 + 112, 224], level, atol=8)
            np.testing.assert_allclose(pixels[24 + 56, 454 + 392], [255, 0, 0], atol=16)
            np.testing.assert_allclose(pixels[24 + 56, 454 + 280], [0, 0, 0], atol=16)
            np.testing.assert_allclose(pixels[24 + 112, 908 + 224], [0, 255, 0], atol=16)
        assert durations == [200, 200, 200]
    titled = np.asarray(draw_frame([np.zeros((2, 4, 3), np.uint8)] * 3))
    assert (titled[:24] < 100).any() and (titled[-24:] < 100).any()  # there is text above and below


def test_all_pictures_show_the_trained_encoder_first(folder, tmp_path, monkeypatch):
    model = shake(ViCMAEForPreTraining(tiny_config()))
    model.train()
    shown = {}
    monkeypatch.setattr(encoder_pictures, "plot_neighbours", lambda *given: shown.update(neighbours=given))
    monkeypatch.setattr(encoder_pictures, "plot_attention", lambda *given: shown.update(attention=given))
    dataset = load_frame_pairs(folder, 16, num_patches=16)
    write_encoder_pictures(model.vicmae, dataset, ViCMAEImageProcessor(), tmp_path)
    assert model.vicmae.training
    frames, queries, neighbours, _ = shown["neighbours"]
    assert len(queries) == 8
    assert (queries < len(frames)).all()
    pixels = (frames / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.vicmae.eval()(pixels).pooler_output, dim=-1)
    (indices, similarities), (_, untrained) = neighbours
    expected = (features[queries][:, None] * features[indices]).sum(-1)
    torch.testing.assert_close(similarities, expected)
    assert not torch.allclose(untrained, similarities)
    torch.testing.assert_close(shown["attention"][1][0], class_attention(model.vicmae, pixels[queries]))


def test_pictures_are_written_and_old_ones_removed(folder, tmp_path, caplog):
    encoder, processor = ViCMAEModel(tiny_config(), video=True), ViCMAEImageProcessor()
    write_encoder_pictures(encoder, load_frame_pairs(folder, 16, num_patches=16), processor, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES)
    for name in PICTURES:
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10
    with caplog.at_level(logging.INFO, logger="vicmae_hf"):
        only_image = load_frame_pairs(folder / "0.png", 16, num_patches=16)
        write_encoder_pictures(encoder, only_image, processor, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["attention.png"]
    said = [(record.levelname, record.message.split(":")[0]) for record in caplog.records]
    assert said[-2:] == [("INFO", "No picture of neighbours"), ("INFO", "No film of features")]


def test_pictures_do_not_go_among_the_data(folder):
    arguments = pictures.PicturesArguments(model_name_or_path="x", data=str(folder), output_dir=f"{folder}/")
    with pytest.raises(ArgumentsError, match="is a folder of data; choose another"):
        pictures.run(arguments)


def test_pictures_below_the_data_are_no_data(folder, tmp_path, monkeypatch):
    def write(encoder, dataset, processor, place):
        for name in PICTURES:
            Image.new("L", (4, 4)).save(place / name)

    monkeypatch.setattr(pictures, "write_encoder_pictures", write)
    model = ViCMAEForPreTraining(tiny_config())
    model.save_pretrained(tmp_path / "model")
    for processor in build_processors(model.config):
        processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name in ("0.png", "x.mp4"):
        shutil.copy(folder / name, tmp_path / "data")
    flags = ["pictures", tmp_path / "data", "--model_name_or_path", tmp_path / "model", "-o"]
    process = run_here(vicmae_command.__file__, *flags, tmp_path / "data" / "pictures")
    assert process.returncode == 0, process.stderr
    files = [Path(file) for file in list_files(tmp_path / "data")]
    assert [file.name for file in files] == ["0.png", "x.mp4"]
    results = json.loads((tmp_path / "data" / "pictures" / "all_results.json").read_text())
    assert results == {"pictures": [f"{tmp_path}/data/pictures/{name}" for name in PICTURES], "num_failed": 0}
    for name in PICTURES:
        (tmp_path / "data" / "pictures" / name).unlink()
    # So are those of a run over it that was killed after any of them.
    place = tmp_path / "data" / "pictures"
    arguments = {
        "model_name_or_path": str(tmp_path / "model"),
        "data": str(tmp_path / "data"),
        "output_dir": str(place),
    }
    for name in PICTURES:

        def be_killed(encoder, dataset, processor, place, name=name):
            Image.new("L", (4, 4)).save(place / name)
            raise KeyboardInterrupt

        monkeypatch.setattr(pictures, "write_encoder_pictures", be_killed)
        with pytest.raises(KeyboardInterrupt):
            pictures.run(pictures.PicturesArguments(**arguments))
        assert sorted(path.name for path in place.iterdir()) == sorted(["arguments.json", name])
        assert list_files(tmp_path / "data") == list(map(str, files))
        (place / name).unlink()
    process = run_here(vicmae_command.__file__, *flags, tmp_path / "model")
    assert process.stderr.startswith(f"error: --output_dir {tmp_path / 'model'} holds a model; choose another folder")
