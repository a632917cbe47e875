"""Reports on a run: log of metrics, progress bar, results and settings."""

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from ..files import read_json_lines, write_json_lines
from .arguments import TrainingArguments
from .optimization import Schedule


logger = get_logger(__name__)

RESULTS_FILE = "all_results.json"


def read_metrics(output_dir: str | os.PathLike) -> list[dict[str, float]]:
    """Reads the lines of `metrics.jsonl`, oldest first; none if there is no log yet."""
    return read_json_lines(Path(output_dir) / "metrics.jsonl")


def is_finished(output_dir: str | os.PathLike, schedule: Schedule) -> bool:
    """Whether a resumed run has made its last update and written its results. If so, warns of it."""
    # Results are written last: without them, a run killed after its last update still has to write its report.
    if not schedule.is_done or not (Path(output_dir) / RESULTS_FILE).exists():
        return False
    logger.warning("Nothing to do: %s is at step %d of %d.", output_dir, schedule.start_step, schedule.num_steps)
    return True


def read_results(output_dir: str | os.PathLike) -> dict[str, Any]:
    """Reads the results that a finished run wrote into `all_results.json`."""
    return json.loads((Path(output_dir) / RESULTS_FILE).read_text())


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


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Reads this process's peak memory in MiB: resident, and allocated on the GPU."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if device.type == "cuda":
        peak["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


class MetricsLog:
    """
    Averages losses between log lines and writes them to `metrics.jsonl`, to Accelerate's trackers and to a progress
    bar. Only the main process writes.

    Args:
        samples_name: name of the samples in `{samples_name}_per_second`.
        num_steps: updates of the run; start_step: those done before resuming. An interrupted run may have logged
            updates beyond its last checkpoint. They are made again, so their lines are dropped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike,
        samples_name: str,
        num_steps: int,
        start_step: int = 0,
    ):
        self.accelerator = accelerator
        self.path = Path(output_dir) / "metrics.jsonl"
        self.samples_name = samples_name
        self.sums: dict[str, float] = {}
        self.num_updates = 0
        self.before = (0, 0.0, 0.0)  # samples, seconds and waiting at the last line, so that rates are of now
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(output_dir) if line["step"] <= start_step]
            write_json_lines(self.path, kept)
        self.progress = tqdm(
            total=num_steps, initial=start_step, disable=not accelerator.is_main_process, dynamic_ncols=True
        )

    def update(
        self,
        losses: dict[str, float],
        *,
        step: int,
        epoch: float,
        learning_rate: float,
        num_samples: int,
        elapsed_seconds: float,
        wait_seconds: float,
        figures: dict[str, float],
        write: bool,
    ) -> None:
        """
        Takes the losses of one update, and the counts since the start of this run. If `write`, writes a line, with
        `figures` of an evaluation.
        """
        self.progress.update()
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.num_updates += 1
        if not write:
            return
        samples, seconds, waited = (
            now - before for now, before in zip((num_samples, elapsed_seconds, wait_seconds), self.before, strict=True)
        )
        line = {
            "step": step,
            "epoch": round(epoch, 4),
            **{name: value / self.num_updates for name, value in self.sums.items()},  # single losses are noisy
            "learning_rate": learning_rate,
            f"{self.samples_name}_per_second": samples / seconds,
            "data_wait_share": waited / seconds,  # near 0: the device is busy; near 1: data is too slow
            **figures,
        }
        self.sums, self.num_updates = {}, 0
        self.before = (num_samples, elapsed_seconds, wait_seconds)
        self.progress.set_postfix(
            {
                "loss": f"{line['loss']:.4f}",
                f"{self.samples_name}/s": f"{samples / seconds:.0f}",
                "waiting for data": f"{waited / seconds:.0%}",
            }
        )
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:  # opened for each line, so that a killed run has lost none
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({name: value for name, value in line.items() if name != "step"}, step=step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.progress.close()
