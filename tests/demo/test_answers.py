"""What the demo page computes of an upload, compared with the same done by hand; and uploads that it refuses."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from demo_checkpoints import PIXELS_MEAN, PIXELS_STD, save
from PIL import Image
from tiny_models import tiny_config
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf import (
    ViCMAEConfig,
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEForVideoClassification,
    ViCMAEImageProcessor,
    ViCMAEModel,
    ViCMAEVideoProcessor,
)
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.sources.sources import MediaSource
from vicmae_hf.demo import answers
from vicmae_hf.demo.answers import (
    classify,
    colour_features,
    list_mask_ratios,
    read_upload,
    reconstruct,
    with_mask_ratio,
)
from vicmae_hf.demo.checkpoint import open_checkpoint
from vicmae_hf.errors import InputError, MediaDecodingError
from vicmae_hf.reports import reconstructions
from vicmae_hf.reports.encoder_pictures import principal_colours


SECONDS = 60.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Tiny checkpoints by name, opened; 64 patches of 8 x 8 pixels, wide enough to read the numbers of frames."""
    classes = {
        "pretrained": ViCMAEForPreTraining,
        "encoder": ViCMAEModel,
        "images": ViCMAEForImageClassification,
        "videos": ViCMAEForVideoClassification,
    }
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, model_class in classes.items():
        save(folder / name, model_class, image_size=[64, 128], patch_size=16)
    return {name: open_checkpoint(str(folder / name), None, torch.device("cpu")) for name in classes}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    Image.fromarray(numbered_frames(1, 64, 128, seed=3)[0]).save(folder / "image.png")
    write_video(folder / "video.mp4", numbered_frames(240, 64, 128))
    return folder


def read(path, checkpoint, seconds=SECONDS):
    return read_upload(str(path), checkpoint, MediaLoader(), seconds)


def normalized(frames):
    """Frames `(T, 3, H, W)`, uint8, as models take them."""
    return (frames / 255 - torch.tensor(PIXELS_MEAN).view(3, 1, 1)) / torch.tensor(PIXELS_STD).view(3, 1, 1)


def test_checkpoints_are_opened_with_what_they_can_do(checkpoints):
    found = {
        name: (opened.reconstructor is not None, opened.classifier and opened.classifier.task)
        for name, opened in checkpoints.items()
    }
    assert found == {
        "pretrained": (True, None),
        "encoder": (False, None),
        "images": (False, "image"),
        "videos": (False, "video"),
    }
    for opened in checkpoints.values():
        assert not opened.encoder.training
        name = "layers.0.mlp.fc1.weight"
        assert opened.encoder.state_dict()[name].shape == opened.untrained.state_dict()[name].shape
        assert not torch.equal(opened.encoder.state_dict()[name], opened.untrained.state_dict()[name])


def test_a_decoder_without_weights_reconstructs_nothing(tmp_path):
    model = save(tmp_path / "model", ViCMAEForPreTraining)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    assert open_checkpoint(str(tmp_path / "model"), None, torch.device("cpu")).reconstructor is None


def test_what_cannot_be_opened(tmp_path):
    save(tmp_path / "model", ViCMAEModel)
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    with pytest.raises(InputError, match=r"--label_names .*names.txt: .*model is no classifier"):
        open_checkpoint(str(tmp_path / "model"), str(tmp_path / "names.txt"), torch.device("cpu"))
    with pytest.raises(InputError, match="no encoder can be loaded from there"):
        open_checkpoint(str(tmp_path), None, torch.device("cpu"))


def test_an_image_is_one_frame_and_a_video_four_seconds_of_its_middle(checkpoints, files):
    upload = read(files / "image.png", checkpoints["encoder"])
    assert (upload.file.name, upload.note) == ("image.png", "")
    expected = torch.from_numpy(numbered_frames(1, 64, 128, seed=3)[0]).permute(2, 0, 1)
    assert torch.equal(upload.frames, expected[None])
    # 240 frames of 30 a second: from 2 s to 6 s, 6 frames a second.
    upload = read(files / "video.mp4", checkpoints["encoder"])
    assert read_numbers(upload.frames) == list(range(60, 180, 5))
    assert upload.note == "Showing 24 frames from 2.0 to 5.8 s."
    assert read_numbers(upload.middle[None]) == [120]


def test_of_a_long_video_the_beginning_is_read_and_the_page_says_so(checkpoints, files):
    upload = read(files / "video.mp4", checkpoints["videos"], seconds=4)
    assert read_numbers(upload.frames) == list(range(0, 120, 5))
    assert upload.note.startswith("It lasts 8.0 s; only its first 4 s are read. Showing 24 frames from 0.0 to 3.8 s")
    with upload.file[0].open("pyav") as reader:  # what the classifier and the neighbours see
        assert (reader.num_frames, reader.duration) == (120, 4)


@pytest.mark.parametrize("mask_ratio", [0.25, 0.75])
def test_a_reconstruction_is_that_of_a_model_with_this_mask_ratio(mask_ratio, checkpoints, files):
    checkpoint = checkpoints["pretrained"]
    upload = read(files / "image.png", checkpoint)
    columns, text = reconstruct(checkpoint, upload, mask_ratio)
    assert list(columns) == ["first view", "visible", "reconstruction", "random weights"]
    frame = upload.frames[0] / 255
    torch.testing.assert_close(columns["first view"], frame)
    patches = (columns["visible"] == columns["first view"]).all(0).view(4, 16, 8, 16).all(3).all(1)  # (4, 8)
    assert patches.sum() == 32 * (1 - mask_ratio)
    # The same by hand: the model's own output for the same noise, with mean and deviation of visible patches.
    noise = torch.rand(1, 2, 32, generator=torch.Generator().manual_seed(0))
    config = tiny_config(image_size=[64, 128], patch_size=16, mask_ratio=mask_ratio, norm_pix_loss=True)
    model = ViCMAEForPreTraining(config).eval()
    model.load_state_dict(checkpoint.reconstructor.state_dict())
    with torch.no_grad():
        outputs = model(normalized(upload.frames)[None].expand(1, 2, -1, -1, -1), noise=noise)
    hidden = outputs.mask[0, 0].bool()
    assert torch.equal(hidden.view(4, 8), ~patches)
    first = int(hidden.nonzero()[0])
    found = patch(normalized(columns["reconstruction"][None] * 255)[0], first)
    predicted = outputs.logits[0, 0, first]
    # Brightness and contrast come from elsewhere; what is painted is the model's.
    assert np.corrcoef(found.numpy(), predicted.numpy())[0, 1] > 0.999
    assert "dB by random weights" in text and "borrowed from the visible ones" in text
    assert checkpoint.reconstructor.config.mask_ratio == 0.75  # the default of the tiny model


def test_random_weights_are_drawn_once_and_not_at_every_click(checkpoints, files, monkeypatch):
    checkpoint = checkpoints["pretrained"]
    upload = read(files / "image.png", checkpoint)
    views = torch.stack([upload.middle, upload.middle])[None]
    model = with_mask_ratio(checkpoint.reconstructor, 0.5)
    expected, _ = reconstructions.reconstruct_views(model, views, PIXELS_MEAN, PIXELS_STD)
    monkeypatch.delattr(reconstructions, "with_random_weights")
    columns, _ = reconstruct(checkpoint, upload, 0.5)
    torch.testing.assert_close(columns["random weights"], expected["random weights"][0])
    assert checkpoint.untrained is checkpoint.untrained_reconstructor.vicmae  # one copy is enough


def patch(image, index):
    """Patch of an image `(3, 64, 128)`, pixels ordered row, column, channel."""
    row, column = divmod(index, 8)
    return image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].permute(1, 2, 0).flatten()


def test_mask_ratios_leave_something_visible_and_something_hidden(checkpoints, files):
    assert list_mask_ratios(tiny_config(image_size=8, patch_size=4))[0] == 0.15  # of 4 patches one is hidden
    assert list_mask_ratios(tiny_config(image_size=8, patch_size=4))[-1] == 0.85
    ratios = list_mask_ratios(tiny_config(image_size=64, patch_size=4))
    assert ratios == [round(0.05 * step, 2) for step in range(1, 20)]
    assert list_mask_ratios(tiny_config(image_size=4, patch_size=4)) == []
    config = tiny_config(image_size=8, patch_size=4, mask_ratio=0.6)
    list_mask_ratios(config)
    assert config.mask_ratio == 0.6
    upload = read(files / "image.png", checkpoints["pretrained"])
    for ratio in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match=r"Expected a mask ratio between 0\.05 and 0\.95"):
            reconstruct(checkpoints["pretrained"], upload, ratio)


def test_mask_ratios_are_those_that_the_model_takes(monkeypatch):
    """Whatever its rule is: here, that at least a third of the patches are visible."""

    def count_visible(config, num_patches):
        if not 3 * num_patches * (1 - config.mask_ratio) >= num_patches:
            raise ValueError
        return num_patches

    monkeypatch.setattr(ViCMAEConfig, "count_visible", count_visible)
    ratios = list_mask_ratios(tiny_config(image_size=32, patch_size=4))
    assert ratios == [round(0.05 * step, 2) for step in range(1, 14)]


@pytest.mark.parametrize("name", ["pretrained", "videos"])
def test_colours_are_of_the_trained_encoder_first(name, checkpoints, files):
    checkpoint = checkpoints[name]
    upload = read(files / "video.mp4", checkpoint)
    trained, untrained = colour_features(checkpoint, upload)
    for found, encoder in ((trained, checkpoint.encoder), (untrained, checkpoint.untrained)):
        with torch.no_grad():
            tokens = encoder(normalized(upload.frames)).last_hidden_state[:, 1:]
        torch.testing.assert_close(found, principal_colours(tokens).view(24, 4, 8, 3), atol=1e-4, rtol=0)


def test_classes_of_an_image(checkpoints, files):
    checkpoint = checkpoints["images"]
    found = classify(Accelerator(cpu=True), checkpoint, read(files / "image.png", checkpoint), MediaLoader())
    processor = ViCMAEImageProcessor.from_pretrained(checkpoint.name)
    pixels = processor(Image.open(files / "image.png"), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = checkpoint.classifier.model(pixels).logits[0].softmax(-1)
    assert list(found) == ["ant", "bee", "cow"]
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(("file", "indices"), [("video.mp4", [30, 90, 150, 210]), ("image.png", [0, 0, 0, 0])])
def test_classes_by_a_clip(file, indices, checkpoints, files):
    """Of a video the middles of four equal parts; an image is a still clip."""
    checkpoint = checkpoints["videos"]
    upload = read(files / file, checkpoint)
    found = classify(Accelerator(cpu=True), checkpoint, upload, MediaLoader())
    with upload.file[0].open("pyav") as reader:
        frames = reader.get_frames(indices)
    pixels = ViCMAEVideoProcessor.from_pretrained(checkpoint.name)(frames, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = checkpoint.classifier.model(pixels).logits[0].softmax(-1)
    assert list(found.values()) == pytest.approx(expected.tolist(), abs=1e-5)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:8\n#EXTINF:8,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"text", "notes.txt: expected an image or a video"),
        ("notes", b"text", "notes: expected an image or a video"),
        ("notes.mp4", b"text", "cannot decode notes.mp4: pyav: Invalid data"),
        ("notes.jpg", b"text", "notes.jpg: in no image format of JPEG"),
        ("empty.png", b"", "empty.png: in no image format of JPEG"),
        ("program.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "program.png: in no image format of"),
        ("list.mp4", "playlist", "cannot decode list.mp4: pyav: "),
    ],
)
def test_what_cannot_be_read_is_one_line_without_the_place_of_uploads(
    name, content, message, checkpoints, files, tmp_path
):
    folder = tmp_path / ("long" * 50)  # of messages, the end is cut off
    folder.mkdir()
    if content == "playlist":  # of somebody's video on this machine
        content = PLAYLIST.format(files / "video.mp4").encode()
    (folder / name).write_bytes(content)
    with pytest.raises(MediaDecodingError) as caught:
        read(folder / name, checkpoints["encoder"])
    assert str(caught.value).startswith(message)
    assert str(tmp_path) not in str(caught.value) and "\n" not in str(caught.value)


def test_small_files_of_many_pixels_are_refused(checkpoints, files, monkeypatch):
    monkeypatch.setattr(answers, "MAX_PIXELS", 24 * 64 * 128 - 1)
    with pytest.raises(MediaDecodingError, match=r"^video.mp4: needs 24 frames of 128x64 pixels at once"):
        read(files / "video.mp4", checkpoints["encoder"])
    read(files / "image.png", checkpoints["videos"])
    # A still clip of four frames.
    monkeypatch.setattr(answers, "MAX_PIXELS", 4 * 64 * 128 - 1)
    with pytest.raises(MediaDecodingError, match=r"^image.png: needs 4 frames of 128x64 pixels"):
        read(files / "image.png", checkpoints["videos"])


def test_a_file_is_a_source_as_others_are(checkpoints, files):
    upload = read(files / "image.png", checkpoints["encoder"])
    assert len(upload.file) == 1
    used = {"name", "labels", "__len__", "__getitem__", "list_names"}
    assert used <= set(dir(upload.file)) and used - {"name", "labels"} <= set(dir(MediaSource))
