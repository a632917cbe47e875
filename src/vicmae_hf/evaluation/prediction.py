"""Evaluates classifiers: every item once in any number of processes, probabilities averaged over views."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedConfig

from ..data.loading.loader import SteadyBatches, ignore_stop_signals
from ..data.loading.shared_memory import PipedTensor, send_large
from ..data.media.bad_files import BadFiles, make_entry
from ..data.samples.views import ViewDataset
from ..errors import InputError
from ..files import write_json_lines
from ..training.checkpointing import unwrap
from ..training.reporting import Progress
from ..training.resuming import check_same_in_all_processes, fingerprint
from .multi_label import mean_average_precision


if TYPE_CHECKING:
    import evaluate

TOP_K = 5
BATCHES_OF_A_ROUND = 8  # after which the processes exchange what they computed
# The figures that sum up an evaluation: the first two if an item has one label, the last if it may have several.
FIGURES = {
    "eval_top1": "top-1 accuracy",
    "eval_top5": "top-5 accuracy",
    "eval_map": "mean average precision",
}


def top_k_metric() -> "evaluate.Metric":
    """Top-1 and top-5 accuracy in percent, of lists of classes, the likeliest first. Needs no network."""
    import evaluate  # with it comes scipy.stats; a pretraining does without

    class TopKAccuracy(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=top_k_metric.__doc__,
                citation="",
                features=datasets.Features(
                    {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
                ),
            )

        def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
            return top_k_accuracies(torch.tensor(predictions), torch.tensor(references))

    return TopKAccuracy(keep_in_memory=True)


def top_k_accuracies(top_classes: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Computes `{"top1", "top5"}` in percent of classes `(N, K)`, the likeliest first, against labels `(N,)`."""
    hits = top_classes == labels[:, None]  # (N, K)
    # In float64: the float32 nearest to 87 of 160 is below 54.375 %, and would be shown as 54.37.
    return {f"top{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in (1, TOP_K)}


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Computes `{"top1", "top5"}` in percent of scores or probabilities `(N, C)` against labels `(N,)`."""
    return top_k_accuracies(likeliest_classes(scores), labels)


def likeliest_classes(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities `(..., C)` -> the five likeliest classes, or all if there are fewer, `(..., 5)`."""
    return probabilities.topk(min(TOP_K, probabilities.shape[-1])).indices


def shown_figures(figures: dict[str, Any], num_classes: int) -> dict[str, float]:
    """The figures of `FIGURES` that an evaluation has; without top-5 where there are five classes: it is 100 then."""
    return {
        name: figures[name] for name in FIGURES if name in figures and (name != "eval_top5" or num_classes > TOP_K)
    }


def describe_figures(figures: dict[str, Any], num_classes: int) -> str:
    """Formats the figures of an evaluation: "top-1 accuracy 50.00 %"."""
    return ", ".join(f"{FIGURES[name]} {value:.2f} %" for name, value in shown_figures(figures, num_classes).items())


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


def check_finite(dataset: ViewDataset, collected: "Collected") -> None:
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


@dataclass(frozen=True)
class Collected:
    """
    What was computed of the items of a dataset, or of some that follow each other.

    Args:
        indices: `(N,)` of the items that could be read, ascending.
        outputs: by name, what was computed of each item on the CPU: a tensor `(N, ...)`, or a list.
        failures: `{"path", "error"}` of the items that could not be read.
    """

    indices: torch.Tensor
    outputs: dict[str, Any]
    failures: list[dict[str, str]]


def collect(
    accelerator: Accelerator,
    dataset: ViewDataset,
    compute: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
    *,
    batch_size: int,
    num_workers: int,
) -> Collected:
    """Applies `compute` to every item once, and joins the tensors that it returns (see `collect_rounds`)."""

    def compute_on_cpu(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {name: values.cpu() for name, values in compute(batch).items()}  # outputs of a dataset fill a GPU

    rounds = list(collect_rounds(accelerator, dataset, compute_on_cpu, batch_size=batch_size, num_workers=num_workers))
    read = [found for found in rounds if len(found.indices)]
    return Collected(
        torch.cat([found.indices for found in read]),
        {name: torch.stack([value for found in read for value in found.outputs[name]]) for name in read[0].outputs},
        [failure for found in rounds for failure in found.failures],
    )


def collect_rounds(
    accelerator: Accelerator,
    dataset: ViewDataset,
    compute: Callable[[dict[str, Any]], dict[str, Sequence[torch.Tensor]]],
    *,
    batch_size: int,
    num_workers: int,
    num_read: int = 0,
    what: str = "evaluating",
) -> Iterator[Collected]:
    """
    Applies `compute` to every item once, and yields what came of the next items, in their order. The processes share
    the work, and all get the whole result.

    Args:
        compute: a batch (see `collate_views`) -> by name, values on the CPU, one for each of its B items.
        batch_size: views that a batch should hold; it has at least one item.
        num_workers: processes that load, for each process that computes.
        num_read: items that were read before, by a run that was interrupted.
        what: is being done, in words; the main process shows them with its progress.

    Raises:
        InputError: if no item can be read, or the processes have found different ones.
    """
    check_same_in_all_processes({dataset.source.name: fingerprint(dataset.source.list_names())})
    # Divided here and not by Accelerate, which repeats items until all processes have equally many: they would be
    # counted twice.
    share = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    items_per_batch = max(batch_size // dataset.max_views, 1)
    batches = load_items(accelerator, dataset, share, items_per_batch, num_workers)
    # The first process has the most batches. All take part in as many rounds, the others perhaps without a batch.
    num_batches = math.ceil(len(range(0, len(dataset), accelerator.num_processes)) / items_per_batch)
    first_error = None
    with Progress(what, len(dataset), "files", accelerator.is_main_process) as progress:
        for _ in range(0, num_batches, BATCHES_OF_A_ROUND):
            parts, failures = [], []
            for batch in itertools.islice(batches, BATCHES_OF_A_ROUND):
                failures += batch["failures"]
                # The other processes are as far, about.
                progress.advance((len(batch["indices"]) + len(batch["failures"])) * accelerator.num_processes)
                if len(batch["indices"]) == 0:  # none of its items could be read
                    continue
                pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
                parts.append((batch["indices"], compute(batch | {"pixel_values": dataset.normalize(pixel_values)})))
            gathered = gather_object([(parts, failures)])  # as objects, because the parts of processes differ in size
            found = join_round(dataset, gathered)
            num_read += len(found.indices)
            first_error = first_error or next((failure["error"] for failure in found.failures), None)
            yield found
    if num_read == 0:
        raise InputError(f"{dataset.source.name}: none of {len(dataset)} files could be read; {first_error}")


def load_items(
    accelerator: Accelerator, dataset: ViewDataset, share: Sequence[int], items_per_batch: int, num_workers: int
) -> Iterator[dict[str, Any]]:
    """Loads a process's share of the items in batches (see `collate_views`)."""
    deaths = BadFiles(None, len(dataset), max_share=1.0)

    def open_loader(num_batches: int) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(
            SurvivedItems(dataset, share[num_batches * items_per_batch :], deaths),
            batch_size=items_per_batch,
            num_workers=num_workers,
            collate_fn=send_views if num_workers else collate_views,
            worker_init_fn=ignore_stop_signals,
            pin_memory=accelerator.device.type == "cuda",
            # A generator of its own: the loader draws a number at its start, and the global random state stays.
            generator=torch.Generator().manual_seed(0),
        )

    return iter(SteadyBatches(open_loader, deaths, num_workers))


def join_round(
    dataset: ViewDataset, gathered: Sequence[tuple[list[tuple[torch.Tensor, dict[str, Any]]], list[tuple]]]
) -> Collected:
    """Joins the parts of all processes, each (indices, outputs) of some batches and failures, in the items' order."""
    parts = [part for parts, _ in gathered for part in parts]
    order = torch.cat([torch.zeros(0, dtype=torch.int64), *(indices for indices, _ in parts)]).argsort().tolist()
    names = parts[0][1] if parts else ()
    columns = {"indices": [index for indices, _ in parts for index in indices]}
    columns |= {name: [value for _, outputs in parts for value in outputs[name]] for name in names}
    columns = {name: [values[place] for place in order] for name, values in columns.items()}
    failures = sorted(failure for _, failures in gathered for failure in failures)
    return Collected(
        torch.tensor(columns.pop("indices"), dtype=torch.int64),
        columns,
        [make_entry(dataset.source[index].name, *rest) for index, *rest in failures],
    )


class SurvivedItems(torch.utils.data.Dataset):
    """
    Items of a `ViewDataset`. One at which workers died is returned as one that cannot be read (see `SteadyBatches`).

    Args:
        indices: which items.
        deaths: knows at which files.
    """

    def __init__(self, dataset: ViewDataset, indices: Sequence[int], deaths: BadFiles):
        self.dataset = dataset
        self.indices = indices
        self.deaths = deaths

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        index = self.indices[place]
        name = self.dataset.source[index].name
        if name in self.deaths.errors:
            return {"index": index, "error": self.deaths.errors[name], "is_transient": True}
        self.deaths.note_opened(name)
        item = self.dataset[index]
        self.deaths.note_opened("")
        return item


def collate_views(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """
    Joins items of a `ViewDataset` into a batch:
        indices: `(B,)`, of the items that could be read.
        pixel_values: their views, one item after the other, `(V1 + V2 + ..., ...)`.
        weights: `(P, V)` of each item.
        failures: (index, error, whether it may be read later) of the items that could not be read.
    """
    read = [sample for sample in samples if "error" not in sample]
    return {
        "indices": torch.tensor([sample["index"] for sample in read], dtype=torch.int64),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in read]) if read else None,
        "weights": [sample["weights"] for sample in read],
        "failures": [
            (sample["index"], sample["error"], sample["is_transient"]) for sample in samples if "error" in sample
        ],
    }


def send_views(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As `collate_views`, for workers. torch would wait for ever for a batch that shared memory had no room for."""
    batch = collate_views(samples)
    if batch["pixel_values"] is not None:
        batch["pixel_values"] = send_large(batch["pixel_values"])
    batch["indices"] = PipedTensor(batch["indices"])
    batch["weights"] = [PipedTensor(rows.contiguous()) for rows in batch["weights"]]
    return batch


def split_items(values: torch.Tensor, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Values of views `(V1 + V2 + ..., ...)` -> `(V, ...)` of each item, whose weights are `(P, V)`."""
    return values.split([rows.shape[1] for rows in weights])


def average_views(values: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Values of views `(V1 + V2 + ..., D)`, averaged by the weights `(P, V)` of each item -> `(B, P, D)`."""
    parts = zip(split_items(values, weights), weights, strict=True)
    return torch.stack([rows.to(part) @ part for part, rows in parts])  # (P, V) @ (V, D)


def write_failures(path: str | os.PathLike, failures: Sequence[dict[str, str]]) -> None:
    """Writes failures, `{"path", "error"}` a line; no file if there are none."""
    Path(path).unlink(missing_ok=True)  # an older one would be taken for this run's
    if failures:
        write_json_lines(path, failures)
