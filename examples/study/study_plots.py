"""Pictures of the study. Matplotlib's figures are used without pyplot: no display, no global state."""

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study_results import GAPS, PAPER_FRACTIONS, PAPER_GAPS, POOLINGS, TITLES, accuracies, gap_accuracies
from study_tables import deviation

from vicmae_hf.reports.plots import save_picture


def plot_methods(results: dict[str, Any], path: Path) -> None:
    """A point for every seed, a line for the mean; chance is dotted."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (pooling, title) in zip(figure.subplots(1, len(POOLINGS), sharey=True), POOLINGS.items(), strict=True):
        for position, row in enumerate(TITLES):
            values = accuracies(results, row, pooling)
            axes.scatter([position] * len(values), values, s=14)
            axes.hlines(statistics.fmean(values), position - 0.3, position + 0.3, color="black", linewidth=1)
        axes.axhline(100 / results["probe_data"]["num_classes"], color="grey", linestyle=":")
        axes.set_xticks(range(len(TITLES)), TITLES.values(), rotation=30, ha="right", fontsize=8)
        axes.set(title=title, ylim=(0, 100))
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel("top-1, %")
    save_picture(figure, path)


def plot_fractions(results: dict[str, Any], path: Path) -> None:
    """Ours and the paper's accuracy against the share of labels, means with spreads over seeds."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ours, paper = figure.subplots(1, 2)
    fractions = [100 * fraction for fraction in results["settings"]["label_fractions"]]
    for row, title in TITLES.items():
        columns = list(zip(*accuracies(results, row, results["pooling"], "top1_by_fraction"), strict=True))
        means = [statistics.fmean(values) for values in columns]
        spreads = [deviation(values) for values in columns]
        ours.errorbar(fractions, means, spreads, marker=".", label=title)
    ours.set(title="here: frozen encoder", xlabel="labels, %", ylabel="top-1, %")
    for row, curve in PAPER_FRACTIONS.items():
        color = f"C{list(TITLES).index(row)}"
        paper.plot([100 * fraction for fraction in curve], list(curve.values()), marker=".", color=color)
    paper.set(title="paper: finetuned, ImageNet-1K", xlabel="labels, %")
    for axes in (ours, paper):
        axes.set_xscale("log")
        axes.set_xticks([5, 10, 25, 50, 100], ["5", "10", "25", "50", "100"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6, fontsize=7)
    save_picture(figure, path)


def plot_gaps(results: dict[str, Any], path: Path) -> None:
    """Ours, of every pooling, and the paper's accuracy against the gap between the two frames."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for pooling, title in POOLINGS.items():
        gaps = gap_accuracies(results, pooling)
        positions = [list(GAPS).index(gap) for gap in gaps]
        means = [statistics.fmean(values) for values in gaps.values()]
        spreads = [deviation(values) for values in gaps.values()]
        axes.errorbar(positions, means, spreads, marker=".", capsize=3, label=f"here, {title}")
    axes.plot(
        [list(GAPS).index(gap) for gap in PAPER_GAPS], list(PAPER_GAPS.values()), "k.--", label="paper, ImageNet-1K"
    )
    axes.set_xticks(range(len(GAPS)), GAPS.values())
    axes.set(ylabel="top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_picture(figure, path)


def plot_collapse(results: dict[str, Any], path: Path) -> None:
    """Scaled standard deviation and effective rank of the features over the training, a line for every run."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    scale = math.sqrt(results["budget"]["hidden_size"])
    spread, rank = figure.subplots(1, 2)
    for run in results["runs"]:
        if run["part"] != "methods":
            continue
        history = run["history"]
        color = f"C{list(TITLES).index(run['method'])}"
        label = TITLES[run["method"]] if run["seed"] == 0 else None
        spread.plot(history["step"], [scale * value for value in history["feature_std"]], color=color, label=label)
        rank.plot(history["step"], history["feature_rank"], color=color)
    spread.set(title="std x sqrt(D) of normalised features", xlabel="update")
    rank.set(title="effective rank", xlabel="update")
    for axes in (spread, rank):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    save_picture(figure, path)
