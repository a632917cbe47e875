"""The report of the study: tables with the paper's figures beside those found, and pictures."""

import math
import os
from pathlib import Path
from typing import Any

from study_plan import METHODS
from study_plots import plot_collapse, plot_fractions, plot_gaps, plot_methods
from study_probes import PIXEL_GRID
from study_results import (
    GAPS,
    PAPER_FRACTIONS,
    PAPER_GAPS,
    PAPER_METHODS,
    POOLINGS,
    TITLES,
    TUNED_TITLES,
    accuracies,
    by_variant,
    gap_accuracies,
)
from study_tables import mean_and_spread

from vicmae_hf.errors import InputError
from vicmae_hf.files import check_writable, write_whole
from vicmae_hf.reports.model_card import markdown_table


# What is between these lines is written anew each time; what is around them stays.
BEGIN = "<!-- Written by examples/study from here on. -->"
END = "<!-- Written by examples/study up to here. -->"


def check_report(path: str | os.PathLike) -> None:
    """
    Raises an InputError if `path` cannot be written, or exists and a report cannot be put into it without losing what
    is there.
    """
    path = Path(path)
    if path.exists():
        split_report(path)
    check_writable(path)


def split_report(path: Path) -> tuple[str, str]:
    """What stands before and after the part of a report that is written anew."""
    text = path.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_begin or not found_end:
        raise InputError(
            f"{path} exists and has no place for the study's report: expected the lines {BEGIN!r} and {END!r}, "
            "between which it is written. Add them, or choose another --report."
        )
    return before, after


def put_report(path: Path, title: str, text: str) -> None:
    """
    Writes a report. If the file exists, only the part between the lines `BEGIN` and `END` is replaced.

    Raises:
        InputError: if the file exists without these lines.
    """
    before, after = split_report(path) if path.exists() else (f"# {title}\n\n", "\n")
    write_whole(path, f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def write_report(results: dict[str, Any], path: str | os.PathLike) -> None:
    """
    Writes the results of `run_study` as Markdown (see `put_report`), and its pictures as `images/NAME_*.png` beside
    it.
    """
    path = Path(path)
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    pictures = {
        "methods": plot_methods,
        "label_fractions": plot_fractions,
        "frame_gap": plot_gaps,
        "collapse": plot_collapse,
    }
    for name, plot in pictures.items():
        plot(results, images / f"{path.stem}_{name}.png")
    put_report(path, "Study of the paper's baselines", report_text(results, image_prefix=f"images/{path.stem}_"))


def report_text(results: dict[str, Any], image_prefix: str) -> str:
    """The report's sections, in Markdown."""
    sections = [
        budget_section(results),
        methods_section(results, image_prefix),
        orderings_section(results),
        fractions_section(results, image_prefix),
        gaps_section(results, image_prefix),
        mask_ratio_section(results),
        collapse_section(results, image_prefix),
        sweep_section(results),
        runs_section(results),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def describe_updates(budget: dict[str, Any], files: str) -> str:
    """What each pretraining of a study sees; `files` is what its files are called."""
    return (
        f"{budget['num_steps']} updates of {budget['total_batch_size']} pairs, {budget['epochs']:.1f} epochs of "
        f"{budget['num_train_files']} {files}"
    )


def describe_encoder(budget: dict[str, Any]) -> str:
    return (
        f"{budget['num_hidden_layers']} layers, {budget['hidden_size']} wide; images of {budget['image_size']} "
        f"pixels in patches of {budget['patch_size']}; mask ratio {budget['mask_ratio']}"
    )


def budget_section(results: dict[str, Any]) -> str:
    settings, budget, data = results["settings"], results["budget"], results["probe_data"]
    everything = results["sweep"] + results["runs"]
    minutes = sum(run.get("train_seconds", 0) for run in everything) / 60
    rows = [
        ("command", f"`{results['command']}`"),
        ("ran on", results["device"]),
        ("pretraining", f"{len(everything)} runs, {minutes:.0f} minutes of training in all"),
        (
            "each run",
            f"{describe_updates(budget, 'files')}; {budget['num_processes']} process"
            + ("es" if budget["num_processes"] > 1 else ""),
        ),
        ("encoder", describe_encoder(budget)),
        (
            "optimisation",
            f"AdamW, warmup of {budget['warmup_epochs']:g} epochs, cosine decay, "
            f"weight decay {budget['weight_decay']:g}; contrastive part from epoch "
            f"{budget['contrastive_start_epoch']:g} on, InfoNCE's temperature {budget['temperature']:g}",
        ),
        ("seeds", f"0 to {settings['num_seeds'] - 1}; tuned with seed {settings['sweep_seed']}"),
        (
            "probe",
            f"linear, on the frozen encoder (Table 3, without its random crops): {data['num_train_samples']} labelled "
            f"and {data['num_eval_samples']} held-out files, {settings['num_frames']} frames of each, "
            f"{data['num_classes']} classes, chance {100 / data['num_classes']:.1f} %",
        ),
    ]
    return "## What was run\n\n" + markdown_table(["", ""], rows)


def methods_section(results: dict[str, Any], image_prefix: str) -> str:
    pooling = results["pooling"]
    header = ["top-1", *POOLINGS.values(), f"top-5, {POOLINGS[pooling]}", "paper, ImageNet-1K: top-1", "top-5"]
    rows = []
    for row, title in TITLES.items():
        cells = [mean_and_spread(accuracies(results, row, pooling)) for pooling in POOLINGS]
        paper = [f"{value:.2f}" for value in PAPER_METHODS[row]] if row in PAPER_METHODS else ["", ""]
        rows.append([title, *cells, mean_and_spread(accuracies(results, row, pooling, "top5")), *paper])
    return f"""## Methods (Table 4)

Mean and standard deviation over {results["settings"]["num_seeds"]} seeds of pretraining, in percent. The supplement
reads the class token, and says that averaging gives about the same; both are given, and the standard deviation over
the patch tokens, which also holds what they say with both signs and lose in the mean. Raw pixels are frames averaged
to {PIXEL_GRID} x {PIXEL_GRID} of them. The reconstruction loss is of the first view, as in Algorithm 1.

{markdown_table(header, rows)}

![Accuracy of each method and seed]({image_prefix}methods.png)"""


def orderings_section(results: dict[str, Any]) -> str:
    pooling = results["pooling"]
    methods = {row: accuracies(results, row, pooling) for row in METHODS}
    titles = TITLES | {gap: f"ViC-MAE, {title}" for gap, title in GAPS.items()}
    gaps = gap_accuracies(results, pooling)
    paper = {row: figures[0] for row, figures in PAPER_METHODS.items()} | PAPER_GAPS
    pairs = [("vicmae", "mae_vicreg"), ("mae_vicreg", "mae_simsiam"), ("vicmae", "mae")]
    pairs += [("mae", "mae_vicreg"), ("mae", "mae_simsiam")]
    pairs += [
        pair for pair in [("distant", "4_frames"), ("4_frames", "same"), ("distant", "same")] if set(pair) <= set(gaps)
    ]
    rows = []
    for better, worse in pairs:
        figures = methods | gaps
        differences = [a - b for a, b in zip(figures[better], figures[worse], strict=True)]
        in_paper = f"{paper[better] - paper[worse]:+.2f}" if {better, worse} <= paper.keys() else ""
        ahead = sum(difference > 0 for difference in differences)
        rows.append(
            [
                f"{titles[better]} over {titles[worse]}",
                in_paper,
                mean_and_spread(differences, sign="+"),
                f"{ahead} of {len(differences)}",
            ]
        )
    header = ["the paper's ordering", "paper, points", "here, points", "seeds in which it holds"]
    return f"""## Orderings

Differences in top-1, seed by seed, of the {POOLINGS[pooling]}. Equal seeds share the encoder's first weights, order
of data and masks. MAE alone has no figure in Table 4; section B says that adding SimSiam or VICReg does worse than it.

{markdown_table(header, rows)}"""


def fractions_section(results: dict[str, Any], image_prefix: str) -> str:
    settings, pooling = results["settings"], results["pooling"]
    fractions = settings["label_fractions"]
    labels = results["probe_data"]["num_labels_by_fraction"]
    header = [
        "labels",
        *(f"{100 * fraction:g} % ({count})" for fraction, count in zip(fractions, labels, strict=True)),
    ]
    rows = []
    for row, title in TITLES.items():
        curves = accuracies(results, row, pooling, "top1_by_fraction")
        rows.append([title, *(mean_and_spread(values) for values in zip(*curves, strict=True))])
    for row, curve in PAPER_FRACTIONS.items():
        cells = [f"{curve[fraction]:.2f}" if fraction in curve else "" for fraction in fractions]
        rows.append([f"paper: {TITLES[row]}", *cells])
    return f"""## Parts of the labels (Table 5)

Top-1 of the {POOLINGS[pooling]} with a balanced part of the labels; in brackets how many files that is. A smaller
part is contained in a larger one. Below 100 % a figure of a run is the mean over {settings["num_subsets"]} draws, the
same for all encoders. **The paper finetunes the whole encoder; here only a linear classifier on frozen features is
trained**, as finetuning every point would take longer than the pretraining.

{markdown_table(header, rows)}

![Accuracy by share of labels]({image_prefix}label_fractions.png)"""


def gaps_section(results: dict[str, Any], image_prefix: str) -> str:
    gaps = {pooling: gap_accuracies(results, pooling) for pooling in POOLINGS}
    rows = [
        [title, *(mean_and_spread(gaps[pooling][gap]) for pooling in POOLINGS), f"{PAPER_GAPS[gap]:.2f}"]
        for gap, title in GAPS.items()
        if gap in gaps["cls"]
    ]
    header = ["two frames of ViC-MAE", *POOLINGS.values(), "paper, ImageNet-1K: top-1"]
    return f"""## Gap between the two frames

Four frames are taken as 4/30 s, whatever the frame rate. All gaps have the settings that were chosen for distant
frames.

{markdown_table(header, rows)}

![Accuracy by gap between the two frames]({image_prefix}frame_gap.png)"""


def mask_ratio_section(results: dict[str, Any]) -> str:
    own = {results["budget"]["mask_ratio"]: {pooling: accuracies(results, "vicmae", pooling) for pooling in POOLINGS}}
    ratios = {pooling: by_variant(results, "mask_ratio", pooling) for pooling in POOLINGS}
    if not ratios["cls"]:
        return ""
    others = {ratio: {pooling: ratios[pooling][ratio] for pooling in POOLINGS} for ratio in ratios["cls"]}
    rows = [
        [f"{ratio:g}", *(mean_and_spread(values[pooling]) for pooling in POOLINGS)]
        for ratio, values in sorted((own | others).items())
    ]
    return "## Mask ratio of ViC-MAE\n\n" + markdown_table(["mask ratio", *POOLINGS.values()], rows)


def collapse_section(results: dict[str, Any], image_prefix: str) -> str:
    size = results["budget"]["hidden_size"]
    header = ["", "features: std x sqrt(D)", "effective rank", "alignment", "uniformity"]
    header += ["projections: std x sqrt(P)", "effective rank"]
    rows = []
    for row in METHODS:
        runs = [run for run in results["runs"] if run["part"] == "methods" and run["method"] == row]
        figures = [run["collapse"] for run in runs]
        cells = [mean_and_spread([each["feature_std"] * math.sqrt(size) for each in figures], digits=2)]
        cells += [
            mean_and_spread([each[f"feature_{name}"] for each in figures], digits)
            for name, digits in [("rank", 1), ("alignment", 2), ("uniformity", 2)]
        ]
        if "projection_std" in figures[0]:
            widths = [run["projection_size"] for run in runs]
            cells += [
                mean_and_spread(
                    [each["projection_std"] * math.sqrt(width) for each, width in zip(figures, widths, strict=True)],
                    digits=2,
                ),
                mean_and_spread([each["projection_rank"] for each in figures]),
            ]
        else:
            cells += ["", ""]
        rows.append([TITLES[row], *cells])
    return f"""## Collapse

At the last update, of the masked views of a training batch. Features are the {POOLINGS[results["pooling"]]},
D = {size}; projections are what the contrastive part compares, P wide. The scaled standard deviation of the normalised
embeddings is 1 where they fill the sphere evenly, 0 where they are all the same. The effective rank (RankMe) is at
most D, P, and twice the batch. Alignment is 0 where both views agree, uniformity 0 where all samples agree.

{markdown_table(header, rows)}

![Spread and effective rank of the features over the training]({image_prefix}collapse.png)"""


def sweep_section(results: dict[str, Any]) -> str:
    tuned, pooling, seed = results["tuned"], POOLINGS[results["pooling"]], results["settings"]["sweep_seed"]
    rows = [
        [
            TITLES[run["method"]],
            *(f"{run['tuned'][name]:g}" if name in run["tuned"] else "" for name in TUNED_TITLES),
            *("" if "diverged" in run else f"{run['probe'][name]['top1']:.1f}" for name in POOLINGS),
            outcome(run, results),
        ]
        for run in results["sweep"]
    ]
    if not rows:
        values = "; ".join(f"{TUNED_TITLES[name]} {value:g}" for name, value in tuned["mae_vicreg"].items())
        return f"## Settings tried\n\nThere was no choice: {values}."
    return f"""## Settings tried

Every method was tuned in the same way, with seed {seed}: one setting after the other, in the order of the columns;
each time the value with the best {pooling} was kept. What counts is a probe trained on three quarters of the labelled
training files and tested on the last, four times in turn: the held-out files of the other tables are not read for it.
All other settings are the same for all methods. These are all the runs that tried something.

{markdown_table(["", *TUNED_TITLES.values(), *POOLINGS.values(), ""], rows)}"""


def outcome(run: dict[str, Any], results: dict[str, Any]) -> str:
    """Whether a try diverged or was chosen, and on which sides of the chosen values a better one may lie untried."""
    if "diverged" in run:
        return "diverged"
    if run["tuned"] != results["tuned"][run["method"]]:
        return ""
    edges = []
    for name, value in run["tuned"].items():
        tried = {other["tuned"][name] for other in results["sweep"] if other["method"] == run["method"]}
        if len(tried) > 1 and value in (min(tried), max(tried)):
            edges.append(f"{'lowest' if value == min(tried) else 'highest'} {TUNED_TITLES[name]} tried")
    return "; ".join(["chosen", *edges])


def runs_section(results: dict[str, Any]) -> str:
    rows = []
    for run in results["runs"]:
        contrastive = "" if run["contrastive_loss"] is None else f"{run['contrastive_loss']:.3f}"
        rows.append(
            [
                run["name"],
                *(f"{run['probe'][pooling]['top1']:.1f}" for pooling in POOLINGS),
                f"{run['reconstruction_loss']:.3f}",
                contrastive,
                f"{run['train_seconds']:.0f}",
            ]
        )
    header = ["run", *(f"top-1, {title}" for title in POOLINGS.values()), "reconstruction loss", "contrastive loss"]
    return f"""## Every run

`runs/NAME` in the output folder is what `run_pretraining.py` leaves;
`run_pretraining.py settings/NAME.json --output_dir ELSEWHERE` repeats it.

{markdown_table([*header, "seconds"], rows)}"""
