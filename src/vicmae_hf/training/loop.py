"""The training loop, the same for pretraining and finetuning."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..errors import NonFiniteError
from .arguments import TrainingArguments
from .optimization import Schedule
from .stopping import RunStopped, StopRequest


if TYPE_CHECKING:  # only for an annotation: the loop is read without what becomes of its figures
    from .run_folder import RunFolder

# A batch on the device and the epoch, which may be a fraction -> named scalar tensors. "loss" is minimised.
ComputeLosses = Callable[[dict[str, torch.Tensor], float], dict[str, torch.Tensor]]


class Stopwatch:
    """
    Measures how long a training on `device` takes, and what for.

    Attributes:
        num_samples: samples of all processes so far.
        evaluating: seconds spent evaluating.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.started = time.perf_counter()
        self.num_samples = 0
        self.evaluating = self.waited = 0.0
        self.waits: list[tuple[Any, Any]] = []  # beginning and end

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """
        Counts the time of its block as waiting for data; on a GPU what the GPU stood idle meanwhile. The program runs
        ahead of it, and may wait for the next batch while the GPU still computes the last.
        """
        before = self.mark()
        yield
        self.waits.append((before, self.mark()))

    def mark(self) -> Any:
        """The time; on a GPU an event, which happens there when all is done that was asked for before."""
        return torch.cuda.current_stream().record_event(torch.cuda.Event(True)) if self.on_gpu else time.perf_counter()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Counts the time of its block as evaluating."""
        before = time.perf_counter()
        yield
        self.evaluating += time.perf_counter() - before

    @property
    def waiting(self) -> float:
        """Seconds spent waiting for data so far. All that was computed must have been waited for."""
        for before, after in self.waits:
            self.waited += before.elapsed_time(after) / 1000 if self.on_gpu else after - before
        self.waits = []
        return self.waited

    @property
    def training(self) -> float:
        """Seconds since the start, without the time of evaluations."""
        return time.perf_counter() - self.started - self.evaluating


class Losses:
    """
    Sums up the losses of updates on the device, and finds there whether an update may be made. Nothing but `read`
    waits for the device.

    An update whose loss or gradient is not finite would make every weight NaN. Without a gradient scaler it is the
    last one: neither it nor a later one is made, so the weights stay those before it.

    Args:
        device: of the losses.
        max_skipped: how many such updates in a row are passed over. A gradient scaler (fp16) expects some, because it
            finds the largest scale without overflow by trying.
    """

    def __init__(self, device: torch.device, max_skipped: int = 0):
        self.max_skipped = max_skipped
        self.totals: dict[str, torch.Tensor] = {}  # sum and number of updates since the last `read`, by name
        self.in_a_row = torch.zeros((), device=device)
        self.is_over = torch.zeros((), device=device, dtype=torch.bool)
        self.first_step = torch.zeros((), device=device)
        self.first_values: dict[str, torch.Tensor] = {}

    def add(self, values: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """
        Takes the losses and the gradient norm of an update, counted from 1. Returns 1.0 if it must not be made, else
        0.0, as the optimizers of torch take it.
        """
        is_bad = ~torch.stack(list(values.values())).isfinite().all()
        self.in_a_row = torch.where(is_bad, self.in_a_row + 1, 0)
        is_first = (self.in_a_row == 1) & ~self.is_over
        self.is_over = self.is_over | (self.in_a_row > self.max_skipped)
        self.first_step = torch.where(is_first, step, self.first_step)
        for name, value in values.items():
            self.first_values[name] = torch.where(is_first, value, self.first_values.get(name, value))
            counted = torch.stack([torch.where(is_bad, 0, value), (~is_bad).float()])
            self.totals[name] = self.totals.get(name, 0) + counted
        return (is_bad | self.is_over).float()

    def read(self) -> dict[str, float]:
        """
        Returns the means since the last call, without updates that were passed over.

        Raises:
            NonFiniteError: if no more updates are made. It has the step and losses of the first bad one.
        """
        # In one piece, because every transfer makes the program wait for the device.
        state = [self.is_over.float(), self.first_step, *self.first_values.values(), *self.totals.values()]
        is_over, step, *numbers = torch.cat([tensor.reshape(-1) for tensor in state]).tolist()
        values = dict(zip(self.first_values, numbers, strict=False))
        if is_over:
            named = ", ".join(f"{name} {value}" for name, value in values.items())
            raise NonFiniteError(f"Loss or gradient is not finite at step {step:.0f} ({named})", int(step), values)
        totals = zip(self.totals, numbers[len(values) :: 2], numbers[len(values) + 1 :: 2], strict=True)
        means = {name: total / count for name, total, count in totals if count}
        self.totals = {}
        return means


class Updates:
    """
    Makes the updates of a run.

    Args:
        model, optimizer, batches: prepared by `accelerator`. The optimizer is a fused one: it passes over an update
            on the device, without asking the program. Batches may have the names of their samples as `"name"`.
        compute_losses: see `ComputeLosses`.
        schedule, arguments: of the run.

    Attributes:
        watch: measures the time, and counts the samples.
        losses: of the updates since the last log line.
        names: their samples, by update, of this process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[dict[str, torch.Tensor]],
        compute_losses: ComputeLosses,
        schedule: Schedule,
        arguments: TrainingArguments,
    ):
        if not optimizer.optimizer.defaults.get("fused"):
            raise ValueError(
                "The optimizer must be a fused one (`fused=True`): others would make updates that are not finite."
            )
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.batches = iter(batches)
        self.compute_losses = compute_losses
        self.schedule = schedule
        self.seed = arguments.seed
        self.watch = Stopwatch(accelerator.device)
        has_scaler = accelerator.scaler is not None
        self.losses = Losses(accelerator.device, arguments.max_skipped_updates if has_scaler else 0)
        self.names: dict[int, list[str]] = {}

    def make(self, step: int) -> None:
        """Makes the update after `step` others."""
        accelerator, accumulation = self.accelerator, self.schedule.gradient_accumulation_steps
        sums: dict[str, torch.Tensor] = {}
        for micro_step in range(step * accumulation, (step + 1) * accumulation):
            with self.watch.waiting_for_data():
                batch = next(self.batches)
            self.watch.num_samples += len(next(iter(batch.values()))) * accelerator.num_processes
            self.names.setdefault(step + 1, []).extend(batch.get("name", []))
            seed_batch(self.seed, micro_step, accelerator.process_index)
            # For all batches of an update but the last, processes exchange no gradients and `optimizer.step` does
            # nothing.
            with accelerator.accumulate(self.model):
                batch_losses = self.compute_losses(batch, step / self.schedule.steps_per_epoch)
                accelerator.backward(batch_losses["loss"])
                for name, value in batch_losses.items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / accumulation
                if accelerator.sync_gradients:
                    values = mean_over_processes(accelerator, sums | {"gradient_norm": gradient_norm(self.model)})
                    self.hold_if_bad(self.losses.add(values, step + 1))
                self.optimizer.step()
                self.optimizer.zero_grad()

    def hold_if_bad(self, is_bad: torch.Tensor) -> None:
        """Tells the optimizer whether to pass over this update. A gradient scaler finds and tells it by itself."""
        if self.accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = is_bad  # `.optimizer`: torch's own, inside Accelerate's

    def read_losses(self) -> dict[str, float]:
        """
        Returns the mean losses since the last call.

        Raises:
            NonFiniteError: as `Losses.read`, with the names of the samples of all processes.
        """
        try:
            means = self.losses.read()
        except NonFiniteError as error:
            # All processes are here: what they read is the same everywhere.
            error.samples = gather_object(self.names.get(error.step, []))
            raise
        self.names = {}
        if self.accelerator.scaler is not None:
            means.pop("gradient_norm", None)  # it was that of gradients multiplied by a scale
        return means


def train(
    updates: Updates, run: "RunFolder", evaluate: Callable[[int], dict[str, float]] = lambda step: {}
) -> dict[str, float]:
    """
    Runs the updates of a schedule from its `start_step` to its `num_steps`.

    Args:
        updates: makes them.
        run: keeps log and checkpoints, and knows the arguments; its log is open.
        evaluate: called after every update with the number of updates made so far, before the checkpoint. The figures
            that it returns, if any, are written to the log.

    Returns:
        `train_seconds`, `samples_per_second`, `data_wait_share`, without the time of `evaluate`, and the losses of the
        last log line.

    Raises:
        NonFiniteError: at the first log line or checkpoint after a loss or gradient that is infinite or NaN.
        RunStopped: after a checkpoint, if the run was asked to stop.
    """
    arguments, schedule, watch = run.arguments, updates.schedule, updates.watch
    updates.model.train()
    with StopRequest(updates.accelerator) as stop:
        for step in range(schedule.start_step, schedule.num_steps):
            learning_rate = schedule.set_learning_rate(updates.optimizer, step)
            updates.make(step)
            run.log.advance()
            done, is_last, is_stopped = step + 1, step + 1 == schedule.num_steps, stop.is_agreed()
            # Also the end of a run that was stopped before: else "latest" would mean where it was stopped.
            must_save = is_stopped or (is_last and schedule.start_step > 0)
            must_save |= is_due(arguments.checkpointing_steps, done, is_last)
            # All that was computed is waited for here, so that the time below includes it.
            read = updates.read_losses() if must_save or is_due(arguments.logging_steps, done, is_last) else None
            seconds = watch.training
            with watch.evaluation():
                figures = evaluate(done)
            if read is not None or figures:
                losses = updates.read_losses() if read is None else read
                epoch = done / schedule.steps_per_epoch
                run.log.write(losses | figures, done, epoch, learning_rate, watch.num_samples, seconds, watch.waiting)
            if must_save:
                run.save_checkpoint(done)
            if is_stopped and not is_last:
                run.note_stop(stop.signal, done)
                raise RunStopped(f"Stopped by {stop.signal.name} after update {done} of {schedule.num_steps}")
    return run.summarize(watch.num_samples, watch.training, watch.waiting)


def is_due(interval: int, step: int, is_last: bool) -> bool:
    """Whether something is done after `step` updates that is done every `interval` (0: never) and at the end."""
    return interval > 0 and (is_last or step % interval == 0)


def seed_batch(seed: int, micro_step: int, process_index: int) -> None:
    """
    Seeds dropout, stochastic depth and mixing of one batch of one process; masks come with the samples. They depend on
    these three numbers alone, so a resumed run draws the same as the interrupted one would have drawn.
    """
    # Simply added up, batch 1 of seed 0 would have the numbers of batch 0 of seed 1. Odd multipliers below 2**64
    # spread neighbouring values over all seeds.
    mixed = seed * 0x9E3779B97F4A7C15 + micro_step * 0xBF58476D1CE4E5B9 + process_index * 0x94D049BB133111EB
    torch.manual_seed(mixed % 2**63)


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """
    Norm of all gradients together, of those that a gradient scaler has multiplied if there is one. A gradient may be
    infinite under a finite loss.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).float()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of parts in several processes (FSDP2)


def mean_over_processes(accelerator: Accelerator, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Averages named scalars over the processes, on the device."""
    # Stacked, because one exchange between processes is faster than one for each loss.
    means = accelerator.reduce(torch.stack(list(values.values())), reduction="mean")
    return dict(zip(values, means.unbind(), strict=True))
