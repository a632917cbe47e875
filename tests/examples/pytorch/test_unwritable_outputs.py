"""Scripts whose output cannot be written: one line, before any work if that can be known; nothing half written."""

import json

import numpy as np
import pytest
from full_disks import largest_file
from launching import run_here
from pictures import drawn
from PIL import Image
from tiny_models import shake, tiny_config
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForImageClassification
from vicmae_hf.processors import build_processors


# Neither data nor models are there: a script that looked for them first would end with another error.
SCRIPTS = {
    "export_features.py": ["--model_name_or_path", "no_model", "--data", "no_data"],
    "pack_frames.py": ["--input", "no_data"],
    "prepare_dataset.py": ["--dataset", "folder", "--root", "no_data"],
    "run_classification.py": [
        "--task",
        "video",
        "--method",
        "finetune",
        "--train_data",
        "no_data",
        "--eval_data",
        "no_data",
    ],
    "run_evaluation.py": ["--model_name_or_path", "no_model", "--data", "no_data"],
    "run_linear_probe.py": ["--model_name_or_path", "no_model", "--train_data", "no_data", "--eval_data", "no_data"],
    "run_pretraining.py": ["--train_data", "no_data"],
}


def output_flags(script, folder):
    if script == "export_features.py":
        return ["--output", folder / "features.parquet"]
    return ["--output" if script in ("pack_frames.py", "prepare_dataset.py") else "--output_dir", folder / "out"]


def the_line(process):
    """The one line that a script says when it ends, below its progress bars."""
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    *before, line = process.stderr.splitlines()
    assert not [other for other in before if "error" in other.lower()]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_output_that_cannot_be_is_told_before_any_work(script, tmp_path):
    (tmp_path / "file").touch()
    for place, reason in [("file", "Not a directory"), ("a" * 300, "File name too long")]:
        line = the_line(run_here(script, *SCRIPTS[script], *output_flags(script, tmp_path / place)))
        assert str(tmp_path / place) in line and reason in line
    with largest_file(0):
        line = the_line(run_here(script, *SCRIPTS[script], *output_flags(script, tmp_path / "full")))
    assert f"{tmp_path}/full/" in line and "cannot be written (File too large)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier, and 60 images of its classes."""
    root = tmp_path_factory.mktemp("full")
    names = ["ant", "bee", "cow"]
    settings = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = shake(ViCMAEForImageClassification(tiny_config(**settings)))
    model.save_pretrained(root / "model")
    for processor in build_processors(model.config):
        processor.save_pretrained(root / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = root / "data" / names[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_a_disk_that_fills_meanwhile_leaves_the_older_features(folder, tmp_path, suffix):
    path = tmp_path / f"features.{suffix}"
    path.write_bytes(b"before")
    flags = ["--model_name_or_path", folder / "model", "--data", folder / "data", "--dataloader_num_workers", 0]
    with largest_file(4096):
        line = the_line(run_here("export_features.py", *flags, "--output", path))
    assert f"{path}: cannot be written (" in line and "File too large" in line
    assert path.read_bytes() == b"before"
    # What was computed is kept for the next run.
    assert {file.name for file in tmp_path.iterdir()} <= {path.name, f"{path.name}.parts"}
    process = run_here("export_features.py", *flags, "--output", path)
    assert process.returncode == 0, process.stderr
    assert path.stat().st_size > 4096
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_meanwhile_leaves_no_table(folder, tmp_path):
    flags = ["--dataset", "folder", "--root", folder / "data", "--check", "none", "--output", tmp_path / "table"]
    with largest_file(4096):
        line = the_line(run_here("prepare_dataset.py", *flags))
    assert f"{tmp_path / 'table'}: cannot be written (File too large)" in line
    assert list(tmp_path.iterdir()) == []
    process = run_here("prepare_dataset.py", *flags)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "table" / "report.json").read_text())["in_table"] == 60


def test_a_disk_that_fills_meanwhile_leaves_no_results(folder, tmp_path):
    flags = ["--model_name_or_path", folder / "model", "--data", folder / "data", "--dataloader_num_workers", 0]
    with largest_file(4096), drawn():
        line = the_line(run_here("run_evaluation.py", *flags, "--output_dir", tmp_path / "out"))
    assert f"{tmp_path / 'out'}/" in line and "cannot be written (File too large)" in line
    # Those that were small enough are whole: not even a part of a picture is left.
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".csv", ".parquet", ".json"}
    assert "all_results.json" not in [path.name for path in files]


def test_a_disk_that_fills_meanwhile_leaves_a_store_that_can_go_on(tmp_path):
    (tmp_path / "data").mkdir()
    for index in range(2):
        write_video(tmp_path / "data" / f"{index}.mp4", numbered_frames(8, 96, 128, seed=index))
    flags = ["--input", tmp_path / "data", "--output", tmp_path / "store", "--frames_per_second", 0]
    with largest_file(4096):
        line = the_line(run_here("pack_frames.py", *flags))
    assert f"{tmp_path / 'store'}/data-" in line and "cannot be written (File too large)" in line
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["store.json"]
    process = run_here("pack_frames.py", *flags)
    assert process.returncode == 0, process.stderr
    assert "2 shards, finished" in process.stdout
