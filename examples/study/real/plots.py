"""Pictures of the study of real pictures and people, drawn without pyplot: no display, no global state."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study_results import POOLINGS, TITLES
from study_tables import deviation

from vicmae_hf.reports.plots import save_picture


def plot_methods(images: dict[str, Any], titles: dict[str, str], path: Path) -> None:
    """A point for every seed of the linear probe, a line for the mean; chance is dotted."""
    rows = {"untrained": images["references"]["untrained"]}
    for run in images["runs"]:
        rows.setdefault(run["row"], []).append(run["probe"])
    rows = {row: rows[row] for row in titles if row in rows}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (pooling, title) in zip(figure.subplots(1, len(POOLINGS), sharey=True), POOLINGS.items(), strict=True):
        for position, probes in enumerate(rows.values()):
            values = [probe[pooling]["top1"] for probe in probes]
            axes.scatter([position] * len(values), values, s=14)
            axes.hlines(statistics.fmean(values), position - 0.3, position + 0.3, color="black", linewidth=1)
        axes.axhline(100 / images["data"]["num_classes"], color="grey", linestyle=":")
        axes.set_xticks(range(len(rows)), [titles[row] for row in rows], rotation=40, ha="right", fontsize=7)
        axes.set_title(title)
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel("linear probe, top-1, %")
    figure.axes[0].set_ylim(bottom=0)  # of all three, once all points are there
    save_picture(figure, path)


def plot_fractions(images: dict[str, Any], titles: dict[str, str], path: Path) -> None:
    """Accuracy of finetuned encoders against the share of labels, means with spreads over seeds."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    fractions = sorted({run["fraction"] for run in images["finetuned"]})
    for row, title in titles.items():
        points = [
            [run["top1"] for run in images["finetuned"] if (run["row"], run["fraction"]) == (row, fraction)]
            for fraction in fractions
        ]
        if points[0]:
            means, spreads = map(statistics.fmean, points), map(deviation, points)
            axes.errorbar(
                [100 * fraction for fraction in fractions],
                list(means),
                list(spreads),
                marker=".",
                capsize=3,
                label=title,
            )
    axes.set_xscale("log")
    axes.set_xticks([100 * fraction for fraction in fractions], [f"{100 * fraction:g}" for fraction in fractions])
    axes.minorticks_off()
    axes.set(xlabel="labels, %", ylabel="top-1, %", title="CIFAR-10, the whole encoder finetuned")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    save_picture(figure, path)


def plot_curve(images: dict[str, Any], path: Path) -> None:
    """Accuracies of the checkpoints of the longer runs against updates; random weights of the same seed are dotted."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = {"linear, class token": ("cls", "top1"), "linear, mean of patch tokens": ("mean", "top1")}
    panels["neighbours, mean of patch tokens"] = ("mean", "knn_top1")
    for axes, (title, (pooling, name)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        start = images["references"]["untrained"][0][pooling][name]
        axes.axhline(start, color="black", linestyle=":", label="untrained encoder")
        for method, run in images["long"].items():
            steps = [0, *(point["step"] for point in run["points"])]
            values = [start, *(point["probe"][pooling][name] for point in run["points"])]
            axes.plot(steps, values, ".-", label=TITLES[method])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("updates")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    save_picture(figure, path)
