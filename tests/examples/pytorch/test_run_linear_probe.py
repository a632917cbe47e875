"""`run_linear_probe.py` as users run it."""

import json

import pytest
from demo_data import write_demo_data
from launching import run_here, run_together
from tiny_models import tiny_config

from vicmae_hf import ViCMAEModel
from vicmae_hf.processors import build_processors


def test_a_probe_beside_an_untrained_encoder(tmp_path, monkeypatch):
    data = tmp_path / "demo"
    write_demo_data(data, appearance_videos=(2, 1), motion_videos=(1, 1), images=(1, 1), num_workers=1)
    model = ViCMAEModel(tiny_config(pooling="mean"))
    model.save_pretrained(tmp_path / "model")
    for processor in build_processors(model.config):
        processor.save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", tmp_path / "model", "--train_data", data / "appearance" / "train"]
    flags += ["--eval_data", data / "appearance" / "eval", "--output_dir", tmp_path / "probe"]
    monkeypatch.setattr("vicmae_hf.training.reporting.WORK_SECONDS", 0.0)
    process = run_here("run_linear_probe.py", *flags, "--num_frames", "2", "--num_seeds", "2")
    assert process.returncode == 0, process.stderr
    for line in (
        "INFO: Extracting features of 16 and 8 files, by the encoder and by 2 with random weights.",
        *("extracting features: 16 of 16 files, 00:00 left", "extracting features: 8 of 8 files, 00:00 left"),
        *("INFO: Fitting 4 probes, 90 epochs each.", "fitting probes: 360 of 360 epochs, 00:00 left"),
    ):
        assert line in process.stderr.splitlines()
    results = json.loads((tmp_path / "probe" / "all_results.json").read_text())
    assert (results["num_classes"], results["num_train_samples"], results["num_eval_samples"]) == (8, 16, 8)
    assert results["num_failed"] == 0
    runs = results["runs"]
    assert [len(runs["pretrained"]), len(runs["untrained"])] == [2, 2]
    assert results["eval_top1"] == sum(run["top1"] for run in runs["pretrained"]) / 2
    assert results["untrained_eval_top5"] == sum(run["top5"] for run in runs["untrained"]) / 2
    assert f"pretrained {results['eval_top1']:.1f}" in process.stdout
    assert f"untrained  {results['untrained_eval_top1']:.1f}" in process.stdout


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_say_it_once(tmp_path):
    data = tmp_path / "demo"
    write_demo_data(data, appearance_videos=(2, 1), motion_videos=(1, 1), images=(1, 1), num_workers=1)
    model = ViCMAEModel(tiny_config(pooling="mean"))
    for part in (model, *build_processors(model.config)):
        part.save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", tmp_path / "model", "--train_data", data / "appearance" / "train"]
    flags += ["--eval_data", data / "appearance" / "eval", "--num_frames", 2, "--num_seeds", 1]
    flags += ["--dataloader_num_workers", 0, "--attentive"]
    results = []
    for launch in (run_here, run_together):
        process = launch("run_linear_probe.py", *flags, "--output_dir", tmp_path / launch.__name__)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("Linear probe on 8 held-out files") == 1
        assert process.stderr.count("INFO: Fitting 2 probes, 110 epochs each.") == 1
        results.append(json.loads((tmp_path / launch.__name__ / "all_results.json").read_text()))
    assert results[0] == results[1]
