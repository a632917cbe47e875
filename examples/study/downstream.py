"""Downstream tasks of a model pretrained on the demo data, several seeds each, side by side.

    python examples/study/downstream.py --pretrained outputs/demo --output_dir outputs/downstream

Finetunes it on the motion classes, evaluates 3x3 views and the temporal ablation; and finetunes it and encoders with
random weights on 5 to 100 % of the labelled images. Runs the example scripts as a user would, `--jobs` at a time, each
in one thread. What is done in the output folder is not done again. Writes table.md, curve.png and ablation.png there.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from matplotlib.figure import Figure
from study_tables import deviation, mean_and_spread
from transformers import set_seed

from vicmae_hf import ViCMAEModel
from vicmae_hf.files import check_writable, write_whole
from vicmae_hf.reports.model_card import markdown_table
from vicmae_hf.reports.plots import save_picture
from vicmae_hf.training.reporting import RESULTS_FILE, read_results
from vicmae_hf.training.session.scripts import run_script


SCRIPTS = Path(__file__).parents[1] / "pytorch"
FRACTIONS = [0.05, 0.1, 0.25, 0.5, 0.75, 1.0]  # Table 5
FRAMES = ["standard", "shuffled", "repeated"]  # section C


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pretrained", type=Path, default="outputs/demo", help="folder of run_pretraining.py")
    parser.add_argument("--output_dir", type=Path, default="outputs/downstream")
    parser.add_argument("--data", type=Path, default="data/demo_large", help="demo data with motion and images")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    return parser.parse_args()


def run(script: str, *flags, output_dir: Path) -> None:
    """Runs an example script unless its results are there; its output goes into a file beside `output_dir`."""
    if (output_dir / RESULTS_FILE).exists():
        return
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output_dir, ignore_errors=True)  # what an interrupted run left
    command = [sys.executable, SCRIPTS / script, *flags, "--output_dir", output_dir]
    log = output_dir.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        outcome = subprocess.run(
            list(map(str, command)),
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    if outcome.returncode:
        raise SystemExit(f"{script} failed; see {log}")


def finetune_on_motion(arguments: argparse.Namespace, seed: int) -> None:
    model, data = arguments.output_dir / f"motion_{seed}", arguments.data / "motion"
    run(
        *["run_classification.py", SCRIPTS / "configs" / "demo_motion.yaml"],
        *["--model_name_or_path", arguments.pretrained, "--seed", seed],
        *["--train_data", data / "train", "--eval_data", data / "eval"],
        output_dir=model,
    )
    run(
        *["run_evaluation.py", "--model_name_or_path", model, "--data", data / "eval", "--seed", seed],
        # The first protocol is the one that frames are shuffled and repeated in.
        *["--num_clips", 1, 3, "--num_crops", 1, 3, "--temporal_ablation"],
        *["--per_device_eval_batch_size", 32, "--dataloader_num_workers", 1],
        output_dir=arguments.output_dir / f"motion_{seed}_evaluation",
    )


def finetune_on_images(arguments: argparse.Namespace, start: str, fraction: float, seed: int) -> None:
    data = arguments.data / "images"
    run(
        *["run_classification.py", SCRIPTS / "configs" / "demo_images.yaml", "--label_fraction", fraction],
        *["--model_name_or_path", arguments.pretrained if start == "pretrained" else untrained(arguments, seed)],
        *["--train_data", data / "train", "--eval_data", data / "eval", "--seed", seed],
        output_dir=images_folder(arguments, start, fraction, seed),
    )


def images_folder(arguments: argparse.Namespace, start: str, fraction: float, seed: int) -> Path:
    return arguments.output_dir / f"images_{start}_{100 * fraction:g}_{seed}"


def untrained(arguments: argparse.Namespace, seed: int) -> Path:
    return arguments.output_dir / f"untrained_{seed}"


def write_tables(evaluations: list[dict], curve: dict[str, list[list[float]]], path: Path) -> None:
    by_seed = {
        f"{protocol} views": [run["protocols"][protocol]["eval_top1"] for run in evaluations]
        for protocol in ["3x3", "1x1"]
    }
    by_seed |= {f"1x1, frames {kind}": ablated(evaluations, kind) for kind in FRAMES[1:]}
    motion = markdown_table(
        ["motion classes, top-1 %", "mean ± std over seeds", "by seed"],
        [
            [name, mean_and_spread(values), ", ".join(f"{value:.1f}" for value in values)]
            for name, values in by_seed.items()
        ],
    )
    images = markdown_table(
        ["labels", *curve],
        [
            [f"{100 * fraction:g} %", *map(mean_and_spread, points)]
            for fraction, *points in zip(FRACTIONS, *curve.values(), strict=True)
        ],
    )
    write_whole(path, f"{motion}\n\n{images}\n")


def ablated(evaluations: list[dict], kind: str) -> list[float]:
    return [run["temporal_ablation"][kind]["eval_top1"] for run in evaluations]


def plot_curve(curve: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for start, points in curve.items():
        means = [statistics.fmean(values) for values in points]
        spreads = [deviation(values) for values in points]
        axes.errorbar([100 * fraction for fraction in FRACTIONS], means, spreads, marker=".", capsize=3, label=start)
    axes.set(xlabel="labelled images, %", ylabel="top-1, %", title="finetuned on a part of the labels")
    axes.legend()
    axes.grid(alpha=0.3)
    save_picture(figure, path)


def plot_ablation(evaluations: list[dict], path: Path) -> None:
    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, kind in enumerate(FRAMES):
        values = ablated(evaluations, kind)
        axes.bar(place, statistics.fmean(values), alpha=0.6, color="tab:blue")
        axes.scatter([place] * len(values), values, color="black", s=12, zorder=2)
    axes.axhline(100 / 6, color="grey", linestyle=":", label="chance")  # of six motions
    axes.set_xticks(range(len(FRAMES)), ["frames in order", "shuffled", "one repeated"])
    axes.set(ylabel="top-1, %", title="motion classes; dots are seeds")
    axes.legend()
    save_picture(figure, path)


def main() -> None:
    arguments = parse_arguments()
    check_writable(arguments.output_dir / "table.md")
    output_dir, seeds = arguments.output_dir, range(arguments.num_seeds)
    config = ViCMAEModel.config_class.from_pretrained(arguments.pretrained)
    for seed in seeds:
        set_seed(seed)
        ViCMAEModel(config).save_pretrained(untrained(arguments, seed))
    starts = ["pretrained", "untrained"]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(finetune_on_motion, arguments, seed) for seed in seeds]
        jobs += [
            pool.submit(finetune_on_images, arguments, start, fraction, seed)
            for start in starts
            for fraction in FRACTIONS
            for seed in seeds
        ]
        try:
            for job in as_completed(jobs):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error no other run begins
    evaluations = [read_results(output_dir / f"motion_{seed}_evaluation") for seed in seeds]
    curve = {
        start: [
            [read_results(images_folder(arguments, start, fraction, seed))["eval_top1"] for seed in seeds]
            for fraction in FRACTIONS
        ]
        for start in starts
    }
    write_tables(evaluations, curve, output_dir / "table.md")
    plot_curve(curve, output_dir / "curve.png")
    plot_ablation(evaluations, output_dir / "ablation.png")
    print(f"{(output_dir / 'table.md').read_text(encoding='utf-8')}\nTables, pictures, runs: {output_dir}")


if __name__ == "__main__":
    run_script(main)
