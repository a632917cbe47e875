"""Frame folders, animations and image stacks in every script that reads videos."""

import json

import numpy as np
import pyarrow.parquet
import pytest
from launching import run_here
from PIL import Image
from transformers import AutoImageProcessor

from vicmae_hf.data.sources.sources import open_source


TINY = (
    "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,patch_size=16,num_frames=4,"
    "decoder_hidden_size=16,decoder_num_hidden_layers=1,decoder_num_attention_heads=2,decoder_intermediate_size=32"
)
TRAINING = ["--config_overrides", TINY, "--image_size", 32, "--per_device_train_batch_size", 2, "--max_train_steps", 1]
TRAINING += ["--dataloader_num_workers", 0]
NUM_FRAMES, RATE = 8, 4
RANGE = ("--image_range", "0,4095")
FLAGS = {
    "folders": ["--frame_folders", "--source_frames_per_second", RATE, "--max_bad_files", 0],
    "gif": [],
    "stacks": ["--source_frames_per_second", RATE, *RANGE],
}


def pictures(seed):
    """12 bits, (8, 32, 40)."""
    return np.random.default_rng(seed).integers(0, 4096, (NUM_FRAMES, 32, 40), dtype=np.uint16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """KIND/SPLIT/CLASS/VIDEO of each kind."""
    root = tmp_path_factory.mktemp("data")
    for seed, place in enumerate(
        f"{split}/{name}/{video}" for split in ("train", "eval") for name in "ab" for video in "12"
    ):
        narrow = [Image.fromarray((picture >> 4).astype(np.uint8)) for picture in pictures(seed)]
        wide = [Image.fromarray(picture) for picture in pictures(seed)]
        for kind in FLAGS:
            (root / kind / place).parent.mkdir(parents=True, exist_ok=True)
        (root / "folders" / place).mkdir()
        for number, image in enumerate(narrow):
            image.save(root / "folders" / place / f"frame_{number + 5}.png")
        narrow[0].save(root / "gif" / f"{place}.gif", save_all=True, append_images=narrow[1:], duration=1000 // RATE)
        wide[0].save(root / "stacks" / f"{place}.tif", save_all=True, append_images=wide[1:])
    return root


def run(script, *flags):
    process = run_here(script, *flags)
    assert process.returncode == 0, process.stderr
    return process


@pytest.mark.parametrize(
    "kind", ["folders", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gif", "stacks"))]
)
def test_every_script(kind, data, tmp_path):
    flags, root = FLAGS[kind], data / kind
    model, classifier = tmp_path / "model", tmp_path / "classifier"
    reading = [flag for flag in flags if flag not in ("--max_bad_files", 0)]

    run(
        "run_pretraining.py",
        "--train_data",
        root / "train",
        "--output_dir",
        model,
        *TRAINING,
        "--warmup_epochs",
        0,
        *flags,
    )
    results = json.loads((model / "all_results.json").read_text())
    assert (results["num_train_files"], results["num_failed"]) == (4, 0)
    image_range = "0,4095" if kind == "stacks" else "type"
    assert AutoImageProcessor.from_pretrained(model).image_range == image_range

    run(
        "pack_frames.py",
        "--input",
        root,
        "--output",
        tmp_path / "store",
        "--frames_per_second",
        2,
        "--format",
        "webp",
        *flags,
    )
    store = open_source(tmp_path / "store")
    assert len(store) == 8
    with store[0].open("pyav") as reader:
        np.testing.assert_allclose(reader.timestamps, [0, 0.5, 1, 1.5])
        assert reader.duration == NUM_FRAMES / RATE

    finetuning = [
        "--task",
        "video",
        "--method",
        "finetune",
        "--train_data",
        root / "train",
        "--eval_data",
        root / "eval",
    ]
    # The size and the range are those of the pretrained model.
    from_model = ["--model_name_or_path", model, "--output_dir", classifier, *TRAINING[4:]]
    run("run_classification.py", *finetuning, *from_model, *(flag for flag in flags if flag not in RANGE))
    assert AutoImageProcessor.from_pretrained(classifier).image_range == image_range
    evaluation = ["--model_name_or_path", classifier, "--data", root / "eval", "--dataloader_num_workers", 0]
    output = run("run_evaluation.py", *evaluation, "--output_dir", tmp_path / "evaluation", "--num_clips", 2, *reading)
    assert "4 evaluated, 0 unreadable" in output.stdout
    # Without the flag the range is that of the model.
    without_range = [flag for flag in reading if flag not in RANGE]
    export = ["--model_name_or_path", model, "--data", root / "eval", "--dataloader_num_workers", 0, "--num_frames", 4]
    run("export_features.py", *export, "--output", tmp_path / "features.parquet", *without_range)
    features = pyarrow.parquet.read_table(tmp_path / "features.parquet")
    assert features.num_rows == 4


def test_frame_folders_without_a_rate_are_refused(data, tmp_path):
    flags = ["--input", data / "folders", "--output", tmp_path / "store", "--frame_folders"]
    process = run_here("pack_frames.py", *flags)
    assert process.returncode == 1
    assert "--frame_folders: give the frame rate" in process.stderr
    # Where it is the only rate that is known, --frames_per_second is also theirs.
    run("pack_frames.py", *flags, "--frames_per_second", 5)
    with open_source(tmp_path / "store")[0].open("pyav") as reader:
        assert (reader.num_frames, reader.duration) == (NUM_FRAMES, NUM_FRAMES / 5)


def test_still_images_are_not_classified_as_videos(data, tmp_path):
    for split in ("train", "eval"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("P", (32, 32)).save(tmp_path / split / name / "still.gif")
    flags = ["--method", "finetune", "--train_data", tmp_path / "train", "--eval_data", tmp_path / "eval"]
    process = run_here("run_classification.py", "--task", "video", *flags, "--output_dir", tmp_path / "out", *TRAINING)
    assert process.returncode == 1
    assert "still.gif is an image" in process.stderr
