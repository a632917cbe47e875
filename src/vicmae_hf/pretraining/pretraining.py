"""Pretraining: Algorithm 1 with the recipe of Table 1."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from ..configuration_vicmae import ViCMAEConfig
from ..data.loading.loader import build_dataloader
from ..data.samples.augmentation import normalize_pixels
from ..data.samples.pairs import FramePairDataset, PairSettings, load_frame_pairs
from ..files import write_json, writing
from ..modeling_vicmae import ViCMAEForPreTraining, ViCMAEForPreTrainingOutput
from ..settings import part_of
from ..training.checkpointing import Checkpoints, unwrap
from ..training.loop import train
from ..training.optimization import Schedule, order_batches, parameter_groups, plan_run
from ..training.reporting import RESULTS_FILE, MetricsLog, is_finished, peak_memory_mib, settings_of_run
from .arguments import PretrainingArguments, check_contrast


if TYPE_CHECKING:  # only for annotations: training takes no more of them than mean and deviation
    from ..image_processing_vicmae import ViCMAEImageProcessor
    from ..video_processing_vicmae import ViCMAEVideoProcessor


class Measure(Protocol):
    """Figures of a run beside its losses."""

    def __call__(self, step: int, is_last: bool, output: ViCMAEForPreTrainingOutput) -> dict[str, float]:
        """
        Returns figures for the log; none if it is not time for them. All processes call it after every update.

        Args:
            step: updates that are done; is_last: whether they are all.
            output: the model's, for the last batch of this process.
        """


def build_frame_pairs(accelerator: Accelerator, config: ViCMAEConfig, arguments: PretrainingArguments):
    """
    Opens the pairs to train a model of `config` on: a `FramePairDataset`, or with `--streaming` a `FramePairStream`.

    Raises:
        BadFilesError: if no pair can be read.
        InputError: if the data cannot be opened, or an option is out of range.
    """
    with accelerator.main_process_first():  # it fills the caches of `datasets`, which the others then find
        dataset = load_frame_pairs(
            arguments.train_data,
            config.image_height_and_width,
            bad_files_path=Path(arguments.output_dir) / "bad_files.jsonl",
            **vars(part_of(arguments, PairSettings)),
        )
        # A folder of unreadable files is reported here, in one line, and not from inside a worker.
        next(dataset.examples(1))
    return dataset


def pretrain(
    accelerator: Accelerator,
    model: ViCMAEForPreTraining,
    dataset: FramePairDataset,
    arguments: PretrainingArguments,
    processors: tuple["ViCMAEImageProcessor", "ViCMAEVideoProcessor"],
    measures: Sequence[Measure] = (),
) -> dict[str, Any] | None:
    """
    Trains `model` on `dataset`, and leaves the model, its processors, metrics, settings and checkpoints in
    `arguments.output_dir`.

    Args:
        dataset: from `build_frame_pairs`.
        processors: the model's. Pixels are normalised by the mean and standard deviation of the first.
        measures: figures for the log beside the losses.

    Returns:
        The results of the run; None if a resumed run has nothing left to do.

    Raises:
        BadFilesError: if too many files cannot be read.
        CheckpointError: if the checkpoint to resume from does not fit.
        NonFiniteLossError: if the loss becomes infinite or NaN.
    """
    schedule = plan_run(arguments, accelerator.num_processes, dataset.num_samples)
    # What may be refused comes before `checkpoints.start`, which deletes the checkpoints of an older run.
    check_contrast(arguments, model.config, schedule)
    build_loader(accelerator, dataset, arguments, schedule)
    checkpoints = open_checkpoints(accelerator, dataset, arguments)
    groups = parameter_groups(model, arguments.weight_decay)
    # Table 1. The schedule sets the learning rate before every update.
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    prepared, optimizer = accelerator.prepare(model, adamw)  # wrapped, where processes share the work
    schedule = replace(schedule, start_step=checkpoints.start(arguments.resume_from_checkpoint))
    if is_finished(arguments.output_dir, schedule):
        return None
    batches = load_batches(accelerator, dataset, arguments, schedule)
    objective = Objective(prepared, unwrap(accelerator, prepared), processors[0], arguments.contrastive_start_epoch)
    adamw.register_step_pre_hook(objective.hold_projector)
    if accelerator.is_main_process:
        (Path(arguments.output_dir) / RESULTS_FILE).unlink(missing_ok=True)  # of a shorter run that goes on
        # Now and not at the end: whoever finds an interrupted run can read what it was.
        write_json(Path(arguments.output_dir) / "arguments.json", settings_of_run(arguments, model.config, schedule))
        for processor in processors:
            processor.save_pretrained(arguments.output_dir)

    def measure(step: int) -> dict[str, float]:
        figures = [each(step, step == schedule.num_steps, objective.output) for each in measures]
        return {name: value for part in figures for name, value in part.items()}

    with (
        dataset.bad_files.errors_of_workers(),
        MetricsLog(accelerator, arguments.output_dir, "pairs", schedule.num_steps, schedule.start_step) as log,
    ):
        results = train(
            accelerator, prepared, optimizer, batches, objective, schedule, log, checkpoints, arguments, measure
        )
    objective.set_contrastive(True)  # for whoever uses the model from here on, as its config says
    return finish(accelerator, objective.model, dataset, arguments, schedule, results)


class Objective:
    """
    Losses of a batch: reconstruction from the start, contrastive from `contrastive_start_epoch` on (Table 1).

    Args:
        prepared: the model as Accelerate prepared it.
        model: the same without Accelerate's wrapper.
        processor: has the mean and standard deviation by which pixels are normalised.
        contrastive_start_epoch: may be a fraction.

    Attributes:
        output: the model's, for the last batch.
    """

    def __init__(
        self,
        prepared: nn.Module,
        model: ViCMAEForPreTraining,
        processor: "ViCMAEImageProcessor",
        contrastive_start_epoch: float,
    ):
        self.prepared = prepared
        self.model = model
        self.mean, self.std = processor.image_mean, processor.image_std
        self.contrastive_start_epoch = contrastive_start_epoch
        self.output: ViCMAEForPreTrainingOutput | None = None

    def set_contrastive(self, is_contrastive: bool) -> None:
        self.model.contrastive_weight = self.model.config.contrastive_weight if is_contrastive else 0.0

    def hold_projector(self, optimizer: torch.optim.Optimizer, *arguments) -> None:
        """
        Leaves the projector as it is while its weight is 0. Its gradients are zero then, but AdamW would still decay
        its weights, to nothing over the 200 epochs of Table 1. It passes over what has no gradient.
        """
        if self.model.contrastive_weight == 0:
            for parameter in self.model.contrastive_parameters():
                parameter.grad = None

    def __call__(self, batch: dict[str, torch.Tensor], epoch: float) -> dict[str, torch.Tensor]:
        # Set anew for every batch and not once, so that a resumed run needs no state of it.
        self.set_contrastive(epoch >= self.contrastive_start_epoch)
        # Pixels travel as bytes, a quarter of what floats would be, and become floats here on the device.
        self.output = self.prepared(normalize_pixels(batch["pixel_values"], self.mean, self.std))
        losses = {name: self.output.get(name) for name in ("loss", "reconstruction_loss", "contrastive_loss")}
        return {name: value for name, value in losses.items() if value is not None}


def open_checkpoints(
    accelerator: Accelerator, dataset: FramePairDataset, arguments: PretrainingArguments
) -> Checkpoints:
    """Opens the checkpoints of a run, with the settings that decide the order of its data."""
    run_settings = {
        "seed": arguments.seed,
        "num_files": dataset.num_files,
        "samples_per_file": dataset.samples_per_file,
        "per_device_train_batch_size": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "num_processes": accelerator.num_processes,
        # In a stream each worker reads shards of its own, so their number decides the order.
        "stream_workers": arguments.dataloader_num_workers if arguments.streaming else None,
    }
    return Checkpoints(accelerator, arguments.output_dir, arguments.save_total_limit, run_settings)


def build_loader(
    accelerator: Accelerator, dataset: FramePairDataset, arguments: PretrainingArguments, schedule: Schedule
) -> torch.utils.data.DataLoader:
    """Builds the loader of the batches still to come; of a stream, those of this process."""
    loading = {"num_workers": arguments.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
    if not arguments.streaming:
        weights = arguments.train_data_weights
        sampler = order_batches(arguments, schedule, dataset.lengths, dataset.num_samples, weights)
        return build_dataloader(dataset, sampler, **loading)
    return dataset.dataloader(
        arguments.per_device_train_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start_batch=schedule.start_step * schedule.gradient_accumulation_steps,
        **loading,
    )


def load_batches(
    accelerator: Accelerator, dataset: FramePairDataset, arguments: PretrainingArguments, schedule: Schedule
) -> Iterable[dict[str, torch.Tensor]]:
    """Loads the batches still to come, `{"pixel_values": uint8 (B, 2, 3, H, W)}`, to this process's device."""
    loader = build_loader(accelerator, dataset, arguments, schedule)
    if not arguments.streaming:
        return accelerator.prepare_data_loader(loader)
    # Not prepared by Accelerate, which would divide it again: each process already reads shards of its own.
    return (send_to_device(batch, accelerator.device, non_blocking=True) for batch in loader)


def finish(
    accelerator: Accelerator,
    model: ViCMAEForPreTraining,
    dataset: FramePairDataset,
    arguments: PretrainingArguments,
    schedule: Schedule,
    results: dict[str, float],
) -> dict[str, Any]:
    """Saves the model and the record of bad files; returns the results of the run."""
    accelerator.wait_for_everyone()  # workers of any process may still record bad files
    if accelerator.is_main_process:
        dataset.bad_files.rewrite()
        with writing(arguments.output_dir):
            model.save_pretrained(arguments.output_dir)
    results["pairs_per_second"] = results.pop("samples_per_second")
    return {
        "num_steps": schedule.num_steps,
        "epochs": schedule.num_steps / schedule.steps_per_epoch,
        "num_train_files": dataset.num_files,
        "num_failed": len(dataset.bad_files),
        **results,
        **peak_memory_mib(accelerator.device),
    }
