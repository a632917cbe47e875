"""Puts a plan together: what there is, what a run on it takes, and whether a frame store is worth it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..data.media.bad_files import allowed_bad_files
from ..data.preparing.store_rows import PackingSettings
from ..modeling_vicmae import ViCMAELayer
from ..training.arguments import TrainingArguments
from ..training.devices.hardware import usable_cores
from ..training.optimization import Schedule
from .costs import (
    GPUS,
    LAYER_SECONDS,
    checkpoint_bytes,
    checkpoint_steps,
    count_parameters,
    state_bytes,
)
from .survey import Items, StoreTrial, Survey, batches_of, survey_items, try_store
from .trial import Batch, Trial, activation_bytes, try_updates


GIB = 2**30
# A store is worth it if training would wait for data at least this share of its time, and if the store then saves more
# time than packing takes.
MIN_WAIT = 0.05
THIS_MACHINE = "this machine"


@dataclass(frozen=True)
class Training:
    """
    A training that is planned.

    Args:
        arguments: its settings, all filled in.
        items: what its samples are drawn from.
        model: what is trained, not prepared by Accelerate.
        build_objective: the model on its device, prepared or not -> losses of a batch on that device.
        schedule: its length.
        flops: of an update.
        num_layers: that a batch passes through.
        contrastive_start_step: updates before the contrastive loss counts; None for a training without.
    """

    arguments: TrainingArguments
    items: Items
    model: nn.Module
    build_objective: Callable[[nn.Module], Callable[[Batch], Batch]]
    schedule: Schedule
    flops: int
    num_layers: int
    contrastive_start_step: int | None = None


def plan_training(accelerator: Accelerator, training: Training, mfu: float) -> dict[str, Any]:
    """
    Surveys the data, tries a few updates, and computes the rest.

    Args:
        training: what is planned; its model is moved to the accelerator's device and prepared.
        mfu: share of a GPU's FLOP/s that a training makes.

    Returns:
        The content of plan.json: "data", "run", "checkpoints", "compute", "memory", "time", "frame_store".

    Raises:
        BadFilesError: if none of the files that were tried can be read.
    """
    arguments, items = training.arguments, training.items
    survey = survey_items(items, arguments.video_backend, arguments.seconds_per_file, arguments.seed)
    packing = PackingSettings(video_backend=arguments.video_backend)
    store = try_store(survey, items.read, packing, arguments.seed)

    def samples(size: int):
        for batch in batches_of(survey.samples, size):
            yield {name: value.to(accelerator.device) for name, value in batch.items() if hasattr(value, "to")}

    # In training mode: a loaded model is in evaluation mode, where no layer is checkpointed.
    model = training.model.to(accelerator.device).train()
    # Before it is prepared: Accelerate puts the autocast of the run around the model.
    *_, layer = (module for module in model.modules() if isinstance(module, ViCMAELayer))
    layer.gradient_checkpointing = False  # the backward pass computes one layer at a time again: it counts whole
    kept = activation_bytes(model, training.build_objective(model), samples)
    layer.gradient_checkpointing = arguments.gradient_checkpointing
    prepared = accelerator.prepare(model)
    trial = try_updates(
        accelerator, prepared, training.build_objective(prepared), samples, arguments.per_device_train_batch_size
    )
    data = describe_data(items, survey, arguments.max_bad_files)
    rates = Rates(training, survey, store, trial, mfu)
    return {
        "data": data,
        "run": describe_run(training),
        "checkpoints": describe_checkpoints(training),
        "compute": describe_compute(training),
        "memory": describe_memory(training, kept, trial),
        "time": rates.describe(),
        "frame_store": describe_store(data, store, rates),
        "settings": asdict(arguments),
    }


def describe_data(items: Items, survey: Survey, max_bad_files: float) -> dict[str, Any]:
    share, at_most = survey.unreadable_share(len(items))
    readable = len(survey.readable)
    num_items = len(items) * (1 - share)
    return {
        "names": [source.name for source in items.sources],
        "num_files": items.num_files,
        "num_items": len(items),
        "num_samples": items.num_samples,
        "bytes": items.num_bytes,
        "num_sampled": survey.num_sampled,
        "videos": round(num_items * survey.num_videos / readable),
        "images": round(num_items * (readable - survey.num_videos) / readable),
        "hours": num_items * survey.video_seconds / readable / 3600,
        "unreadable_share": share,
        "unreadable_share_at_most": at_most,
        "is_too_unreadable": share * len(items) > allowed_bad_files(len(items), max_bad_files),
        "failures": survey.failures,
        "read_seconds": survey.read_seconds,
        "is_stored": survey.is_stored,
    }


def describe_run(training: Training) -> dict[str, Any]:
    schedule, start = training.schedule, training.contrastive_start_step
    return {
        "num_processes": schedule.num_processes,
        "total_batch_size": schedule.total_batch_size,
        "steps_per_epoch": schedule.steps_per_epoch,
        "num_steps": schedule.num_steps,
        "epochs": schedule.num_steps / schedule.steps_per_epoch,
        "warmup_steps": schedule.num_warmup_steps,
        "learning_rate": schedule.peak_learning_rate,
        "contrastive_start_step": start,
        "contrastive_start_epoch": None if start is None else start / schedule.steps_per_epoch,
        "repeats_samples": training.items.num_samples < schedule.total_batch_size,
    }


def describe_checkpoints(training: Training) -> dict[str, Any]:
    arguments = training.arguments
    steps = checkpoint_steps(training.schedule.num_steps, arguments.checkpointing_steps)
    kept = steps if arguments.save_total_limit is None else steps[-arguments.save_total_limit :]
    size = checkpoint_bytes(*count_parameters(training.model))
    # The newest is written before the oldest is deleted.
    held = min(len(steps), len(kept) + 1)
    return {"steps": steps, "kept": kept, "bytes_each": size, "bytes_at_most": held * size}


def describe_compute(training: Training) -> dict[str, Any]:
    num_parameters, num_trained = count_parameters(training.model)
    return {
        "num_parameters": num_parameters,
        "num_trained": num_trained,
        "flops_per_update": training.flops,
        "flops": training.flops * training.schedule.num_steps,
    }


def describe_memory(training: Training, kept: dict[str, tuple[float, float]], trial: Trial) -> dict[str, Any]:
    """Memory of one process, in bytes; without what CUDA takes itself."""
    batch_size = training.arguments.per_device_train_batch_size
    states = state_bytes(*count_parameters(training.model))
    return {
        "states": states,
        "activations_per_sample": {name: sample for name, (sample, _) in kept.items()},
        "total": {name: states + fixed + batch_size * sample for name, (sample, fixed) in kept.items()},
        "measured_on_gpu": trial.peak_bytes,
        "out_of_memory": trial.out_of_memory,
    }


@dataclass(frozen=True)
class Rates:
    """How fast samples are loaded and trained on, by one process of a run."""

    training: Training
    survey: Survey
    store: StoreTrial | None
    trial: Trial
    mfu: float

    @property
    def schedule(self) -> Schedule:
        return self.training.schedule

    @property
    def num_loading(self) -> int:
        """Processes that load for one process of the run, on the cores that there are."""
        wanted = max(self.training.arguments.dataloader_num_workers, 1)
        return max(min(wanted, usable_cores() // self.schedule.num_processes), 1)

    def loading(self, from_store: bool) -> float:
        """Seconds to load the samples of an update, for each process of the run."""
        seconds = self.store.read_seconds if from_store else self.survey.read_seconds
        return seconds / self.num_loading * self.samples_per_update

    @property
    def samples_per_update(self) -> float:
        """Of one process."""
        return self.schedule.total_batch_size / self.schedule.num_processes

    def run_seconds(self, update_seconds: float, shares_cores: bool = False, from_store: bool = False) -> float:
        """Of the whole run: loading goes on beside training, unless both need the same cores."""
        loading = self.loading(from_store)
        update = update_seconds + loading if shares_cores else max(update_seconds, loading)
        return self.schedule.num_steps * update

    def wait_share(self, update_seconds: float, shares_cores: bool = False) -> float:
        """Share of a run's time in which it waits for data, or in which its cores load."""
        loading = self.loading(False)
        if shares_cores:
            return loading / (update_seconds + loading)
        return 1 - update_seconds / max(loading, update_seconds)

    def here(self) -> tuple[float, bool] | None:
        """Seconds of an update on this machine without loading, and whether loading needs the same cores."""
        if self.trial.seconds_per_sample is None:
            return None
        seconds = self.trial.seconds_per_sample * self.samples_per_update + self.trial.seconds_per_update
        num_threads = torch.get_num_threads() if self.trial.device.startswith("CPU") else 1
        busy = self.schedule.num_processes * (num_threads + self.num_loading)
        return seconds, self.training.arguments.dataloader_num_workers == 0 or busy > usable_cores()

    def on_gpu(self, flops: float) -> float:
        """Seconds of an update on a GPU of so many FLOP/s."""
        computing = self.training.flops / self.schedule.num_processes / (self.mfu * flops)
        return max(computing, self.schedule.gradient_accumulation_steps * self.training.num_layers * LAYER_SECONDS)

    def describe(self) -> dict[str, Any]:
        here, result = self.here(), {"loading_processes": self.num_loading}
        result["here"] = None
        if here is not None:
            seconds = self.run_seconds(*here)
            result["here"] = {
                "device": self.trial.device,
                "batch_of_measurement": self.trial.batch_size,
                "samples_per_second": self.schedule.num_steps * self.schedule.total_batch_size / seconds,
                "compute_seconds_per_sample": self.trial.seconds_per_sample,
                "seconds": seconds,
                "loads_on_the_same_cores": here[1],
                "wait_share": self.wait_share(*here),
            }
        result["gpus"] = []
        for gpu in GPUS:
            update = self.on_gpu(gpu.flops)
            result["gpus"].append(
                {
                    "name": gpu.name,
                    "gib": gpu.gib,
                    "mfu": self.mfu,
                    "samples_per_second": self.schedule.total_batch_size / update,
                    "seconds": self.schedule.num_steps * update,
                    "seconds_with_loading_here": self.run_seconds(update),
                    "wait_share_with_loading_here": self.wait_share(update),
                }
            )
        return result


def describe_store(data: dict[str, Any], store: StoreTrial | None, rates: Rates) -> dict[str, Any]:
    """Size and time of a frame store of all items, and where it is worth it."""
    if store is None:
        return {"is_stored": True, "worth_it": []}
    num_bytes = store.bytes_per_second * 3600 * data["hours"] + store.bytes_per_image * data["images"]
    seconds = store.pack_seconds_per_second * 3600 * data["hours"] + store.pack_seconds_per_image * data["images"]
    seconds /= usable_cores()
    machines = [(gpu.name, rates.on_gpu(gpu.flops), False) for gpu in GPUS]
    if (here := rates.here()) is not None:
        machines.insert(0, (THIS_MACHINE, *here))
    waits = {name: rates.wait_share(*update) for name, *update in machines}
    saved = {
        name: rates.run_seconds(*update) - rates.run_seconds(*update, from_store=True) for name, *update in machines
    }
    return {
        "is_stored": False,
        "bytes": num_bytes,
        "pack_seconds": seconds,
        "pack_processes": usable_cores(),
        "read_seconds": store.read_seconds,
        "file_read_seconds": data["read_seconds"],
        "wait_share": waits,
        "min_wait_share": MIN_WAIT,
        "seconds_saved": saved,
        "worth_it": [name for name in saved if waits[name] >= MIN_WAIT and saved[name] > seconds],
    }
