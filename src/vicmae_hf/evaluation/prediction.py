"""Evaluates classifiers: every item once in any number of processes, probabilities averaged over views."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedConfig

from ..data.samples.views import ViewDataset
from ..errors import InputError
from ..files import write_json_lines
from ..training.checkpointing import unwrap
from .collecting import Collected, average_views, collect, split_items
from .metrics.accuracy import likeliest_classes, top_k_metric
from .metrics.multi_label import mean_average_precision


def to_probabilities(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Logits of a classifier -> probabilities, of each class by itself where an item may have several."""
    return logits.sigmoid() if is_multi_label(config) else logits.softmax(-1)


def is_multi_label(config: PreTrainedConfig) -> bool:
    """Whether a classifier may give an item several labels."""
    return config.problem_type == "multi_label_classification"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode without gradients for its block. Afterwards its mode is as before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class Predictions:
    """
    A model's predictions for the items that could be read, in the order of the dataset.

    Args:
        probabilities: `(N, C)`, float32, averaged over views.
        labels: `(N,)`, or targets `(N, C)` where an item may have several.
        indices: `(N,)`, which items of the dataset they are.
        failures: `{"path", "error"}` of each item that could not be read.
    """

    probabilities: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    failures: list[dict[str, str]]

    @property
    def is_multi_label(self) -> bool:
        return self.labels.ndim == 2

    def accuracy(self) -> dict[str, float]:
        """
        `eval_top1` and `eval_top5`, or `eval_map`, in percent of the items that were read; how many were read, how
        many failed.
        """
        if self.is_multi_label:
            figures = {"map": mean_average_precision(self.probabilities, self.labels)}
        else:
            figures = top_k_metric().compute(
                predictions=likeliest_classes(self.probabilities).tolist(), references=self.labels.tolist()
            )
        return {
            **{f"eval_{name}": value for name, value in figures.items()},
            "num_eval_samples": len(self.labels),
            "num_failed": len(self.failures),
        }


@dataclass(frozen=True)
class ViewPredictions:
    """
    What a model predicts by several protocols.

    Args:
        protocols: predictions by each protocol of the dataset.
        reordered: the five likeliest classes of each order of frames, `(N, G, 5)`; None if none were asked for.
        num_clips: clips (or images) that went through the model.
        seconds: time of reading and prediction.
    """

    protocols: list[Predictions]
    reordered: torch.Tensor | None
    num_clips: int
    seconds: float


def predict(
    accelerator: Accelerator, model: nn.Module, dataset: ViewDataset, *, batch_size: int, num_workers: int
) -> Predictions:
    """Predicts by the first protocol of a dataset (see `predict_views`)."""
    return predict_views(accelerator, model, dataset, batch_size=batch_size, num_workers=num_workers).protocols[0]


def predict_views(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: ViewDataset,
    *,
    batch_size: int,
    num_workers: int,
    frame_orders: Callable[[int], torch.Tensor] | None = None,
) -> ViewPredictions:
    """
    Predicts every item once. The processes share the work, and all get all predictions.

    Args:
        model: a classifier of this package or of Transformers, prepared or not. Its training mode stays as it was.
        dataset: views with labels.
        batch_size: views in a forward pass.
        num_workers: processes that load, for each process that predicts.
        frame_orders: index of an item -> G orders of the frames of a clip, `(G, T)`. The views of the first protocol
            are predicted in these orders, too.

    Raises:
        InputError: if no item can be read, or the model's outputs are not finite.
    """
    # Bare, because the wrapper for several processes would wait for all of them, and some have fewer batches.
    model = unwrap(accelerator, model)

    def compute(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return predict_batch(accelerator, model, batch, batch_size, frame_orders)

    started = time.perf_counter()
    with evaluating(model):
        collected = collect(accelerator, dataset, compute, batch_size=batch_size, num_workers=num_workers)
    seconds = time.perf_counter() - started
    check_finite(dataset, collected)
    labels = torch.as_tensor(dataset.labels)[collected.indices]
    return ViewPredictions(
        protocols=[
            Predictions(collected.outputs["probabilities"][:, row], labels, collected.indices, collected.failures)
            for row in range(len(dataset.protocols))
        ],
        reordered=collected.outputs.get("reordered"),
        num_clips=int(collected.outputs["num_clips"].sum()),
        seconds=seconds,
    )


def predict_batch(
    accelerator: Accelerator,
    model: nn.Module,
    batch: dict[str, Any],
    batch_size: int,
    frame_orders: Callable[[int], torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """
    Predicts a batch (see `collate_views`). Returns `probabilities` by protocol `(B, P, C)`; with `frame_orders` also
    `reordered` `(B, G, 5)`; and `num_clips` `(B,)`, how many clips of each item went through the model.
    """

    def probabilities(views: torch.Tensor) -> torch.Tensor:
        # An item may have more views than fit into memory at once.
        with accelerator.autocast():
            logits = [model(**{model.main_input_name: part}).logits for part in views.split(batch_size)]
        return to_probabilities(torch.cat(logits).float(), model.config)  # (V1 + V2 + ..., C)

    views = batch["pixel_values"].to(model.dtype)
    num_clips = torch.tensor([rows.shape[1] for rows in batch["weights"]])
    outputs = {"probabilities": average_views(probabilities(views), batch["weights"])}
    if frame_orders is not None:
        outputs["reordered"] = predict_reordered(probabilities, views, batch, frame_orders)
        num_first = torch.tensor([int((rows[0] > 0).sum()) for rows in batch["weights"]])
        num_clips = num_clips + num_first * outputs["reordered"].shape[1]
    return outputs | {"num_clips": num_clips}


def check_finite(dataset: ViewDataset, collected: Collected) -> None:
    """Raises an InputError that names the first file whose probabilities are infinite or NaN."""
    is_finite = collected.outputs["probabilities"].isfinite().flatten(1).all(1)
    if not is_finite.all():
        first = dataset.source[int(collected.indices[~is_finite][0])].name
        raise InputError(
            f"The model's outputs are infinite or NaN for {int((~is_finite).sum())} files, the first: {first}. Try "
            "--mixed_precision no or bf16."
        )


def check_embeddings(embeddings: torch.Tensor, name: str) -> None:
    """Raises an InputError if embeddings of views of the source `name` are infinite or NaN."""
    if not embeddings.isfinite().all():
        raise InputError(
            f"{name}: embeddings are infinite or NaN. The encoder's weights are damaged, its training diverged, or "
            "--mixed_precision fp16 is too narrow for it."
        )


def predict_reordered(
    probabilities: Callable[[torch.Tensor], torch.Tensor],
    views: torch.Tensor,
    batch: dict[str, Any],
    frame_orders: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """Predicts the items of a batch with their frames in other orders: the five likeliest classes, `(B, G, 5)`."""
    orders = [frame_orders(index) for index in batch["indices"].tolist()]
    # Only views that the first protocol uses: G orders of each cost G times as much.
    weights = [rows[:1, rows[0] > 0] for rows in batch["weights"]]
    parts = split_items(views, batch["weights"])
    clips = [part[rows[0] > 0] for part, rows in zip(parts, batch["weights"], strict=True)]
    top_classes = []
    for order in range(len(orders[0])):  # one at a time: all at once would need G times the memory
        reordered = torch.cat([part[:, item[order]] for part, item in zip(clips, orders, strict=True)])
        top_classes.append(likeliest_classes(average_views(probabilities(reordered), weights)[:, 0]))
    return torch.stack(top_classes, dim=1)


def write_failures(path: str | os.PathLike, failures: Sequence[dict[str, str]]) -> None:
    """Writes failures, `{"path", "error"}` a line; no file if there are none."""
    Path(path).unlink(missing_ok=True)  # an older one would be taken for this run's
    if failures:
        write_json_lines(path, failures)
