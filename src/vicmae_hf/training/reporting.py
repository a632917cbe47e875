"""Reports on a run: log of metrics, progress bar, results and settings."""

import builtins
import importlib
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from ..command_line import one_line
from ..files import read_json, write_json_lines, writing
from .arguments import TrainingArguments
from .devices.peaks import peak_flops, peak_memory_mib
from .optimization import Schedule


logger = get_logger(__name__)

RESULTS_FILE = "all_results.json"
# Between two lines of progress where there is no terminal: of a training, and of work that takes minutes.
PROGRESS_SECONDS, WORK_SECONDS = 60.0, 10.0

# Trackers -> how they call the name of a run. (TensorBoard has none: it shows the run's folder.)
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Reads the objects of a file of JSON lines; none if there is no such file. A line that is not an object is passed
    over with a warning: a process that was killed, or a full disk, leaves half a line.
    """
    path, entries = Path(path), []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
        else:
            logger.warning("%s: skipped a line that is no JSON object: %.80r", path, line)
    return entries


def read_metrics(output_dir: str | os.PathLike) -> list[dict[str, float]]:
    """Reads the lines of `metrics.jsonl`, oldest first; none if there is no log yet."""
    return read_json_lines(Path(output_dir) / "metrics.jsonl")


def read_results(output_dir: str | os.PathLike) -> dict[str, Any]:
    """Reads the results that a finished run wrote into `all_results.json`."""
    return read_json(Path(output_dir) / RESULTS_FILE)


def say_unreadable(count: int, record: str | os.PathLike) -> str:
    """Says how many files could not be read and, if there are any, where they are listed."""
    return f"{count} unreadable file{'s' * (count != 1)}" + (f" (listed in {record})" if count else "")


def settings_of_run(arguments: TrainingArguments, config: PreTrainedConfig, schedule: Schedule) -> dict[str, Any]:
    """Collects every setting of a run for `arguments.json`, also those that follow from others."""
    return {
        **asdict(arguments),
        "model": config.to_dict(),
        "num_processes": schedule.num_processes,
        "total_batch_size": schedule.total_batch_size,
        "learning_rate": schedule.peak_learning_rate,
        "num_steps": schedule.num_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
    }


def has_screen() -> bool:
    """Whether somebody is watching: in a terminal or a notebook."""
    return sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__")


class Progress:
    """
    Shows how far work has come: by a bar, or without a screen by a line on stderr now and then, as in training.

    Args:
        what: is done, "extracting features".
        total: how many units of it there are; unit: their name, "files".
        is_shown: whether this process shows it; the main one does.
    """

    def __init__(self, what: str, total: int, unit: str, is_shown: bool = True):
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.has_lines = is_shown and not has_screen()
        self.started = self.last_line = time.monotonic()
        is_silent = not is_shown or self.has_lines
        self.bar = tqdm(desc=what, total=total, unit=f" {unit}", disable=is_silent, leave=False, dynamic_ncols=True)

    def advance(self, count: int = 1) -> None:
        """Notes that `count` more are done; beyond the total none are."""
        count = min(count, self.total - self.done)
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.has_lines and now >= self.last_line + WORK_SECONDS:
            self.last_line = now
            left = tqdm.format_interval((now - self.started) * (self.total / self.done - 1)) if self.done else "?"
            print(f"{self.what}: {self.done} of {self.total} {self.unit}, {left} left", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()


class MetricsLog:
    """
    Writes lines to `metrics.jsonl`, to Accelerate's trackers and to a progress bar; without a terminal, to a line of
    progress every minute. Only the main process writes.

    Args:
        samples_name: name of the samples in `{samples_name}_per_second`.
        num_steps: updates of the run; start_step: those done before resuming. An interrupted run may have logged
            updates beyond its last checkpoint. They are made again, so their lines are dropped.
        flops_per_sample: that training needs; for the share of the device's peak that is used (`mfu`).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike,
        samples_name: str,
        num_steps: int,
        start_step: int = 0,
        flops_per_sample: float | None = None,
    ):
        self.accelerator = accelerator
        self.flops_per_sample = flops_per_sample
        self.peak_flops = peak_flops(accelerator.device)
        self.path = Path(output_dir) / "metrics.jsonl"
        self.samples_name = samples_name
        self.num_steps = num_steps
        self.start_step = start_step
        self.before = (0, 0.0, 0.0)  # samples, seconds and waiting at the last line, so that rates are current
        self.last_progress = time.monotonic()
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(output_dir) if line.get("step", math.inf) <= start_step]
            write_json_lines(self.path, kept)
        self.has_bar = accelerator.is_main_process and has_screen()
        self.progress = tqdm(total=num_steps, initial=start_step, disable=not self.has_bar, dynamic_ncols=True)

    def advance(self) -> None:
        """Moves the bar on by one update."""
        self.progress.update()

    def write(
        self,
        figures: dict[str, float],
        step: int,
        epoch: float,
        learning_rate: float,
        num_samples: int,
        elapsed_seconds: float,
        wait_seconds: float,
    ) -> None:
        """
        Writes a line with `figures`: losses and those of an evaluation. `num_samples`, `elapsed_seconds` and
        `wait_seconds` are counted since the start.
        """
        samples, seconds, waited = (
            now - before for now, before in zip((num_samples, elapsed_seconds, wait_seconds), self.before, strict=True)
        )
        self.before = (num_samples, elapsed_seconds, wait_seconds)
        rates = {
            f"{self.samples_name}_per_second": samples / seconds,
            "data_wait_share": waited / seconds,  # near 0: the device is busy; near 1: data is too slow
            **peak_memory_mib(self.accelerator.device),
        }
        if self.flops_per_sample and self.peak_flops:
            used = self.flops_per_sample * samples / seconds / self.accelerator.num_processes
            rates["mfu"] = used / self.peak_flops
        line = {"step": step, "epoch": round(epoch, 4), "learning_rate": learning_rate, **figures, **rates}
        if self.accelerator.is_main_process:
            # Opened for each line, so that a killed run has lost none.
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.show_progress(line, samples / seconds, elapsed_seconds / (step - self.start_step))
        self.track({name: value for name, value in line.items() if name != "step"}, step)

    def show_progress(self, line: dict[str, float], rate: float, seconds_per_step: float) -> None:
        shown = {
            "loss": f"{line['loss']:.4f}" if "loss" in line else "skipped",
            f"{self.samples_name}/s": f"{rate:.0f}",
            "waiting for data": f"{line['data_wait_share']:.0%}",
        }
        step = line["step"]
        if self.has_bar:
            self.progress.set_postfix(shown)
        elif self.accelerator.is_main_process and (
            time.monotonic() >= self.last_progress + PROGRESS_SECONDS or step == self.num_steps
        ):
            self.last_progress = time.monotonic()
            left = tqdm.format_interval((self.num_steps - step) * seconds_per_step)
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {step} of {self.num_steps}, {values}, {left} left", file=sys.stderr, flush=True)

    def track(self, values: dict[str, float], step: int) -> None:
        """Gives a line to the trackers. One that fails gets no more lines; the run goes on."""
        for tracker in list(self.accelerator.trackers):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # of any kind: trackers are programs of others
                warn_of_tracker(self.accelerator, tracker, error)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.progress.close()


def start_trackers(accelerator: Accelerator, arguments: TrainingArguments, settings: dict[str, Any]) -> None:
    """
    Starts the trackers with the settings of a run, also those that follow from its data. If one cannot start, the run
    goes on without any.
    """
    # Trackers take plain values only, no lists.
    plain = {name: value for name, value in settings.items() if isinstance(value, (int, float, str))}
    name = arguments.run_name or Path(arguments.output_dir).resolve().name
    names = {tracker: {argument: name} for tracker, argument in RUN_NAMES.items()}
    try:
        accelerator.init_trackers(arguments.project, config=plain, init_kwargs=names)
    except Exception as error:  # of any kind: trackers are programs of others
        accelerator.trackers.clear()
        logger.warning("The trackers cannot start; the run goes on without them (%s).", one_line(error))


def track_pictures(accelerator: Accelerator, output_dir: str | os.PathLike) -> None:
    """Gives pictures and films of a run, `plots/*.png` and `plots/*.webp`, to the trackers that show such."""
    if not accelerator.trackers:
        return
    from ..reports.film import as_gif  # imported here, because few runs have trackers

    pictures, films = (
        {f"plots/{path.stem}": path for path in sorted(Path(output_dir).glob(f"plots/*.{ending}"))}
        for ending in ("png", "webp")
    )
    step = next(reversed(read_metrics(output_dir)), {}).get("step")
    with tempfile.TemporaryDirectory() as folder:
        gifs = {name: as_gif(path, Path(folder, f"{path.stem}.gif")) for name, path in films.items()}
        for tracker in list(accelerator.trackers):
            try:
                log_pictures(tracker, pictures, gifs, step)
            except Exception as error:  # of any kind: trackers are programs of others
                warn_of_tracker(accelerator, tracker, error)


def log_pictures(tracker: GeneralTracker, pictures: dict[str, Path], gifs: dict[str, Path], step: int | None) -> None:
    """Logs PNG and animated GIF files by their names."""
    if tracker.name == "tensorboard":
        arrays = {name: np.asarray(Image.open(path).convert("RGB"))[None] for name, path in pictures.items()}
        tracker.log_images(arrays, step=step, dataformats="NHWC")
        # As `SummaryWriter.add_video` does, which would want the package moviepy.
        protocol = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        for name, path in gifs.items():
            (width, height), content = Image.open(path).size, path.read_bytes()
            image = protocol.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            tracker.writer.file_writer.add_summary(protocol(value=[protocol.Value(tag=name, image=image)]), step)
    elif tracker.name in ("wandb", "swanlab"):
        tracker.log_images({name: [Image.open(path)] for name, path in pictures.items()}, step=step)
        if tracker.name == "wandb":
            wandb = importlib.import_module("wandb")
            tracker.log({name: wandb.Video(str(path)) for name, path in gifs.items()}, step=step)
    elif tracker.name == "trackio":  # Accelerate's class for it has no `log_images`
        trackio = importlib.import_module("trackio")
        logged = {name: trackio.Image(str(path)) for name, path in pictures.items()}
        tracker.log(logged | {name: trackio.Video(str(path)) for name, path in gifs.items()}, step=step)


def finish_trackers(accelerator: Accelerator) -> None:
    """Ends the trackers, which may still have lines to send."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.finish()
        except Exception as error:  # of any kind: trackers are programs of others
            warn_of_tracker(accelerator, tracker, error)
    accelerator.trackers.clear()  # Accelerate would end them once more


def warn_of_tracker(accelerator: Accelerator, tracker: GeneralTracker, error: Exception) -> None:
    """Warns that a tracker failed, and leaves it out from here on."""
    accelerator.trackers.remove(tracker)
    reason = str(error).strip().partition("\n")[0]
    logger.warning("The tracker %s failed and gets no more lines; the run goes on (%s).", tracker.name, reason)
