"""Pretraining: Algorithm 1 with the recipe of Table 1."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from ..configuration_vicmae import ViCMAEConfig
from ..data.loading.loader import SteadyBatches, build_dataloader
from ..data.samples.pairs import FramePairDataset, PairSettings, load_frame_pairs
from ..modeling_vicmae import ViCMAEForPreTraining, ViCMAEForPreTrainingOutput
from ..settings import part_of
from ..training.loop import Updates, train
from ..training.optimization import Schedule, order_batches, parameter_groups, plan_run
from .arguments import PretrainingArguments, check_contrast
from .objective import Objective


if TYPE_CHECKING:  # only for annotations: how a model is trained is read without them
    from ..data.samples.streaming import FramePairStream
    from ..image_processing_vicmae import ViCMAEImageProcessor
    from ..training.run_folder import RunFolder
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


def build_frame_pairs(
    accelerator: Accelerator, config: ViCMAEConfig, arguments: PretrainingArguments
) -> "FramePairDataset | FramePairStream":
    """
    Opens the pairs to train a model of `config` on; a stream with `--streaming`.

    Raises:
        BadFilesError: if no pair can be read.
        InputError: if the data cannot be opened, or an option is out of range.
    """
    height, width = config.image_height_and_width
    with accelerator.main_process_first():  # it fills the caches of `datasets`, which the others then find
        dataset = load_frame_pairs(
            arguments.train_data,
            (height, width),
            bad_files_path=Path(arguments.output_dir) / "bad_files.jsonl",
            num_patches=(height // config.patch_size) * (width // config.patch_size),
            **vars(part_of(arguments, PairSettings)),
        )
        # A folder of unreadable files is reported here, in one line, and not from inside a worker.
        next(dataset.examples(1))
    return dataset


def pretrain(
    accelerator: Accelerator,
    model: ViCMAEForPreTraining,
    dataset: "FramePairDataset | FramePairStream",
    arguments: PretrainingArguments,
    run: "RunFolder",
    processors: tuple["ViCMAEImageProcessor", "ViCMAEVideoProcessor"],
    measures: Sequence[Measure] = (),
) -> dict[str, Any] | None:
    """
    Trains `model` on `dataset`; leaves the model, its processors, metrics, settings and checkpoints in `run`'s folder.

    Args:
        dataset: from `build_frame_pairs`.
        processors: the model's. Pixels are normalised by the mean and standard deviation of the first.
        measures: figures for the log beside the losses.

    Returns:
        The results of the run; None if a resumed run has nothing left to do.

    Raises:
        BadFilesError, CheckpointError, NonFiniteError, RunStopped: see `run_pretraining`.
    """
    schedule = plan_run(arguments, accelerator.num_processes, dataset.num_samples)
    # What may be refused comes before `run.begin`, which deletes the checkpoints of an older run.
    check_contrast(arguments, model.config, schedule)
    build_loader(accelerator, dataset, arguments, schedule)
    # Table 1. The schedule sets the learning rate before every update.
    adamw = torch.optim.AdamW(parameter_groups(model, arguments.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)
    prepared, optimizer = accelerator.prepare(model, adamw)  # wrapped, where processes share the work
    schedule = run.begin(schedule, model, {"file_names": dataset.list_names()})
    if run.is_finished(schedule):
        return None
    batches = load_batches(accelerator, dataset, arguments, schedule)
    objective = Objective(prepared, model, processors[0], arguments.contrastive_start_epoch)
    adamw.register_step_pre_hook(objective.hold_projector)
    run.write_settings(processors)

    def measure(step: int) -> dict[str, float]:
        figures = [each(step, step == schedule.num_steps, objective.output) for each in measures]
        return {name: value for part in figures for name, value in part.items()}

    compute_losses = objective
    if arguments.contrast_across_accumulation and model.projector is not None:
        from .contrast import look_ahead  # here, because most runs do without it

        compute_losses, batches = look_ahead(accelerator, objective, batches, schedule, arguments.seed)
    updates = Updates(accelerator, prepared, optimizer, batches, compute_losses, schedule, arguments)
    with dataset.bad_files.errors_of_workers(), run.logging(schedule):
        results = train(updates, run, measure)
    objective.set_contrastive(True)  # for whoever uses the model from here on, as its config says
    accelerator.wait_for_everyone()  # workers of any process may still record bad files
    if accelerator.is_main_process:
        dataset.bad_files.finish()
    run.save_model(model)
    results["pairs_per_second"] = results.pop("samples_per_second")
    length = {"num_steps": schedule.num_steps, "epochs": schedule.num_steps / schedule.steps_per_epoch}
    files = {"num_train_files": dataset.num_files, "num_failed": len(dataset.bad_files)}
    return length | files | results


def build_loader(
    accelerator: Accelerator,
    dataset: "FramePairDataset | FramePairStream",
    arguments: PretrainingArguments,
    schedule: Schedule,
    num_batches: int = 0,
) -> torch.utils.data.DataLoader:
    """
    Builds the loader of the batches still to come; of a stream, those of this process. `num_batches` of each process
    are left out.
    """
    loading = {"num_workers": arguments.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
    if not arguments.streaming:
        weights = arguments.train_data_weights
        sampler = order_batches(arguments, schedule, dataset.lengths, dataset.num_samples, weights, num_batches)
        return build_dataloader(dataset, sampler, **loading)
    return dataset.dataloader(
        arguments.per_device_train_batch_size,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start_batch=schedule.start_step * schedule.gradient_accumulation_steps + num_batches,
        **loading,
    )


def load_batches(
    accelerator: Accelerator,
    dataset: "FramePairDataset | FramePairStream",
    arguments: PretrainingArguments,
    schedule: Schedule,
) -> Iterable[dict[str, torch.Tensor]]:
    """
    Loads the batches still to come, `{"pixel_values": uint8 (B, 2, 3, H, W), "noise": (B, 2, L), "name"}`, to this
    process's device.
    """

    def open_loader(num_batches: int) -> Iterable[dict[str, torch.Tensor]]:
        loader = build_loader(accelerator, dataset, arguments, schedule, num_batches)
        if not arguments.streaming:
            return accelerator.prepare_data_loader(loader)
        # Not prepared by Accelerate, which would divide it again: each process already reads shards of its own.
        return (send_to_device(batch, accelerator.device, non_blocking=True) for batch in loader)

    return SteadyBatches(open_loader, dataset.bad_files, arguments.dataloader_num_workers)
