"""Computes something of every item once, in any number of processes that share the work."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.loading.loader import SteadyBatches, ignore_stop_signals
from ..data.loading.shared_memory import PipedTensor, send_large
from ..data.media.bad_files import BadFiles, make_entry
from ..data.samples.views import ViewDataset
from ..errors import InputError
from ..training.reporting import Progress
from ..training.resuming import check_same_in_all_processes, fingerprint


BATCHES_OF_A_ROUND = 8  # after which the processes exchange what they computed


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
