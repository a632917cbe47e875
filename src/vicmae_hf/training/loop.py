"""The training loop, the same for pretraining and finetuning."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from .arguments import TrainingArguments
from .checkpointing import Checkpoints
from .optimization import Schedule
from .reporting import MetricsLog


# A batch on the device and the epoch, which may be a fraction -> named scalar tensors. "loss" is minimised.
ComputeLosses = Callable[[dict[str, torch.Tensor], float], dict[str, torch.Tensor]]


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient became infinite or NaN; the message says at which step."""


class Stopwatch:
    """
    Measures how long a training takes, and what for.

    Attributes:
        num_samples: samples of all processes so far.
        waiting, evaluating: seconds spent waiting for data, and evaluating.
    """

    def __init__(self):
        self.started = time.perf_counter()
        self.num_samples = 0
        self.waiting = self.evaluating = 0.0

    @contextmanager
    def spending(self, purpose: str) -> Iterator[None]:
        """Adds the time of its block to `purpose`, "waiting" or "evaluating"."""
        before = time.perf_counter()
        yield
        setattr(self, purpose, getattr(self, purpose) + time.perf_counter() - before)

    @property
    def training(self) -> float:
        """Seconds since the start, without the time of evaluations."""
        return time.perf_counter() - self.started - self.evaluating


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, torch.Tensor]],
    compute_losses: ComputeLosses,
    schedule: Schedule,
    log: MetricsLog,
    checkpoints: Checkpoints,
    arguments: TrainingArguments,
    evaluate: Callable[[int], dict[str, float]] = lambda step: {},
) -> dict[str, float]:
    """
    Runs the updates from `schedule.start_step` to `schedule.num_steps`.

    Args:
        model, optimizer, batches: prepared by `accelerator`.
        arguments: how often lines are logged and checkpoints written, and the seed.
        evaluate: called after every update with the number of updates made so far, before the checkpoint. The figures
            that it returns, if any, are written to the log.

    Returns:
        `train_seconds`, `samples_per_second`, `data_wait_share` of the updates run here, without the time of
        `evaluate`, and the losses of the last update.

    Raises:
        NonFiniteLossError: before an update whose loss or gradient is infinite or NaN in any process.
    """
    model.train()
    batches, watch, losses = iter(batches), Stopwatch(), {}
    for step in range(schedule.start_step, schedule.num_steps):
        learning_rate = schedule.set_learning_rate(optimizer, step)
        losses = run_update(
            accelerator, model, optimizer, batches, compute_losses, schedule, step, watch, checkpoints, arguments.seed
        )
        done, is_last, seconds = step + 1, step + 1 == schedule.num_steps, watch.training  # without the evaluation
        with watch.spending("evaluating"):
            figures = evaluate(done)
        log.update(
            losses,
            step=done,
            epoch=done / schedule.steps_per_epoch,
            learning_rate=learning_rate,
            num_samples=watch.num_samples,
            elapsed_seconds=seconds,
            wait_seconds=watch.waiting,
            figures=figures,
            write=done % arguments.logging_steps == 0 or is_last or bool(figures),
        )
        if arguments.checkpointing_steps and (done % arguments.checkpointing_steps == 0 or is_last):
            checkpoints.save(done)
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize(accelerator.device)  # else updates that still run would not be timed
    seconds = watch.training
    return {
        **losses,
        "train_seconds": seconds,
        "samples_per_second": watch.num_samples / seconds,
        "data_wait_share": watch.waiting / seconds,
    }


def run_update(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[dict[str, torch.Tensor]],
    compute_losses: ComputeLosses,
    schedule: Schedule,
    step: int,
    watch: Stopwatch,
    checkpoints: Checkpoints,
    seed: int,
) -> dict[str, float]:
    """Makes the update after `step` others. Returns its losses, averaged over its batches and the processes."""
    accumulation = schedule.gradient_accumulation_steps
    sums: dict[str, torch.Tensor] = {}
    for micro_step in range(step * accumulation, (step + 1) * accumulation):
        with watch.spending("waiting"):
            batch = next(batches)
        watch.num_samples += len(next(iter(batch.values()))) * accelerator.num_processes
        seed_batch(seed, micro_step, accelerator.process_index)
        # For all batches of an update but the last, processes exchange no gradients and `optimizer.step` does nothing.
        with accelerator.accumulate(model):
            batch_losses = compute_losses(batch, step / schedule.steps_per_epoch)
            accelerator.backward(batch_losses["loss"])
            for name, value in batch_losses.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / accumulation
            if accelerator.sync_gradients:
                losses = mean_over_processes(accelerator, sums | gradient_norm(accelerator, model))
                check_finite(losses, step + 1, checkpoints)  # before the step: the weights are still sound
                losses = {name: losses[name] for name in sums}
            optimizer.step()
            optimizer.zero_grad()
    return losses


def seed_batch(seed: int, micro_step: int, process_index: int) -> None:
    """
    Seeds masks, dropout and stochastic depth of one batch of one process. They depend on these three numbers alone, so
    a resumed run draws the same as the interrupted one would have drawn.
    """
    # Simply added up, batch 1 of seed 0 would have the numbers of batch 0 of seed 1. Odd multipliers below 2**64
    # spread neighbouring values over all seeds.
    mixed = seed * 0x9E3779B97F4A7C15 + micro_step * 0xBF58476D1CE4E5B9 + process_index * 0x94D049BB133111EB
    torch.manual_seed(mixed % 2**63)


def gradient_norm(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """
    `{"gradient_norm"}` of an update. A gradient may be infinite under a finite loss, and one such update makes every
    weight NaN. None with a gradient scaler (fp16): it expects overflows, and passes over the update by itself.
    """
    if accelerator.scaler is not None:
        return {}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return {"gradient_norm": torch.nn.utils.get_total_norm(gradients).float()}


def mean_over_processes(accelerator: Accelerator, losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Averages named scalars over the processes; returns numbers."""
    # Stacked, because one exchange between processes is faster than one for each loss.
    means = accelerator.reduce(torch.stack(list(losses.values())), reduction="mean")
    return dict(zip(losses, means.tolist(), strict=True))


def check_finite(losses: dict[str, float], step: int, checkpoints: Checkpoints) -> None:
    """Raises a NonFiniteLossError: in all processes at once, because the losses are averages over all of them."""
    if all(abs(value) < float("inf") for value in losses.values()):
        return
    last = checkpoints.find("latest")
    values = ", ".join(f"{name} {value}" for name, value in losses.items())
    raise NonFiniteLossError(
        f"Loss or gradient is not finite at step {step} ({values}); that update was not made. Last checkpoint: "
        f"{last or 'none'}. Try a lower --base_learning_rate, a longer warmup, or bf16 in place of fp16."
    )
