"""Draws pictures of a run. Matplotlib's figures are used without pyplot: no display, no global state."""

import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from torch.nn import functional as F

from ..files import partial_file
from .baselines import Baselines
from .sheets import Sheet


# With more classes, names and counts in a confusion matrix could not be read.
MAX_NAMED_CLASSES = 60
MAX_COUNTED_CLASSES = 30
# Values that are drawn as dots, too.
MAX_DOTS = 30


def save_picture(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure to a file that is whole or absent. Raises an InputError if it cannot be written."""
    layout = figure.get_layout_engine()
    if layout is not None:
        # Once, here: with a layout to make, Matplotlib draws everything twice.
        layout.execute(figure)
        figure.set_layout_engine("none")
    with partial_file(Path(path)) as partial:
        # A tenth more bytes than by the default, in less than half the time.
        figure.savefig(partial, dpi=100, pil_kwargs={"compress_level": 3})


def plot_losses(
    metrics: Sequence[dict[str, float]], path: str | os.PathLike, baselines: Baselines | None = None
) -> None:
    """
    Draws losses and learning rate against the update, one panel each, from the lines of `metrics.jsonl`. Baselines are
    dashed lines.
    """
    # Of all lines, because a line of a probe alone has no losses; only where there is something to draw.
    names = {name: None for line in metrics for name in line if name == "loss" or name.endswith("_loss")}
    names = [*names, "learning_rate"]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [line.get(name, np.nan) for line in metrics]
        # With dots where they are few: a single value is no line.
        axes.plot([line["step"] for line in metrics], values, ".-" if len(metrics) <= MAX_DOTS else "-")
        axes.set(title=name.replace("_", " "), xlabel="update", xlim=(0, 1.03 * metrics[-1]["step"]))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))  # 0.693, not 3e-3 beside a "+0.69" above
        axes.grid(alpha=0.3)
        if name in (baselines or {}):
            draw_baseline(axes, *baselines[name])
    save_picture(figure, path)


def draw_baseline(axes: Axes, value: float, label: str, colour: str = "tab:gray") -> None:
    """Draws a dashed line, and says in the legend what it is."""
    axes.axhline(value, linestyle="--", color=colour, label=f"{label} ({value:.4g})")
    axes.legend(fontsize=8)


def plot_accuracies(
    metrics: Sequence[dict[str, float]],
    path: str | os.PathLike,
    shown_figures: dict[str, str],
    baselines: Baselines,
) -> None:
    """
    Draws figures of a run's evaluations against the epoch, with their baselines as dashed lines.

    Args:
        metrics: lines of `metrics.jsonl`.
        shown_figures: keys of these lines and their names, `{"eval_top1": "top-1 accuracy"}`.
        baselines: of the same keys.
    """
    evaluations = [line for line in metrics if shown_figures.keys() <= line.keys()]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in shown_figures.items():
        values = [line[name] for line in evaluations]
        (curve,) = axes.plot([line["epoch"] for line in evaluations], values, ".-", label=label)
        if name in baselines:
            draw_baseline(axes, *baselines[name], curve.get_color())
    axes.set(title="held-out samples", xlabel="epoch", ylabel="%")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save_picture(figure, path)


def plot_reconstructions(columns: dict[str, torch.Tensor], path: str | os.PathLike, text: str = "") -> None:
    """
    Draws one row for each sample and one column for each name in `columns`: images `(N, 3, H, W)` in [0, 1]; and below
    them the text.
    """
    num_rows, _, height, width = next(iter(columns.values())).shape
    sheet = Sheet((height, width), num_rows, len(columns))
    for column, (title, images) in enumerate(columns.items()):
        sheet.write(title, 0, column + 0.46, ha="center")
        for row, image in enumerate(images):
            sheet.place(image, row, column)  # predictions overshoot, and are cut to [0, 1]
    lines = wrap(text, 27 * len(columns))
    size = (2 * len(columns), 2 * num_rows * height / width + 0.4 + 0.18 * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    sheet.draw(figure.subplots())
    write_below(figure, lines)
    save_picture(figure, path)


def write_below(figure: Figure, lines: Sequence[str]) -> None:
    """Writes lines of text at the lower left of a figure."""
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=9)


def plot_neighbours(
    frames: torch.Tensor,
    queries: torch.Tensor,
    neighbours: Sequence[tuple[torch.Tensor, torch.Tensor]],
    path: str | os.PathLike,
) -> None:
    """
    Draws frames, and beside each the nearest to it by the trained and by the untrained encoder.

    Args:
        frames: `(N, 3, H, W)`, uint8; queries: indices of frames, `(Q,)`.
        neighbours: of either encoder, indices of frames `(Q, K)` and their similarities.
    """
    num_rows, num_neighbours = neighbours[0][0].shape
    height, width = frames.shape[-2:]
    top = 0.5  # room for the titles
    starts = [1.2, 1.4 + num_neighbours]  # columns, with a gap before each group
    num_columns = starts[1] + num_neighbours
    sheet = Sheet((height, width), num_rows + top, num_columns, gap=0.15)
    for title, column in zip(("frame", "nearest, trained", "nearest, random weights"), (0, *starts), strict=True):
        sheet.write(title, top - 0.2, column, fontsize=11)
    for row, query in enumerate(queries.tolist()):
        sheet.place(frames[query], row + top, 0)
        for start, (indices, similarities) in zip(starts, neighbours, strict=True):
            for place, (index, similarity) in enumerate(zip(indices[row], similarities[row], strict=True)):
                sheet.place(frames[index], row + top, start + place, f"{similarity:.3f}")
    size = (1.4 * num_columns, 1.4 * (num_rows + top) * height / width + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    sheet.draw(figure.subplots())
    text = (
        f"The nearest of {len(frames)} frames, from other files if there are several; above each, the cosine "
        "similarity of the pooled features. Random weights also find frames of similar colours."
    )
    write_below(figure, wrap(text, round(17 * num_columns)))
    save_picture(figure, path)


def plot_attention(
    frames: torch.Tensor, attention: Sequence[torch.Tensor], grid: tuple[int, int], path: str | os.PathLike
) -> None:
    """
    Draws frames, and below each the attention of the class token by the trained and by the untrained encoder.

    Args:
        frames: `(N, 3, H, W)`, uint8; attention: of either encoder, `(N, L)`, 1 is an even share.
        grid: rows and columns of patches.
    """
    height, width = frames.shape[-2:]
    largest = max(2.0, *(float(each.quantile(0.99)) for each in attention))  # one scale, or they could not be compared
    colours = ScalarMappable(Normalize(0, largest))
    sheet = Sheet((height, width), 3, len(frames) + 0.3)
    for row, title in enumerate(("frame", "trained", "random weights")):
        sheet.write(title, row + 0.46, 0.02, rotation=90, va="center")
    for column, frame in enumerate(frames):
        sheet.place(frame, 0, column + 0.3)
        for row, each in enumerate(attention, start=1):
            image = torch.from_numpy(colours.to_rgba(each[column].view(*grid).numpy())[..., :3]).permute(2, 0, 1)
            sheet.place(F.interpolate(image[None], (height, width), mode="nearest")[0], row, column + 0.3)
    figure = Figure(figsize=(1.5 * len(frames) + 1.6, 4.5 * height / width + 0.9), layout="constrained")
    axes = figure.subplots()
    sheet.draw(axes)
    figure.colorbar(colours, ax=axes, shrink=0.6, label="multiple of an even share")
    text = "Attention of the class token to the patches in the last layer, mean over heads."
    write_below(figure, wrap(text, max(20 * len(frames), 40)))
    save_picture(figure, path)


def plot_confusion(counts: np.ndarray, class_names: Sequence[str], path: str | os.PathLike) -> None:
    """Draws the shares of each class (rows) that were taken for each class (columns), from counts `(C, C)`."""
    num_classes = len(class_names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # 1: a class may have no samples
    side = min(max(0.4 * num_classes, 3), 14)
    figure = Figure(figsize=(side + 2, side + 1.5), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), ax=axes, shrink=0.8, label="share of the class")
    axes.set(xlabel="predicted", ylabel="class")
    if num_classes <= MAX_NAMED_CLASSES:
        axes.set_xticks(range(num_classes), class_names, rotation=90)
        axes.set_yticks(range(num_classes), class_names)
    if num_classes <= MAX_COUNTED_CLASSES:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    save_picture(figure, path)


def plot_temporal_ablation(ablation: dict[str, dict[str, Any]], path: str | os.PathLike, baselines: Baselines) -> None:
    """
    Draws top-1 of frames in order, shuffled and repeated, from `FrameOrders.summarize`; dots are single runs, the
    baseline of `eval_top1` is a dashed line.
    """
    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, accuracy in enumerate(ablation.values()):
        bar = axes.bar(place, accuracy["eval_top1"], color="tab:blue", alpha=0.6)
        axes.bar_label(bar, fmt="%.1f", label_type="center")
        runs = accuracy.get("eval_top1_runs", [])
        axes.scatter(np.linspace(place - 0.25, place + 0.25, len(runs)), runs, s=8, color="black", zorder=2)
    axes.set_xticks(range(len(ablation)), [f"frames {name}" if name != "standard" else name for name in ablation])
    axes.set(ylabel="top-1 (%)", ylim=(0, 100))
    draw_baseline(axes, *baselines["eval_top1"])
    axes.grid(axis="y", alpha=0.3)
    save_picture(figure, path)
