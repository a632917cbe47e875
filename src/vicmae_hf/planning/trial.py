"""Makes a few real updates of a model, and measures their time and memory."""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from ..training.optimization import parameter_groups


MAX_SECONDS = 20.0  # about, of the timed updates
TIMED_UPDATES = 2

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trial:
    """
    What a few updates took.

    Args:
        device: in words.
        batch_size: samples of the timed updates, for one process.
        seconds_per_sample: of forward and backward pass; None if nothing was timed.
        seconds_per_update: of the optimizer.
        peak_bytes: of the GPU in these updates; None on a CPU.
        out_of_memory: whether the GPU had not enough memory for a batch of the run; then nothing was timed.
    """

    device: str
    batch_size: int
    seconds_per_sample: float | None
    seconds_per_update: float = 0.0
    peak_bytes: int | None = None
    out_of_memory: bool = False


def count_kept_bytes(
    compute_losses: Callable[[Batch], Batch], batch: Batch, model: nn.Module, dtype: torch.dtype
) -> int:
    """
    Runs a forward pass in float32 or in autocast's `dtype`, and counts the bytes that it keeps for the backward pass,
    without the weights themselves. The model is not prepared: Accelerate would put another autocast around it.
    """
    kept = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    device_type = next(model.parameters()).device.type
    precision = nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)
    with precision, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = compute_losses(batch)["loss"]  # held, so that nothing kept is freed, and its place used again
    total = sum(kept.values())
    del loss
    return total


def activation_bytes(
    model: nn.Module, compute_losses: Callable[[Batch], Batch], samples: Callable[[int], Iterator[Batch]]
) -> dict[str, tuple[float, float]]:
    """
    Returns what a forward pass keeps, for float32 and bf16: bytes of a sample, and bytes whatever the batch. They are
    counted with two and with four samples, on a model in training mode (see `count_kept_bytes`).
    """
    counted = {}
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        two, four = (count_kept_bytes(compute_losses, next(samples(size)), model, dtype) for size in (2, 4))
        counted[name] = ((four - two) / 2, max(2 * two - four, 0))
    return counted


def try_updates(
    accelerator: Accelerator,
    model: nn.Module,
    compute_losses: Callable[[Batch], Batch],
    samples: Callable[[int], Iterator[Batch]],
    batch_size: int,
) -> Trial:
    """
    Makes updates by AdamW with a learning rate of 0: on a GPU with the batch of the run, on a CPU with as many samples
    as a few seconds allow.

    Args:
        model, compute_losses: prepared by `accelerator`, in training mode.
        samples: batch size -> batches on the device.
        batch_size: of the run, in one process.
    """
    device = accelerator.device
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"CPU, threads: {torch.get_num_threads()}"
    optimizer = torch.optim.AdamW(parameter_groups(accelerator.unwrap_model(model), 0.0), lr=0.0, fused=True)

    def update(batch: Batch) -> tuple[float, float]:
        """Returns the seconds of both passes, and of the optimizer."""
        times = [time.perf_counter()]
        accelerator.backward(compute_losses(batch)["loss"])
        times.append(now(device))
        optimizer.step()
        optimizer.zero_grad()
        times.append(now(device))
        return times[1] - times[0], times[2] - times[1]

    try:
        size = batch_size if is_gpu else min(2, batch_size)
        update(next(samples(size)))  # the first one allocates
        seconds = sum(update(next(samples(size))))
        if not is_gpu:
            size = max(min(int(MAX_SECONDS / TIMED_UPDATES / seconds * size), batch_size), size)
        times = [update(batch) for batch in itertools.islice(samples(size), TIMED_UPDATES)]
    except torch.OutOfMemoryError:
        return Trial(name, batch_size, None, peak_bytes=torch.cuda.max_memory_allocated(device), out_of_memory=True)
    peak = torch.cuda.max_memory_allocated(device) if is_gpu else None
    passes, steps = (min(column) for column in zip(*times, strict=True))
    return Trial(name, size, passes / size, steps, peak)


def now(device: torch.device) -> float:
    """The time when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
