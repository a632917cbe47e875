"""The downstream tasks: what is run, what is not run again, and the tables of it."""

import argparse
import json
import time
from pathlib import Path

import downstream
import pytest
from demo_data import write_demo_data
from launching import run_here
from pictures import drawn
from PIL import Image
from tiny_models import tiny_config

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.training.reporting import read_results


def write_results(folder: Path, results: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "all_results.json").write_text(json.dumps(results))


def test_tables_are_of_the_runs_in_the_output_folder(tmp_path):
    """Of two seeds whose runs are done: nothing is run, and every cell is known beforehand."""
    tiny_config().save_pretrained(tmp_path / "pretrained")
    output_dir = tmp_path / "downstream"
    for seed in (0, 1):
        write_results(output_dir / f"motion_{seed}", {})
        protocols = {"3x3": {"eval_top1": 60 + 4 * seed}, "1x1": {"eval_top1": 50.0}}
        ablation = {"standard": 50.0, "shuffled": 30 - 2 * seed, "repeated": 16.7}
        evaluation = {
            "protocols": protocols,
            "temporal_ablation": {kind: {"eval_top1": top1} for kind, top1 in ablation.items()},
        }
        write_results(output_dir / f"motion_{seed}_evaluation", evaluation)
        for share in (5, 10, 25, 50, 75, 100):
            write_results(output_dir / f"images_pretrained_{share}_{seed}", {"eval_top1": share / 2 + 2 * seed})
            write_results(output_dir / f"images_untrained_{share}_{seed}", {"eval_top1": share / 4})
    with drawn():
        process = run_here(
            *["downstream.py", "--pretrained", tmp_path / "pretrained", "--output_dir", output_dir],
            *["--data", "no such folder", "--num_seeds", 2],
        )
    assert process.returncode == 0, process.stderr
    text = (output_dir / "table.md").read_text()
    assert text in process.stdout
    # Of a and a + 4: mean a + 2, standard deviation 4 / sqrt(2).
    assert "| 3x3 views | 62.0 ± 2.8 | 60.0, 64.0 |\n" in text
    assert "| 1x1 views | 50.0 ± 0.0 | 50.0, 50.0 |\n" in text
    assert "| 1x1, frames shuffled | 29.0 ± 1.4 | 30.0, 28.0 |\n" in text
    assert "| 1x1, frames repeated | 16.7 ± 0.0 | 16.7, 16.7 |\n" in text
    images = text.partition("\n\n")[2].splitlines()
    assert images[0] == "| labels | pretrained | untrained |"
    assert images[2] == "| 5 % | 3.5 ± 1.4 | 1.2 ± 0.0 |"
    assert images[-1] == "| 100 % | 51.0 ± 1.4 | 25.0 ± 0.0 |"
    assert len(images) == 2 + 6
    for name in ("curve", "ablation"):
        with Image.open(output_dir / f"{name}.png") as picture:
            assert min(picture.size) > 200


def test_no_script_begins_after_one_failed(tmp_path, monkeypatch):
    """Else its error would be told only when all the others are done, half an hour later."""
    tiny_config().save_pretrained(tmp_path / "pretrained")
    begun = []

    def fail(script, *flags, output_dir):
        begun.append(output_dir)
        time.sleep(0.05)
        raise SystemExit(f"{script} failed")

    monkeypatch.setattr(downstream, "run", fail)
    flags = ["--pretrained", str(tmp_path / "pretrained"), "--output_dir", str(tmp_path / "downstream")]
    monkeypatch.setattr("sys.argv", ["downstream.py", *flags, "--num_seeds", "3", "--jobs", "1"])
    with pytest.raises(SystemExit, match="failed"):
        downstream.main()
    assert len(begun) < 10  # of 39


@pytest.mark.slow
def test_the_scripts_are_run_once(tmp_path):
    write_demo_data(tmp_path / "data", appearance_videos=(0, 0), motion_videos=(2, 1), images=(4, 1), num_workers=1)
    config = tiny_config(image_size=32)
    ViCMAEForPreTraining(config).save_pretrained(tmp_path / "pretrained")
    arguments = argparse.Namespace(
        pretrained=tmp_path / "pretrained", output_dir=tmp_path / "downstream", data=tmp_path / "data"
    )
    downstream.finetune_on_motion(arguments, seed=0)
    downstream.finetune_on_images(arguments, "pretrained", 0.25, seed=0)
    evaluation = read_results(arguments.output_dir / "motion_0_evaluation")
    assert evaluation["protocols"].keys() == {"1x1", "3x3"}
    assert evaluation["temporal_ablation"].keys() == set(downstream.FRAMES)
    assert evaluation["num_eval_samples"] == 6
    assert read_results(arguments.output_dir / "images_pretrained_25_0")["num_eval_samples"] == 8
    results = sorted(arguments.output_dir.glob("*/all_results.json"))
    assert len(results) == 3
    written = [path.stat().st_mtime_ns for path in results]
    downstream.finetune_on_motion(arguments, seed=0)
    downstream.finetune_on_images(arguments, "pretrained", 0.25, seed=0)
    assert [path.stat().st_mtime_ns for path in results] == written


@pytest.mark.slow
def test_a_script_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(SystemExit, match=r"run_evaluation\.py failed; see .*/nothing\.log"):
        downstream.run("run_evaluation.py", "--data", "nowhere", output_dir=tmp_path / "nothing")
    assert "missing: --model_name_or_path" in (tmp_path / "nothing.log").read_text()
