"""How long a run is, and in which order it sees its samples."""

import math
from collections.abc import Sequence

from accelerate.logging import get_logger

from ..data.loading.loader import EpochBatchSampler
from .arguments import TrainingArguments
from .loop import Schedule
from .optimization import scaled_learning_rate


logger = get_logger(__name__)


def total_batch_size(arguments: TrainingArguments, num_processes: int) -> int:
    """Samples of an update."""
    return arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * num_processes


def plan_run(
    arguments: TrainingArguments,
    num_processes: int,
    lengths: Sequence[int],
    num_samples: int,
    weights: Sequence[float] | None = None,
    start_step: int = 0,
) -> tuple[Schedule, EpochBatchSampler]:
    """
    The schedule of a run, and its batches from `start_step` on.

    Args:
        lengths, num_samples, weights: see `EpochBatchSampler`.
    """
    batch_multiple = num_processes * arguments.gradient_accumulation_steps
    batch_size = total_batch_size(arguments, num_processes)
    if num_samples < batch_size:
        logger.warning(
            "%d samples are fewer than the total batch of %d: an epoch repeats them to fill one.",
            num_samples,
            batch_size,
        )
    steps_per_epoch = max(num_samples // batch_size, 1)
    num_steps = arguments.max_train_steps or arguments.num_train_epochs * steps_per_epoch
    batch_sampler = EpochBatchSampler(
        lengths,
        num_samples,
        arguments.per_device_train_batch_size,
        num_epochs=math.ceil(num_steps / steps_per_epoch),
        batch_multiple=batch_multiple,
        weights=weights,
        start_batch=start_step * batch_multiple,
        seed=arguments.seed,
    )
    schedule = Schedule(
        num_steps=num_steps,
        start_step=start_step,
        steps_per_epoch=steps_per_epoch,
        num_warmup_steps=arguments.warmup_epochs * steps_per_epoch,
        peak_learning_rate=scaled_learning_rate(arguments.base_learning_rate, batch_size),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
    )
    return schedule, batch_sampler
