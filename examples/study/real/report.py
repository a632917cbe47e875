"""The report of the study of real pictures and people: tables, pictures."""

import shlex
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from study_report import describe_encoder, describe_updates, put_report
from study_results import POOLINGS, TITLES
from study_runs import device_name
from study_tables import mean_and_spread

from vicmae_hf.files import write_json
from vicmae_hf.reports.model_card import markdown_table
from vicmae_hf.training.reporting import RESULTS_FILE

from .plan import RealArguments
from .plots import plot_curve, plot_fractions, plot_methods
from .videos import STARTS


KINDS = {"standard": "frames in order", "shuffled": "shuffled", "repeated": "one repeated"}


def write_report(real: RealArguments, results: dict[str, Any], path: Path) -> None:
    """Writes `output_dir/all_results.json`, the report, and its pictures as `images/NAME_*.png` beside it."""
    results["command"] = shlex.join(["python", *sys.argv])
    results["device"] = device_name()
    write_json(real.folder / RESULTS_FILE, results)
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    prefix = f"images/{path.stem}_"
    sections = [run_section(real, results), *image_sections(real, results["images"], path.parent, prefix)]
    if results["videos"]:
        sections += video_sections(results["videos"])
    put_report(path, "Real pictures and real people", "\n\n".join(sections) + "\n")


def image_sections(real: RealArguments, images: dict[str, Any], folder: Path, prefix: str) -> list[str]:
    """The sections on images. Their pictures go below `folder`, that of the report, from where they are linked."""

    def place(name: str) -> Path:
        return folder / f"{prefix}{name}.png"

    plot_methods(images, titles_of(images), place("methods"))
    plot_fractions(images, titles_of(images), place("finetuned"))
    sections = [methods_section(images, prefix), differences_section(images), finetuning_section(images, prefix)]
    if images["long"]:
        plot_curve(images, place("curve"))
        sections.append(curve_section(images, prefix))
    source = "vicmae-long" if "vicmae" in images["long"] else "vicmae-seed0"
    shutil.copy(real.folder / "images" / "runs" / source / "plots" / "reconstructions.png", place("reconstructions"))
    sections.append(
        f"## Reconstructions\n\nTraining images, by the model of `runs/{source}`.\n\n"
        f"![Reconstructed CIFAR-10 images]({prefix}reconstructions.png)"
    )
    return sections


def titles_of(images: dict[str, Any]) -> dict[str, str]:
    """Titles of the rows, in their order."""
    titles = {row: TITLES[row] for row in TITLES if row != "raw_pixels"}
    names = {"simclr": "lightly's SimCLR", "lightly_mae": "lightly's MAE"}
    for run in images["runs"]:
        method, _, count = run["row"].partition("-")
        if method in names:
            titles[run["row"]] = f"{names[method]}, {count} updates"
    return titles


def probes_of(images: dict[str, Any], row: str) -> list[dict[str, Any]]:
    """What probes found of a row, once a seed."""
    if row == "untrained":
        return images["references"]["untrained"]
    return [run["probe"] for run in images["runs"] if run["row"] == row]


def run_section(real: RealArguments, results: dict[str, Any]) -> str:
    images, videos = results["images"], results["videos"]
    budget, data = images["budget"], images["data"]
    minutes = {
        "pretraining on images": sum(run["cpu_seconds"] for run in images["runs"]),
        "finetuning on images": sum(run["cpu_seconds"] for run in images["finetuned"]),
    }
    if images["long"]:
        minutes["longer runs"] = sum(run["cpu_seconds"] for run in images["long"].values())
    if videos:
        minutes["videos"] = sum(run["cpu_seconds"] for run in videos["runs"]) + sum(
            run["pretraining"]["cpu_seconds"] for run in videos["runs"] if "pretraining" in run
        )
    spent = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in minutes.items())
    rows = [
        ("command", f"`{results['command']}`"),
        ("ran on", results["device"]),
        ("CPU minutes", f"{spent}; probes not counted"),
        ("each pretraining on images", describe_updates(budget, "images")),
        ("encoder", describe_encoder(budget)),
        ("seeds", f"0 to {real.num_seeds - 1}"),
        (
            "measured on",
            f"{data['num_eval_samples']} test images, by probes and neighbours from {data['num_train_samples']} "
            "training images, both drawn once",
        ),
    ]
    return "## What was run\n\n" + markdown_table(["", ""], rows)


def methods_section(images: dict[str, Any], prefix: str) -> str:
    pixels = images["references"]["raw_pixels"][0]
    rows = [["raw pixels", *[f"{pixels['top1']:.1f}"] * 3, *[f"{pixels['knn_top1']:.1f}"] * 2, ""]]
    for row, title in titles_of(images).items():
        probes = probes_of(images, row)
        if not probes:
            continue
        cells = [mean_and_spread([probe[pooling]["top1"] for probe in probes]) for pooling in POOLINGS]
        cells += [mean_and_spread([probe[pooling]["knn_top1"] for probe in probes]) for pooling in ("cls", "mean")]
        runs = [run for run in images["runs"] if run["row"] == row]
        seconds = mean_and_spread([run["cpu_seconds"] for run in runs], digits=0) if runs else ""
        rows.append([title, *cells, seconds])
    header = ["top-1", *(f"linear, {title}" for title in POOLINGS.values())]
    header += ["neighbours, class token", "neighbours, mean of patch tokens", "CPU seconds"]
    chance = 100 / images["data"]["num_classes"]
    missing = "" if images["has_lightly"] else " lightly was not installed: its rows were not run."
    return f"""## Frozen encoders

Mean and standard deviation over seeds, in percent; chance is {chance:.0f}. CPU seconds are of a pretraining.{missing}

{markdown_table(header, rows)}

![Accuracy of each method and seed]({prefix}methods.png)"""


def differences_section(images: dict[str, Any]) -> str:
    rows = []
    for row, title in titles_of(images).items():
        probes = probes_of(images, row)
        if row == "untrained" or not probes:
            continue
        cells = []
        for pooling in ("cls", "mean"):
            differences = [
                probe[pooling]["top1"] - start[pooling]["top1"]
                for probe, start in zip(probes, probes_of(images, "untrained"), strict=True)
            ]
            ahead = sum(difference > 0 for difference in differences)
            cells += [mean_and_spread(differences, sign="+"), f"{ahead} of {len(differences)}"]
        rows.append([title, *cells])
    header = ["over random weights, points", "class token", "seeds ahead", "mean of patch tokens", "seeds ahead"]
    return f"""## Against random weights

Differences of the linear probe, seed by seed. Our methods start from these very weights, lightly's from others.

{markdown_table(header, rows)}"""


def finetuning_section(images: dict[str, Any], prefix: str) -> str:
    fractions = sorted({run["fraction"] for run in images["finetuned"]})
    counts = {run["fraction"]: run["num_train_files"] for run in images["finetuned"]}
    rows = []
    for row, title in titles_of(images).items():
        found = [
            [run["top1"] for run in images["finetuned"] if (run["row"], run["fraction"]) == (row, fraction)]
            for fraction in fractions
        ]
        if found[0]:
            rows.append([title, *map(mean_and_spread, found)])
    header = ["labels", *(f"{100 * fraction:g} % ({counts[fraction]})" for fraction in fractions)]
    num_seeds = len({run["seed"] for run in images["finetuned"]})
    return f"""## Finetuned on a part of the labels (Table 5's protocol)

The whole encoder is finetuned, with as many updates for every share. Top-1 of the last update, in percent, over
{num_seeds} seeds; in brackets how many images the labels are of. lightly's encoders were not finetuned.

{markdown_table(header, rows)}

![Accuracy by share of labels]({prefix}finetuned.png)"""


def curve_section(images: dict[str, Any], prefix: str) -> str:
    rows = []
    for method, run in images["long"].items():
        minutes = run["cpu_seconds"] / run["points"][-1]["step"] / 60  # of an update
        rows += [
            [
                TITLES[method],
                str(point["step"]),
                f"{point['step'] * minutes:.1f}",
                *(f"{point['probe'][pooling]['top1']:.1f}" for pooling in POOLINGS),
                *(f"{point['probe'][pooling]['knn_top1']:.1f}" for pooling in ("cls", "mean")),
            ]
            for point in run["points"]
        ]
    header = ["", "updates", "CPU minutes", *(f"linear, {title}" for title in POOLINGS.values())]
    header += ["neighbours, class token", "neighbours, mean of patch tokens"]
    return f"""## Longer runs

Seed 0 of each. All points of a method are of one run, whose learning rate falls to 0 at its end: a run of fewer
updates ends otherwise than this one was at that time.

{markdown_table(header, rows)}

![Accuracy over updates]({prefix}curve.png)"""


def video_sections(videos: dict[str, Any]) -> list[str]:
    runs = videos["runs"]
    people = sorted({run["person"] for run in runs})
    summary, by_person = [], []
    for start, title in STARTS.items():
        found = [
            [
                statistics.fmean(run[kind] for run in runs if (run["start"], run["seed"]) == (start, seed))
                for seed in range(videos["num_seeds"])
            ]
            for kind in KINDS
        ]
        summary.append([title, *map(mean_and_spread, found)])
        cells = [
            statistics.fmean(run["standard"] for run in runs if (run["start"], run["person"]) == (start, person))
            for person in people
        ]
        by_person.append([title, *(f"{cell:.0f}" for cell in cells)])
    num_clips = sum(run["num_clips"] for run in runs) // len(STARTS) // videos["num_seeds"]
    spread = f", and standard deviation over {videos['num_seeds']} seeds" if videos["num_seeds"] > 1 else ", one seed"
    return [
        f"""## Actions of a person not seen before

Top-1 in percent, mean over {len(people)} folds with {num_clips} held-out clips in all{spread}. "Shuffled" is the mean
over permutations, "one repeated" over all frames, each shown in place of all others (supplement, section C).

{markdown_table(["video model", *KINDS.values()], summary)}

By the person held out, frames in order:

{markdown_table(["video model", *people], by_person)}"""
    ]
