"""Writes the files of an evaluation: figures, tables and pictures."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from ..data.samples.views import ViewDataset
from ..data.sources.label_lists import name_labels
from ..data.sources.labelled import LabelledSource, format_list
from ..errors import InputError
from ..files import check_writable, partial_file, write_csv, write_json, writing
from ..reports.baselines import classification_baselines
from ..reports.plots import plot_confusion, plot_temporal_ablation
from ..training.reporting import RESULTS_FILE, say_unreadable
from .feature_files import matrix_column
from .metrics.accuracy import FIGURES, likeliest_classes, shown_figures
from .metrics.multi_label import average_precisions
from .prediction import Predictions, ViewPredictions, write_failures
from .temporal_ablation import FrameOrders


# Written by some evaluations only: an earlier one may have left them in the same folder.
NOT_ALWAYS = ("temporal_ablation.csv", "plots/temporal_ablation.png", "confusion.csv", "plots/confusion.png")
SHORT_NAMES = {"eval_top1": "top-1", "eval_top5": "top-5", "eval_map": "mAP"}


def check_output_dir(output_dir: str | os.PathLike) -> None:
    """
    Checks a folder for results, before they are computed.

    Raises:
        InputError: if it is a file, holds a model whose own results would be replaced, or cannot be written to.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file; expected a folder.")
    if (folder / "config.json").exists():  # a run and an evaluation both write all_results.json
        raise InputError(f"--output_dir {folder} holds a model; choose another folder, for example {folder}/eval.")
    check_writable(folder / RESULTS_FILE)


def write_evaluation(
    output_dir: str | os.PathLike,
    dataset: ViewDataset,
    predictions: ViewPredictions,
    frame_orders: FrameOrders | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """
    Writes `all_results.json`, `arguments.json`, `bad_files.jsonl`, and for the first protocol `predictions.csv`,
    `per_class.csv`, and, where an item has one label, `confusion.csv` and `plots/confusion.png`; the probabilities by
    all protocols in `predictions.parquet`; with `frame_orders` also `temporal_ablation.csv` and
    `plots/temporal_ablation.png`.

    Returns:
        The content of `all_results.json`.
    """
    output_dir = Path(output_dir)
    plots = output_dir / "plots"
    with writing(plots):
        plots.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS_FILE, *NOT_ALWAYS):  # the results first: they are absent until all is of this evaluation
            (output_dir / name).unlink(missing_ok=True)
    class_names = dataset.source.class_names
    first = predictions.protocols[0]
    # First: these two mark the folder as one whose pictures are no data, also where the process is killed meanwhile.
    write_json(output_dir / "arguments.json", settings)
    write_predictions(output_dir, dataset, predictions)
    counts = None if first.is_multi_label else count_confusions(first, len(class_names))
    results = summarize(dataset, predictions, counts)
    if frame_orders is not None:
        ablation = frame_orders.summarize(results, predictions.reordered, first.labels)
        results["temporal_ablation"] = ablation
        write_temporal_ablation(output_dir, ablation)
        baselines = classification_baselines(first.labels.numpy())
        plot_temporal_ablation(ablation, plots / "temporal_ablation.png", baselines)
    if counts is None:
        write_average_precisions(output_dir, first, class_names)
    else:
        write_classes(output_dir, counts, class_names)
        plot_confusion(counts, class_names, plots / "confusion.png")
    write_failures(output_dir / "bad_files.jsonl", first.failures)
    write_json(output_dir / RESULTS_FILE, results)  # last: who finds it finds all the others
    return results


def summarize(dataset: ViewDataset, predictions: ViewPredictions, counts: np.ndarray | None) -> dict[str, Any]:
    """
    Computes the figures of an evaluation.

    `eval_top1` and `eval_top5`, or `eval_map`, count the videos that could be read. `eval_top1_of_all` counts the
    others as wrong. `eval_top1_mean_over_classes` gives every class that has videos the same weight, as `eval_map`
    does.

    Args:
        counts: see `count_confusions`; None where an item may have several labels.
    """
    accuracies = [protocol.accuracy() for protocol in predictions.protocols]
    num_items = accuracies[0]["num_eval_samples"] + accuracies[0]["num_failed"]
    num_videos = predictions.protocols[0].labels.sum(0).numpy() if counts is None else counts.sum(1)
    has_videos = num_videos > 0
    results = dict(accuracies[0])
    if counts is not None:
        # Classes without videos have no accuracy, so they are left out of the mean.
        shares = (counts.diagonal() / np.maximum(num_videos, 1))[has_videos]
        results["eval_top1_of_all"] = results["eval_top1"] * results["num_eval_samples"] / num_items
        results["eval_top1_mean_over_classes"] = float(100 * shares.mean())
    return results | {
        "protocols": {
            protocol.name: {name: accuracy[name] for name in FIGURES if name in accuracy}
            for protocol, accuracy in zip(dataset.protocols, accuracies, strict=True)
        },
        "num_classes": len(num_videos),
        "num_classes_evaluated": int(has_videos.sum()),
        "list_sha256": hash_source(dataset.source),  # equal where two evaluations saw the same files and labels
        "eval_seconds": predictions.seconds,
        "videos_per_second": len(dataset) / predictions.seconds,
        "clips_per_second": predictions.num_clips / predictions.seconds,
    }


def hash_source(source: LabelledSource) -> str:
    """
    Computes the SHA-256 of the list of all items (see `format_list`). Names are paths below a folder, also in a frame
    store packed from it; in a table that `prepare_dataset` wrote they are the official ones.
    """
    class_names = map(join_names, name_labels(source.labels, source.class_names))
    return hashlib.sha256(format_list(source.list_names(), class_names).encode()).hexdigest()


def join_names(names: str | list[str]) -> str:
    """The class of an item, or all of them, as one text."""
    return names if isinstance(names, str) else " | ".join(names)


def count_confusions(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Counts how many items of class i (rows) were taken for class j (columns), `(C, C)`."""
    # One number for each cell of the table, so that counting is one call.
    cells = predictions.labels * num_classes + likeliest_classes(predictions.probabilities)[:, 0]
    return torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes).numpy()


def write_classes(output_dir: Path, counts: np.ndarray, class_names: list[str]) -> None:
    rows = []
    for class_name, row, correct in zip(class_names, counts, counts.diagonal(), strict=True):
        num_videos = int(row.sum())
        # Empty and not 0 for a class without videos: nothing was measured.
        rows.append([class_name, num_videos, int(correct), 100 * correct / num_videos if num_videos else ""])
    write_csv(output_dir / "per_class.csv", ["class", "num_videos", "num_correct", "top1"], rows)
    table = [[class_name, *row] for class_name, row in zip(class_names, counts.tolist(), strict=True)]
    write_csv(output_dir / "confusion.csv", ["class \\ predicted", *class_names], table)


def write_average_precisions(output_dir: Path, predictions: Predictions, class_names: list[str]) -> None:
    counts = predictions.labels.sum(0).tolist()
    precisions = (100 * average_precisions(predictions.probabilities, predictions.labels)).tolist()
    # Empty and not 0 for a class without videos: nothing was measured.
    rows = [
        [class_name, count, precision if count else ""]
        for class_name, count, precision in zip(class_names, counts, precisions, strict=True)
    ]
    write_csv(output_dir / "per_class.csv", ["class", "num_videos", "average_precision"], rows)


def write_predictions(output_dir: Path, dataset: ViewDataset, predictions: ViewPredictions) -> None:
    """Writes what was predicted by the first protocol, for readers, and all probabilities, for programs."""
    first = predictions.protocols[0]
    class_names = dataset.source.class_names
    names = dataset.source.list_names()
    files = [names[index] for index in first.indices.tolist()]
    classes = name_labels(first.labels.numpy(), class_names)
    ranked = [[class_names[index] for index in row] for row in likeliest_classes(first.probabilities).tolist()]
    if first.is_multi_label:
        predicted = name_labels((first.probabilities >= 0.5).numpy(), class_names)
        header = ["file", "classes", "predicted", "five_likeliest"]
        rows = zip(files, *(map(join_names, column) for column in (classes, predicted, ranked)), strict=True)
    else:
        highest = first.probabilities.amax(1).tolist()
        header = ["file", "class", "predicted", "probability", "correct", "five_likeliest"]
        rows = [
            [file, class_name, five[0], round(probability, 6), class_name == five[0], " | ".join(five)]
            for file, class_name, five, probability in zip(files, classes, ranked, highest, strict=True)
        ]
    write_csv(output_dir / "predictions.csv", header, rows)
    labels = map(np.flatnonzero, first.labels.numpy()) if first.is_multi_label else first.labels.numpy()
    probabilities = {
        f"probabilities_{protocol.name}": matrix_column(outcome.probabilities)
        for protocol, outcome in zip(dataset.protocols, predictions.protocols, strict=True)
    }
    table = pa.table({"file": files, "class": classes, "label": pa.array(labels), **probabilities})
    # All probabilities, in a format that keeps their digits: for ensembles and other metrics.
    with partial_file(output_dir / "predictions.parquet") as partial:
        pyarrow.parquet.write_table(table, partial)


def write_temporal_ablation(output_dir: Path, ablation: dict[str, Any]) -> None:
    rows = [["standard", "", ablation["standard"]["eval_top1"]]]
    for name in ("shuffled", "repeated"):
        rows += [[name, number, top1] for number, top1 in enumerate(ablation[name]["eval_top1_runs"])]
    write_csv(output_dir / "temporal_ablation.csv", ["frames", "permutation or frame", "top1"], rows)


def describe(results: dict[str, Any], output_dir: Path) -> str:
    """Formats the figures of an evaluation as a short table."""
    unreadable = say_unreadable(results["num_failed"], output_dir / "bad_files.jsonl")
    lines = [f"{results['num_eval_samples']} evaluated, {unreadable}"]
    shown = shown_figures(results, results["num_classes"])
    lines += [f"{'views (spatial x temporal)':<26}" + "".join(f"  {SHORT_NAMES[name]:>6}" for name in shown)]
    ablation = results.get("temporal_ablation", {})
    rows = results["protocols"] | {f"frames {name}": figures for name, figures in ablation.items()}
    for name, figures in rows.items():
        spread = f"  ± {figures['eval_top1_spread']:.2f}" if "eval_top1_spread" in figures else ""
        lines.append(f"{name:<26}" + "".join(f"  {figures[key]:6.2f}" for key in shown) + spread)
    return "\n".join([*lines, f"{results['videos_per_second']:.1f} videos/s"])
