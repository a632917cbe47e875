"""`run_evaluation.py` as users run it."""

import csv
import json

import pyarrow.parquet
import pytest
from launching import run_here, run_together
from pictures import drawn
from tiny_models import shake, tiny_config
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForVideoClassification
from vicmae_hf.processors import build_processors


NAMES = ["ant", "bee", "cow"]
TIMINGS = {"eval_seconds", "videos_per_second", "clips_per_second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier, and seven videos of its classes, one of them broken."""
    root = tmp_path_factory.mktemp("evaluation")
    settings = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    model = shake(ViCMAEForVideoClassification(tiny_config(**settings)))
    model.save_pretrained(root / "model")
    for processor in build_processors(model.config):
        processor.fps = 5
        processor.save_pretrained(root / "model")
    for index, count in enumerate([20, 12, 33, 8, 40, 16, 25]):
        path = root / "data" / NAMES[index % 3] / f"{index}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, numbered_frames(count, 40, 56, seed=index), fps=15)
    (root / "data" / "bee" / "4.mp4").write_bytes(b"no video")
    return root


def flags(folder, output):
    return ["--model_name_or_path", folder / "model", "--data", folder / "data", "--output_dir", folder / output]


def test_two_processes_find_what_one_finds(folder):
    protocols = ["--num_clips", "5", "7", "--num_crops", "1", "3"]
    protocols += ["--temporal_ablation", "--dataloader_num_workers", "1"]
    with drawn():
        alone = run_here("run_evaluation.py", *flags(folder, "one"), *protocols)
    processes = [
        alone,
        run_together("run_evaluation.py", *flags(folder, "two"), *protocols),
    ]
    for process in processes:
        assert process.returncode == 0, process.stderr
        assert "6 evaluated, 1 unreadable" in process.stdout
    one, two = (json.loads((folder / name / "all_results.json").read_text()) for name in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} <= TIMINGS
    assert (one["num_eval_samples"], one["num_failed"]) == (6, 1)
    assert list(one["protocols"]) == ["1x5", "3x7"]
    assert (
        one["protocols"]["1x5"]["eval_top1"] == one["eval_top1"] == one["temporal_ablation"]["standard"]["eval_top1"]
    )
    assert [len(one["temporal_ablation"][name]["eval_top1_runs"]) for name in ("shuffled", "repeated")] == [16, 4]
    tables = [pyarrow.parquet.read_table(folder / name / "predictions.parquet") for name in ("one", "two")]
    assert tables[0]["file"].to_pylist() == tables[1]["file"].to_pylist()
    assert len(set(tables[0]["file"].to_pylist())) == 6
    for name in ("probabilities_1x5", "probabilities_3x7"):
        for first, second in zip(*(table[name].to_pylist() for table in tables), strict=True):
            assert first == pytest.approx(second, abs=1e-6)
    for name in ("predictions.csv", "per_class.csv", "confusion.csv", "temporal_ablation.csv", "bad_files.jsonl"):
        assert (folder / "one" / name).read_text() == (folder / "two" / name).read_text()
    assert json.loads((folder / "one" / "bad_files.jsonl").read_text())["path"].endswith("bee/4.mp4")
    ablation = list(csv.DictReader((folder / "one" / "temporal_ablation.csv").open()))
    assert [row["frames"] for row in ablation] == ["standard"] + ["shuffled"] * 16 + ["repeated"] * 4
    for name in ("confusion", "temporal_ablation"):
        assert (folder / "one" / "plots" / f"{name}.png").stat().st_size > 1000
    settings = json.loads((folder / "two" / "arguments.json").read_text())
    # Of the model's config and processor.
    assert (settings["num_frames"], settings["frames_per_second"]) == (4, 5)
    assert (settings["task"], settings["num_processes"]) == ("video", 2)


def test_classes_that_the_model_does_not_know_are_refused_in_one_line(folder, tmp_path):
    (tmp_path / "dog").mkdir()
    write_video(tmp_path / "dog" / "0.mp4", numbered_frames(5))
    process = run_here("run_evaluation.py", *flags(folder, "refused"), "--data", tmp_path)
    assert process.returncode == 1
    message = f"error: {tmp_path}: 1 classes are unknown to the model: dog. Expected some of its 3"
    assert process.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in process.stderr
    assert not (folder / "refused").exists()
