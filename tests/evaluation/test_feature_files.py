"""Features of steps of time, and runs that go on where they were interrupted."""

import csv
import json
import shutil
from unittest import mock

import numpy as np
import pyarrow.parquet
import pytest
import torch
from launching import run_together, undone
from PIL import Image
from safetensors import safe_open
from tiny_models import shake, tiny_config
from transformers import AutoImageProcessor, AutoVideoProcessor
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForVideoClassification, ViCMAEModel, extract_features
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.samples.steps import StepDataset
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.feature_files import FeatureParts
from vicmae_hf.files import partial_path
from vicmae_hf.processors import build_processors
from vicmae_hf.training.session import output_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a video model whose layers all differ."""
    folder = tmp_path_factory.mktemp("model")
    model = shake(ViCMAEForVideoClassification(tiny_config(pooling="mean"))).eval()
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A recording of 5.35 s, one of 0.6 s, a picture and a broken file."""
    root = tmp_path_factory.mktemp("media")
    write_video(root / "0.mp4", numbered_frames(107, 40, 56), fps=20)
    write_video(root / "1.mp4", numbered_frames(12, 48, 40, seed=1), fps=20)
    Image.fromarray(numbered_frames(7, 30, 44)[-1]).save(root / "2.png")
    (root / "3.mp4").write_bytes(b"no video")
    return root


STEPS = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0), (4.0, 5.0), (5.0, 5.35), (0.0, 0.6)]
MIDDLES = [10, 30, 50, 70, 90, 103, 6]  # the frames that are shown in the middle of each step, at 20 frames/s


def frames_of(media, indices):
    """The frames with these numbers of the first recording, the last one of the second, as the decoder gives them."""
    with open_video(media / "0.mp4") as first, open_video(media / "1.mp4") as second:
        return [*first.get_frames(indices[:-1]), *second.get_frames(indices[-1:])]


def encode(model, frames):
    encoder = ViCMAEModel.from_pretrained(model).eval()
    processor = AutoImageProcessor.from_pretrained(model)
    with torch.no_grad():
        return encoder(processor(list(frames), return_tensors="pt").pixel_values, output_hidden_states=True)


def extract(model, media, output, **settings):
    options = {"dataloader_num_workers": 0, "per_device_eval_batch_size": 3} | settings
    return extract_features(media, model_name_or_path=model, output=output, **options)


def test_each_second_has_a_row(model, media, tmp_path, monkeypatch):
    monkeypatch.setattr("vicmae_hf.evaluation.features.FRAMES_IN_ONE_GO", 2)  # a recording is several items
    expected = encode(model, frames_of(media, MIDDLES)).pooler_output
    results = extract(model, media, tmp_path / "features.parquet", every_seconds=1)
    table = pyarrow.parquet.read_table(tmp_path / "features.parquet")
    assert table.column_names == ["file", "start", "end", "embedding"]
    files = [str(media / "0.mp4")] * 6 + [str(media / "1.mp4"), str(media / "2.png")]
    assert table["file"].to_pylist() == files == results["files"]
    assert list(zip(*(table[name].to_pylist() for name in ("start", "end")), strict=True)) == [*STEPS, (None, None)]
    embeddings = torch.tensor(np.stack(table["embedding"].to_numpy()))
    torch.testing.assert_close(embeddings[:7], expected, atol=1e-5, rtol=1e-4)
    picture = encode(model, [np.array(Image.open(media / "2.png"))]).pooler_output
    torch.testing.assert_close(embeddings[7:], picture, atol=1e-5, rtol=1e-4)
    record = (tmp_path / "features.parquet.bad_files.jsonl").read_text()
    assert json.loads(record)["path"] == str(media / "3.mp4")

    extract(model, media, tmp_path / "features.csv", every_seconds=1)
    with (tmp_path / "features.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["start"], row["end"]) for row in rows][5:] == [
        (str(media / "0.mp4"), "5", "5.35"),
        (str(media / "1.mp4"), "0", "0.6"),
        (str(media / "2.png"), "", ""),
    ]
    values = [[float(row[f"embedding_{place}"]) for place in range(16)] for row in rows]
    torch.testing.assert_close(torch.tensor(values), embeddings)

    extract(model, media, tmp_path / "features.safetensors", every_seconds=1)
    with safe_open(tmp_path / "features.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("embeddings"), embeddings)
        assert file.get_tensor("ends")[:7].tolist() == [end for _, end in STEPS]
        assert file.get_tensor("starts")[7].isnan()
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".jsonl")) == [
        "features.csv",
        "features.parquet",
        "features.safetensors",
    ]


def test_two_processes_write_the_rows_of_one(model, media, tmp_path):
    extract(model, media, tmp_path / "one.parquet", every_seconds=0.3)
    flags = ["--data", media, "--model_name_or_path", model, "--output", tmp_path / "two.parquet"]
    flags += ["--every_seconds", 0.3, "--dataloader_num_workers", 0, "--per_device_eval_batch_size", 3]
    process = run_together("export_features.py", *flags)
    assert process.returncode == 0, process.stderr
    one, two = (pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("one", "two"))
    for column in ("file", "start", "end"):
        assert one[column].equals(two[column])
    assert len(one) == 18 + 2 + 1
    first, second = (torch.tensor(np.stack(table["embedding"].to_numpy())) for table in (one, two))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)  # batches hold other rows


def test_a_clip_of_a_step_spans_it(model, media, tmp_path):
    results = extract(model, media / "0.mp4", tmp_path / "f.parquet", every_seconds=2, pooling="clip", num_frames=4)
    # The middles of quarters of 2 s, at 20 frames/s.
    starts = [0, 40, 80]
    encoder = ViCMAEModel.from_pretrained(model).eval()
    processor = AutoVideoProcessor.from_pretrained(model)
    with open_video(media / "0.mp4") as video:
        clips = [video.get_frames([start + offset for offset in (5, 15, 25, 35)]) for start in starts[:2]]
        clips.append(video.get_frames([80 + int((part + 0.5) / 4 * 27) for part in range(4)]))
    assert results["ends"].tolist() == [2.0, 4.0, 5.35]
    for row, clip in zip(results["embeddings"], clips, strict=True):
        with torch.no_grad():
            expected = encoder(processor(clip, do_sample_frames=False, return_tensors="pt").pixel_values).pooler_output
        torch.testing.assert_close(row, expected[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_features_of_patches_and_of_any_layer(layer, model, media, tmp_path):
    results = extract(model, media, tmp_path / "f.safetensors", every_seconds=1, pooling="patch", layer=layer)
    outputs = encode(model, frames_of(media, MIDDLES))
    tokens = outputs.last_hidden_state if layer is None else outputs.hidden_states[layer]
    assert results["embeddings"].shape == (8, 4, 4, 16)
    torch.testing.assert_close(results["embeddings"][:7].flatten(1, 2), tokens[:, 1:], atol=1e-5, rtol=1e-4)
    pooled = extract(model, media, tmp_path / "f.parquet", every_seconds=1, layer=layer)["embeddings"]
    expected = outputs.pooler_output if layer is None else tokens[:, 1:].mean(1)
    torch.testing.assert_close(pooled[:7], expected, atol=1e-5, rtol=1e-4)


def test_an_interrupted_run_goes_on(model, media, tmp_path, monkeypatch):
    monkeypatch.setattr("vicmae_hf.evaluation.features.FRAMES_IN_ONE_GO", 1)
    monkeypatch.setattr("vicmae_hf.evaluation.collecting.BATCHES_OF_A_ROUND", 1)
    whole = extract(model, media, tmp_path / "whole.parquet", every_seconds=1)
    output = tmp_path / "features.parquet"
    read, add = [], FeatureParts.add

    def add_and_stop(parts, items, embeddings):
        add(parts, items, embeddings)
        if len(parts.places) >= 5:
            raise KeyboardInterrupt

    getitem = StepDataset.__getitem__
    monkeypatch.setattr(StepDataset, "__getitem__", lambda self, index: read.append(index) or getitem(self, index))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureParts, "add", add_and_stop)
        extract(model, media, output, every_seconds=1)
    assert not output.exists()
    with pytest.raises(InputError, match=r"features\.parquet\.parts: holds .* other settings \(layer\)"):
        extract(model, media, output, every_seconds=1, layer=1)
    read.clear()
    results = extract(model, media, output, every_seconds=1)
    assert len(read) == 9 - 6  # what was not embedded: three steps a batch
    assert torch.equal(results["embeddings"], whole["embeddings"])
    assert results["files"] == whole["files"]
    assert torch.equal(results["starts"][:7], whole["starts"][:7])
    tables = [pyarrow.parquet.read_table(path) for path in (output, tmp_path / "whole.parquet")]
    assert tables[0].equals(tables[1])
    assert not output.with_name("features.parquet.parts").exists()


@pytest.fixture
def interrupted(model, media, tmp_path, monkeypatch):
    """The output of a run that was stopped before it was whole."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vicmae_hf.commands.features.write_features", mock.Mock(side_effect=KeyboardInterrupt))
        extract(model, media, tmp_path / "features.parquet")
    return tmp_path / "features.parquet"


@pytest.mark.parametrize(
    ("name", "key", "value", "refused"),
    [
        ("config.json", "layer_norm_eps", 1e-3, "model.layer_norm_eps"),
        ("preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5], "processor.image_mean"),
        ("preprocessor_config.json", "size", {"shortest_edge": 24}, "processor.size.shortest_edge"),
    ],
)
def test_parts_of_another_config_or_processor_are_refused(
    name, key, value, refused, interrupted, model, media, tmp_path
):
    other = shutil.copytree(model, tmp_path / "other")
    content = json.loads((other / name).read_text())
    assert content[key] != value
    (other / name).write_text(json.dumps(content | {key: value}))
    with pytest.raises(InputError, match=rf"other settings \({refused}\)"):
        extract(other, media, interrupted)
    # The same encoder in another folder is the same.
    shutil.copytree(model, tmp_path / "copy")
    extract(tmp_path / "copy", media, interrupted)
    assert interrupted.exists()


def test_parts_of_another_decoder_or_precision_are_refused(interrupted, model, media, monkeypatch):
    record = interrupted.with_name("features.parquet.parts") / "identity.json"
    identity = json.loads(record.read_text())
    record.write_text(json.dumps(identity | {"video_backend": "decord"}))  # which not every machine has
    with pytest.raises(InputError, match=r"other settings \(video_backend\)"):
        extract(model, media, interrupted)
    record.write_text(json.dumps(identity))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as by `accelerate launch --mixed_precision bf16`
    with undone(), pytest.raises(InputError, match=r"other settings \(mixed_precision\)"):
        extract(model, media, interrupted)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    extract(model, media, interrupted, mixed_precision="no")  # what the run without the setting had
    assert interrupted.exists()


def test_a_part_that_a_kill_left_unfinished_is_passed_over(tmp_path):
    parts = FeatureParts(tmp_path, {"layer": None})
    parts.add([3, 1], [torch.ones(2, 4), torch.zeros(1, 4)])
    whole = (tmp_path / "000000000000.safetensors").read_bytes()
    partial_path(tmp_path / "000000000002.safetensors").write_bytes(whole[: len(whole) // 2])
    reopened = FeatureParts(tmp_path, {"layer": None})
    embeddings, items = reopened.read()
    assert items.tolist() == [1, 3, 3]
    assert torch.equal(embeddings, torch.tensor([[0.0], [1.0], [1.0]]).expand(3, 4))
    reopened.add([0], [torch.full((1, 4), 2.0)])
    assert FeatureParts(tmp_path, {"layer": None}).read()[1].tolist() == [0, 1, 3, 3]


def test_damaged_parts_and_parts_of_a_run_that_lasts_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "f.csv.parts"
    late = FeatureParts(folder, {"layer": 1})  # it starts when there are no parts yet
    parts = FeatureParts(folder, {"layer": None})
    parts.add([0], [torch.ones(1, 4)])
    (held,) = output_folder.held_locks
    monkeypatch.setattr(output_folder, "held_locks", [])  # as in a process of its own
    monkeypatch.setattr(output_folder, "LOCK_SECONDS", 0.1)
    for start in (lambda: FeatureParts(folder, {"layer": None}), lambda: late.add([0], [torch.zeros(1, 4)])):
        with pytest.raises(InputError, match=rf"--output: {folder}: another run is writing there \(process"):
            start()
    held.release()
    with pytest.raises(InputError, match=r"other settings \(layer\)"):
        late.add([0], [torch.zeros(1, 4)])
    whole = (folder / "000000000000.safetensors").read_bytes()
    (folder / "000000000001.safetensors").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"000000000001\.safetensors: is damaged .*Delete the folder"):
        FeatureParts(folder, {"layer": None})
    output_folder.release_output_dir()


def test_parts_that_another_run_began_meanwhile_are_not_mixed_with_own_ones(tmp_path):
    folder = tmp_path / "f.csv.parts"
    late = FeatureParts(folder, {"layer": None})  # all of the items are left to it
    FeatureParts(folder, {"layer": None}).add([0, 1], [torch.ones(1, 4)] * 2)
    output_folder.release_output_dir()  # the other run was stopped
    with pytest.raises(InputError, match=r"another run has begun there meanwhile\. Start again"):
        late.add([0, 1], [torch.zeros(1, 4)] * 2)
    output_folder.release_output_dir()


def test_embeddings_that_are_no_numbers_are_refused(media, tmp_path):
    model = ViCMAEModel(tiny_config())
    model.layernorm.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "diverged")
    for processor in build_processors(model.config):
        processor.save_pretrained(tmp_path / "diverged")
    with pytest.raises(InputError, match=r"embeddings are infinite or NaN\. The encoder's weights are damaged"):
        extract(tmp_path / "diverged", media, tmp_path / "f.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["diverged"]


def test_settings_that_contradict_each_other(model, media, tmp_path):
    with pytest.raises(InputError, match="--layer must be between 0 and 2"):
        extract(model, media, tmp_path / "f.csv", layer=3)
    with pytest.raises(ValueError, match=r"--every_seconds must be at least 0\.001, got 1e-09"):
        extract(model, media, tmp_path / "f.csv", every_seconds=1e-9)
    with pytest.raises(ValueError, match="--every_seconds 1: cannot be combined with --segment_seconds"):
        extract(model, media, tmp_path / "f.csv", every_seconds=1, segment_seconds=2)
    with pytest.raises(InputError, match=r"expected a \.parquet or \.safetensors file for patches"):
        extract(model, media, tmp_path / "f.csv", pooling="patch")
    with pytest.raises(ValueError, match=r"--output .*list\.csv is --data, which it would replace"):
        extract(model, tmp_path / "list.csv", tmp_path / "list.csv")
    with pytest.raises(ValueError, match="--num_frames 3: expected a multiple of 2 for --pooling clip"):
        extract(model, media, tmp_path / "f.csv", pooling="clip", num_frames=3)
