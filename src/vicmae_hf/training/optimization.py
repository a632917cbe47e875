"""Decides what an update changes and by how much: parameter groups, length of a run, learning rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from torch import nn

from ..data.loading.loader import EpochBatchSampler
from ..settings import ArgumentsError
from .arguments import TrainingArguments


logger = get_logger(__name__)


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """
    Groups trainable parameters: matrices with weight decay; vectors, tokens, positions and scalars without.

    Args:
        learning_rate_scale: name of a parameter -> its share of the learning rate. Each share has groups of its own.
            `set_learning_rate` multiplies by the group's `learning_rate_scale`.
    """
    # By shape and not by name: a list of names misses the next LayerNorm. Decay would pull scales and offsets to zero.
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Tokens (1, 1, D) and learned positions (1, t, D) are vectors.
            is_matrix = parameter.ndim > 1 and 1 not in (parameter.shape[0], parameter[0].numel())
            scale = learning_rate_scale(name)
            group = {"params": [], "weight_decay": weight_decay if is_matrix else 0.0, "learning_rate_scale": scale}
            groups.setdefault((scale, not is_matrix), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]  # sorted: a checkpoint knows groups by their place


def scaled_learning_rate(base_learning_rate: float, total_batch_size: int) -> float:
    """Scales linearly: base learning rate x total batch / 256 (supplement, section A)."""
    return base_learning_rate * total_batch_size / 256


def learning_rate_factor(step: int, num_warmup_steps: float, num_steps: int) -> float:
    """
    Returns the share of the peak learning rate at an update, counted from 0: linear warmup from 0, then half a cosine
    to 0 at `num_steps` (Table 1). It follows from the step alone, so a resumed run needs no state of it.
    """
    if step < num_warmup_steps:
        return step / num_warmup_steps
    progress = (step - num_warmup_steps) / max(num_steps - num_warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, factor: float) -> None:
    """Gives every group `peak * factor`, times its `learning_rate_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = peak * factor * group.get("learning_rate_scale", 1.0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """
    The lengths of a run in updates, and its learning rate.

    Args:
        num_steps: updates of the whole run; start_step: those done before resuming.
        steps_per_epoch: updates of an epoch.
        num_warmup_steps: updates of linear warmup.
        peak_learning_rate: the learning rate after warmup.
        gradient_accumulation_steps: batches of an update, in each process.
        total_batch_size: samples of an update, of all processes.
        num_processes: processes of the run.
    """

    num_steps: int
    steps_per_epoch: int
    num_warmup_steps: float
    peak_learning_rate: float
    gradient_accumulation_steps: int
    total_batch_size: int
    num_processes: int
    start_step: int = 0

    @property
    def is_done(self) -> bool:
        return self.start_step >= self.num_steps

    @property
    def batches_per_step(self) -> int:
        """Batches of an update, of all processes together."""
        return self.gradient_accumulation_steps * self.num_processes

    def set_learning_rate(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Sets the learning rate of an update, counted from 0, and returns it."""
        factor = learning_rate_factor(step, self.num_warmup_steps, self.num_steps)
        set_learning_rate(optimizer, self.peak_learning_rate, factor)
        return self.peak_learning_rate * factor


def plan_run(arguments: TrainingArguments, num_processes: int, num_samples: int) -> Schedule:
    """
    Plans a run with `num_samples` samples in an epoch.

    Raises:
        ArgumentsError: if the warmup is as long as the run or longer. A run cut short by `max_train_steps` only warns.
    """
    batches_per_step = arguments.gradient_accumulation_steps * num_processes
    batch_size = arguments.per_device_train_batch_size * batches_per_step
    if num_samples < batch_size:
        logger.warning(
            "%d samples are fewer than the total batch of %d: an epoch repeats them to fill one.",
            num_samples,
            batch_size,
        )
    steps_per_epoch = max(num_samples // batch_size, 1)
    num_steps = arguments.max_train_steps or arguments.num_train_epochs * steps_per_epoch
    if arguments.warmup_epochs * steps_per_epoch >= num_steps:
        report_unused(
            arguments,
            f"--warmup_epochs {arguments.warmup_epochs:g} is no shorter than the run of "
            f"{num_steps / steps_per_epoch:g} epochs: the learning rate would never reach its peak. Warm up for fewer "
            "epochs, or train longer.",
        )
    return Schedule(
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        num_warmup_steps=arguments.warmup_epochs * steps_per_epoch,  # may be a fraction
        peak_learning_rate=scaled_learning_rate(arguments.base_learning_rate, batch_size),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        total_batch_size=batch_size,
        num_processes=num_processes,
    )


def report_unused(arguments: TrainingArguments, message: str) -> None:
    """Raises an ArgumentsError, or only warns if `--max_train_steps` cuts the run short, as in a trial."""
    if arguments.max_train_steps is None:
        raise ArgumentsError(message)
    logger.warning(message)


def order_batches(
    arguments: TrainingArguments,
    schedule: Schedule,
    lengths: Sequence[int],
    num_samples: int,
    weights: Sequence[float] | None = None,
    num_batches: int = 0,
) -> EpochBatchSampler:
    """
    Orders the batches still to come in a run. `lengths`, `num_samples`, `weights` as in `EpochBatchSampler`;
    `num_batches` of each process are left out.
    """
    return EpochBatchSampler(
        lengths,
        num_samples,
        arguments.per_device_train_batch_size,
        num_epochs=math.ceil(schedule.num_steps / schedule.steps_per_epoch),  # the last one may be cut short
        batch_multiple=schedule.batches_per_step,
        weights=weights,
        start_batch=schedule.start_step * schedule.batches_per_step + num_batches * schedule.num_processes,
        seed=arguments.seed,
    )
