"""The training loop, of pretraining and finetuning alike."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from .checkpointing import Checkpoints
from .optimization import learning_rate_factor, set_learning_rate
from .reporting import MetricsLog


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN; the message says at which step."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """
    Lengths of a run in updates, and its learning rate.

    Args:
        num_steps: updates of the whole run; start_step: those done before resuming.
        steps_per_epoch: updates of an epoch.
        num_warmup_steps: updates of linear warmup.
        peak_learning_rate: the learning rate after warmup.
        gradient_accumulation_steps: batches of an update.
    """

    num_steps: int
    steps_per_epoch: int
    num_warmup_steps: float
    peak_learning_rate: float
    gradient_accumulation_steps: int
    start_step: int = 0

    def learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(step, self.num_warmup_steps, self.num_steps)


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, torch.Tensor]],
    compute_losses: Callable[[dict[str, torch.Tensor], float], dict[str, torch.Tensor]],
    schedule: Schedule,
    metrics_log: MetricsLog,
    checkpoints: Checkpoints,
    *,
    seed: int,
    logging_steps: int,
    checkpointing_steps: int,
    evaluate: Callable[[int], dict[str, float]] = lambda step: {},
) -> dict[str, float]:
    """
    Runs the updates from `schedule.start_step` to `schedule.num_steps`.

    Random numbers of a batch depend on (seed, batch, process) alone, so that a resumed run draws the same.

    Args:
        model, optimizer, batches: prepared by `accelerator`.
        compute_losses: (batch, epoch) -> named scalar tensors, of which "loss" is minimised.
        logging_steps, checkpointing_steps: updates between lines of the log, and between checkpoints (0: none).
        evaluate: called after every update with their number, before the checkpoint; the figures that it returns, if
            any, are written to the log.

    Returns:
        `train_seconds`, `samples_per_second`, `data_wait_share` of the updates run here, without what `evaluate`
        took, and the losses of the last.

    Raises:
        NonFiniteLossError: before an update whose loss is infinite or NaN in any process.
    """
    model.train()
    device = accelerator.device
    accumulation = schedule.gradient_accumulation_steps
    iterator = iter(batches)
    started = time.perf_counter()
    wait_seconds = evaluation_seconds = num_samples = 0
    losses = {}
    for step in range(schedule.start_step, schedule.num_steps):
        epoch = step / schedule.steps_per_epoch
        factor = schedule.learning_rate_factor(step)
        learning_rate = schedule.peak_learning_rate * factor
        set_learning_rate(optimizer, schedule.peak_learning_rate, factor)
        step_losses: dict[str, torch.Tensor] = {}
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            waiting = time.perf_counter()
            batch = next(iterator)
            wait_seconds += time.perf_counter() - waiting
            num_samples += len(next(iter(batch.values()))) * accelerator.num_processes
            seed_batch(seed, micro_step, accelerator.process_index)
            with accelerator.accumulate(model):
                batch_losses = compute_losses(batch, epoch)
                accelerator.backward(batch_losses["loss"])
                for name, value in batch_losses.items():
                    step_losses[name] = step_losses.get(name, 0) + value.detach().float() / accumulation
                if accelerator.sync_gradients:
                    losses = mean_over_processes(accelerator, step_losses)
                    check_finite(losses, step + 1, checkpoints)
                optimizer.step()
                optimizer.zero_grad()
        elapsed = time.perf_counter() - started - evaluation_seconds
        done = step + 1
        is_last = done == schedule.num_steps
        evaluating = time.perf_counter()
        figures = evaluate(done)
        evaluation_seconds += time.perf_counter() - evaluating
        metrics_log.update(
            losses,
            step=done,
            epoch=done / schedule.steps_per_epoch,
            learning_rate=learning_rate,
            num_samples=num_samples,
            elapsed_seconds=elapsed,
            wait_seconds=wait_seconds,
            figures=figures,
            write=done % logging_steps == 0 or is_last or bool(figures),
        )
        if checkpointing_steps and (done % checkpointing_steps == 0 or is_last):
            checkpoints.save(done)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    train_seconds = time.perf_counter() - started - evaluation_seconds
    return {
        **losses,
        "train_seconds": train_seconds,
        "samples_per_second": num_samples / train_seconds,
        "data_wait_share": wait_seconds / train_seconds,
    }


def seed_batch(seed: int, micro_step: int, process_index: int) -> None:
    """Seeds masks, dropout and stochastic depth of one batch of one process."""
    # Odd multipliers below 2**64 spread neighbouring values over the seeds.
    mixed = seed * 0x9E3779B97F4A7C15 + micro_step * 0xBF58476D1CE4E5B9 + process_index * 0x94D049BB133111EB
    torch.manual_seed(mixed % 2**63)


def mean_over_processes(accelerator: Accelerator, losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Named scalars averaged over the processes, as numbers."""
    means = accelerator.reduce(torch.stack(list(losses.values())), reduction="mean")
    return dict(zip(losses, means.tolist(), strict=True))


def check_finite(losses: dict[str, float], step: int, checkpoints: Checkpoints) -> None:
    if all(abs(value) < float("inf") for value in losses.values()):
        return
    last = checkpoints.find("latest")
    values = ", ".join(f"{name} {value}" for name, value in losses.items())
    raise NonFiniteLossError(
        f"The loss is not finite at step {step} ({values}); that update was not made. Last checkpoint: "
        f"{last or 'none'}. Try a lower --base_learning_rate, a longer warmup, or bf16 in place of fp16."
    )
