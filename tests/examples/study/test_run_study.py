"""`run_study.py` as users run it: killed, run again, and what it leaves."""

import json
import shlex
import time

import pytest
from launching import Forked, run_here, run_together, script_path
from study_data import write_study_data
from study_plan import TUNED, StudyArguments
from study_runs import run_study

from vicmae_hf.training.reporting import read_metrics


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return write_study_data(tmp_path_factory.mktemp("study")) | {
        "num_seeds": 1,
        "learning_rate_factors": [1.0],
        "vicreg_invariance_weights": [25.0],
        "frame_gaps": ["same"],
        "label_fractions": [0.5, 1.0],
        "num_subsets": 1,
        "num_frames": 2,
    }


def comparable(results: dict) -> dict:
    """What does not depend on when and where a study ran."""
    everything = [run | {"train_seconds": None} for run in results["runs"] + results["sweep"]]
    return {name: results[name] for name in ("references", "tuned", "probe_data", "budget")} | {"runs": everything}


def best_weights(sweep: list[dict], default: float) -> dict[str, float]:
    """The weight of each method with the largest accuracy of the mean of patch tokens, the first of equals."""
    best = dict.fromkeys(("mae_simsiam", "mae_vicreg", "vicmae"), (-1.0, default))
    for result in sweep:
        if result["probe"]["mean"]["top1"] > best[result["method"]][0]:
            best[result["method"]] = (result["probe"]["mean"]["top1"], result["tuned"]["contrastive_weight"])
    return {method: weight for method, (_, weight) in best.items()}


def chosen_weights(results: dict) -> dict[str, float]:
    return {
        method: tuned["contrastive_weight"]
        for method, tuned in results["tuned"].items()
        if "contrastive_weight" in TUNED[method]
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [
        pytest.param([0.1], "mae-seed0", "mae_simsiam-seed0", id="without a sweep"),
        pytest.param(
            [0.1, 0.5],
            "sweep-mae_simsiam-lr0.05-weight0.1",
            "sweep-mae_simsiam-lr0.05-weight0.5",
            id="with a sweep",
        ),
    ],
)
def test_a_killed_study_goes_on_and_ends_as_if_it_had_not_been(settings, tmp_path, weights, first, second):
    folder, report = tmp_path / "study", tmp_path / "docs" / "study.md"
    settings = settings | {"contrastive_weights": weights}
    (tmp_path / "study.json").write_text(json.dumps(settings))
    flags = [tmp_path / "study.json", "--output_dir", folder, "--report", report]
    killed = Forked("run_study.py", *flags)
    # In the middle of the second run.
    while not (folder / "runs" / second / "checkpoint-3").exists():
        assert killed.is_running(), killed.finish().stderr
        time.sleep(0.01)
    killed.kill()
    finished = folder / "runs" / first / "model.safetensors"
    written = finished.stat().st_mtime_ns
    assert not (folder / "all_results.json").exists()

    again = run_here("run_study.py", *flags)
    assert again.returncode == 0, again.stderr
    assert finished.stat().st_mtime_ns == written
    assert f": {first}\n" not in again.stderr
    assert f": {second}\n" in again.stderr
    assert "Resuming from step 3" in again.stderr
    assert f"Report: {report}. Figures: {folder}/all_results.json" in again.stdout

    results = json.loads((folder / "all_results.json").read_text())
    uninterrupted = run_study(StudyArguments(**settings, output_dir=str(tmp_path / "uninterrupted")))
    assert comparable(results) == comparable(uninterrupted)
    assert chosen_weights(results) == best_weights(results["sweep"], default=weights[0])
    for result in results["runs"]:
        assert result["tuned"] == results["tuned"][result["method"]]
    assert shlex.join(["python", script_path("run_study.py"), *map(str, flags)]) in report.read_text()
    assert (report.parent / "images" / "study_methods.png").exists()


@pytest.mark.slow
def test_a_run_s_settings_are_a_file_for_the_pretraining_script(settings, tmp_path):
    run_study(StudyArguments(**settings, contrastive_weights=[0.1], output_dir=str(tmp_path / "study")))
    path = tmp_path / "study" / "settings" / "mae_simsiam-seed0.json"
    process = run_here("run_pretraining.py", path, "--output_dir", tmp_path / "repeated")
    assert process.returncode == 0, process.stderr
    names = ("step", "loss", "feature_rank")
    first, second = (
        [[line[name] for name in names] for line in read_metrics(folder) if "feature_rank" in line]
        for folder in (tmp_path / "study" / "runs" / "mae_simsiam-seed0", tmp_path / "repeated")
    )
    assert first == second


@pytest.mark.slow
def test_two_processes_run_a_study_together(settings, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(settings | {"contrastive_weights": [0.1, 0.5]}))
    process = run_together("run_study.py", tmp_path / "study.json", "--output_dir", tmp_path / "study")
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "study" / "all_results.json").read_text())
    assert results["budget"]["num_processes"] == 2
    assert chosen_weights(results) == best_weights(results["sweep"], default=0.1)
    assert len(results["runs"]) == 5
    # Each was trained once, by both.
    for result in results["runs"]:
        metrics = read_metrics(tmp_path / "study" / "runs" / result["name"])
        assert [line["step"] for line in metrics if "feature_rank" in line] == [2, 4, 6]
