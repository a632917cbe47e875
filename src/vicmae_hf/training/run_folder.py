"""The output folder of a training: what a run keeps of itself, and what it goes on from."""

import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedModel

from ..errors import InputError, NonFiniteError
from ..files import write_json, writing
from .arguments import TrainingArguments
from .checkpointing import CheckpointPart, Checkpoints, save_finite, sync_to_disk
from .devices.sharding import gather_model
from .optimization import Schedule
from .reporting import RESULTS_FILE, MetricsLog, finish_trackers, read_metrics, settings_of_run, start_trackers
from .resuming import CheckpointError, check_same_in_all_processes, fingerprint


logger = get_logger(__name__)

BAD_UPDATE_FILE = "non_finite.json"
STOPPED_FILE = "stopped.json"


class RunFolder:
    """
    The folder `arguments.output_dir`: settings, log, checkpoints, model.

    Args:
        accelerator: prepares model and optimizer before `begin`.
        arguments: of the run.
        samples_name: name of the samples in the log, for rates.
        parts: what checkpoints hold beside model and optimizer.
        flops_per_sample: that training needs, if it is known (see `MetricsLog`).

    Attributes:
        settings: all settings of the run, from `begin` on.
        log: the open log, inside of `logging`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        arguments: TrainingArguments,
        samples_name: str,
        parts: Sequence[CheckpointPart] = (),
        flops_per_sample: float | None = None,
    ):
        self.accelerator = accelerator
        self.arguments = arguments
        self.samples_name = samples_name
        self.parts = parts
        self.flops_per_sample = flops_per_sample
        self.path = Path(arguments.output_dir)
        self.settings: dict[str, Any] = {}
        self.log: MetricsLog | None = None

    def begin(self, schedule: Schedule, model: PreTrainedModel, data: dict[str, Iterable[str]]) -> Schedule:
        """
        Begins the run, or goes on with it. Deletes the checkpoints of a run that this one replaces.

        Args:
            schedule: of the whole run.
            model: what is trained.
            data: names of files and classes, in order. A run with others is another run.

        Returns:
            The schedule of the updates still to come.

        Raises:
            CheckpointError: if the checkpoint to go on from is damaged, or of another run, or the disk has no room for
                one.
            InputError: if the processes have found different data.
        """
        arguments, is_resumed = self.arguments, bool(self.arguments.resume_from_checkpoint)
        if not is_resumed:  # before an older run is deleted
            self._check_space(model)
        self.settings = settings_of_run(arguments, model.config, schedule)
        self.settings["data"] = {name: fingerprint(names) for name, names in data.items()}
        check_same_in_all_processes(self.settings["data"])
        self.checkpoints = Checkpoints(
            self.accelerator, self.path, arguments.save_total_limit, self.settings, self.parts
        )
        schedule = replace(schedule, start_step=self.checkpoints.start(arguments.resume_from_checkpoint))
        if is_resumed and not schedule.is_done:
            self._check_space(model)
        return schedule

    def is_finished(self, schedule: Schedule) -> bool:
        """Whether a resumed run has made its last update and written its results. If so, says so."""
        # Results are written last: without them, a run killed after its last update still has to write its report.
        if not schedule.is_done or not (self.path / RESULTS_FILE).exists():
            return False
        logger.info("Nothing to do: %s is at step %d of %d.", self.path, schedule.start_step, schedule.num_steps)
        return True

    def write_settings(self, processors: Iterable[Any]) -> None:
        """Writes `arguments.json` and the model's processors. Only the main process does."""
        if self.accelerator.is_main_process:
            # Of a shorter run that goes on, of one that was stopped, of one that failed.
            for name in (RESULTS_FILE, STOPPED_FILE, BAD_UPDATE_FILE):
                (self.path / name).unlink(missing_ok=True)
            # Now and not at the end: whoever finds an interrupted run can read what it was.
            write_json(self.path / "arguments.json", self.settings)
            for processor in processors:
                processor.save_pretrained(self.path)
            if (rate := self.settings.get("source_frames_per_second")) is not None:
                logger.warning(
                    "The saved processors do not keep --source_frames_per_second %g; give it to other commands, too.",
                    rate,
                )

    @contextmanager
    def logging(self, schedule: Schedule) -> Iterator[None]:
        """
        Starts the trackers and opens the log. Keeps what is known of an update that is not finite, and adds to the
        message what to do.
        """
        if self.arguments.report_to:
            start_trackers(self.accelerator, self.arguments, self.settings)
        with MetricsLog(
            self.accelerator,
            self.path,
            self.samples_name,
            schedule.num_steps,
            schedule.start_step,
            self.flops_per_sample,
        ) as self.log:
            try:
                yield
            except NonFiniteError as error:
                raise self._explain(error) from error

    def save_checkpoint(self, step: int) -> None:
        """Writes the checkpoint after `step` updates. All processes call it."""
        self.checkpoints.save(step)

    def save_model(self, model: PreTrainedModel) -> None:
        """Saves the trained model; all processes call it. Raises a NonFiniteError if a weight is infinite or NaN."""
        whole = gather_model(self.accelerator, model)
        if self.accelerator.is_main_process:
            with writing(self.path):
                save_finite(whole, self.path)
                sync_to_disk(self.path.glob("*.safetensors"))  # before the results, which say that it is there

    def note_stop(self, number: signal.Signals, step: int) -> None:
        """Leaves a mark for job scripts, which do not see a script's exit status behind a launcher."""
        if self.accelerator.is_main_process:
            write_json(self.path / STOPPED_FILE, {"signal": number.name, "step": step})
        finish_trackers(self.accelerator)

    def summarize(self, num_samples: int, seconds: float, wait_seconds: float) -> dict[str, float]:
        """
        Returns the losses of the last log line, and the rates of the updates that this process made. If a run was
        killed after its last update, none are left to make; the rates are then those of the last line.
        """
        last = next(reversed(read_metrics(self.path)), {})
        results = {name: last[name] for name in last if name in ("loss", "gradient_norm") or name.endswith("_loss")}
        if num_samples:
            rate, wait_share = num_samples / seconds, wait_seconds / seconds
        else:
            rate, wait_share = last.get(f"{self.samples_name}_per_second", 0.0), last.get("data_wait_share", 0.0)
        return {**results, "train_seconds": seconds, "samples_per_second": rate, "data_wait_share": wait_share}

    def _check_space(self, model: PreTrainedModel) -> None:
        """Raises a CheckpointError if the disk is too full for one checkpoint: better now than at the first one."""
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        # The optimizer keeps at most two numbers for each weight that it trains.
        needed = model.get_memory_footprint() + (2 * trained if self.arguments.checkpointing_steps else 0)
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise CheckpointError(
                f"{self.path}: the disk has {free >> 20} MiB left, and the model with its checkpoint needs about "
                f"{needed >> 20}. Make room, or choose another --output_dir."
            )

    def _explain(self, error: NonFiniteError) -> NonFiniteError:
        message = f"{error}; {self.checkpoints.describe_newest()}."
        if error.step is not None:
            path = self.path / BAD_UPDATE_FILE
            if self.accelerator.scaler is None:
                message += " Neither that update nor a later one was made."
            message += f" Its samples are listed in {path}."
            if self.accelerator.is_main_process:
                losses = {name: str(value) for name, value in error.losses.items()}  # JSON has no NaN
                kept = {"step": error.step, "losses": losses, "seed": self.arguments.seed, "samples": error.samples}
                try:
                    write_json(path, kept)
                except InputError as unwritten:
                    logger.warning("%s", unwritten)
            self.accelerator.wait_for_everyone()  # the first process to end lets the launcher end the others
        message += (
            " Try a lower --base_learning_rate, a longer warmup, or bf16 in place of fp16: in a new run, from the "
            "weights of an earlier checkpoint (--model_name_or_path), as a run cannot be resumed with other settings."
        )
        return NonFiniteError(message, error.step, error.losses)
