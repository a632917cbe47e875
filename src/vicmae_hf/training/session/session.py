"""Starts and ends what every training script has around its training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed

from ...files import check_writable
from ...settings import ArgumentsError
from ..arguments import TrainingArguments
from ..devices.hardware import choose_precision_of_products
from ..devices.sharding import set_up_sharding
from ..engines import check_engine, check_sharding
from ..reporting import RESULTS_FILE, finish_trackers, track_pictures
from .hub import create_repository, upload
from .output_folder import check_output_dir, lock_output_dir, made_folders, remove_record
from .scripts import stop_with_launcher


def start_session(arguments: TrainingArguments, can_shard: bool = False) -> Accelerator:
    """
    Starts the accelerator, and makes an output folder that is safe to write to. All that can fail because of the
    settings fails here, before any data is read.

    Args:
        arguments: of the run; what the launcher decides is filled in.
        can_shard: whether the training goes with FSDP2.

    Raises:
        ArgumentsError: if accelerate's configuration has an engine that is not supported, the output folder holds a
            run that this one would replace or that still lasts, or the Hub refuses.
        InputError: if the output folder cannot be made or written to.
    """
    stop_with_launcher()
    check_engine(arguments.mixed_precision, can_shard)
    check_sharding(arguments)
    check_trackers(arguments.report_to)
    if arguments.private and not arguments.push_to_hub:
        raise ArgumentsError("--private is about the repository of --push_to_hub: give both, or neither.")
    accelerator = Accelerator(
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.report_to or None,
        project_dir=arguments.output_dir,
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
        # broadcast_buffers=False: the buffers are fixed positions and statistics that are already the same in all
        # processes, and sending them at every step would cost time.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    set_up_sharding(accelerator)
    arguments.mixed_precision = accelerator.mixed_precision  # the launcher may have set it
    choose_precision_of_products(arguments.mixed_precision)
    adopt_accumulation(arguments, accelerator.gradient_accumulation_steps)
    if accelerator.is_main_process:
        check_output_dir(arguments)
        check_writable(Path(arguments.output_dir) / RESULTS_FILE)
        if arguments.push_to_hub:
            create_repository(arguments)
        folder = Path(arguments.output_dir)
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock_output_dir(folder)
        made_folders[:] = missing
        if not arguments.resume_from_checkpoint:
            remove_record(folder / "bad_files.jsonl")
    accelerator.wait_for_everyone()  # until the folder is there
    set_seed(arguments.seed)
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Raises an ArgumentsError if a tracker is unknown or not installed. Accelerate would go on without it."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS and name != "all":
            raise ArgumentsError(f"--report_to {name}: expected one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.")
        if name not in installed and name != "all":
            raise ArgumentsError(f"--report_to {name}: it is not installed. Install it: pip install {name}")


def adopt_accumulation(arguments: TrainingArguments, launched: int) -> None:
    """
    Takes the accumulation steps that the launcher set, if the script was given none.

    Raises:
        ArgumentsError: if both were set, and differ.
    """
    if arguments.gradient_accumulation_steps not in (1, launched):  # 1 is the default: nothing was set
        raise ArgumentsError(
            f"--gradient_accumulation_steps is {arguments.gradient_accumulation_steps}, but accelerate's "
            f"configuration (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) has {launched}. Set one of them."
        )
    arguments.gradient_accumulation_steps = launched


def end_session(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """
    Uploads the output folder if the settings say so, and closes trackers and process group.

    Raises:
        UploadError: if the upload fails; the folder is as it was.
    """
    if accelerator.is_main_process and arguments.push_to_hub:
        upload(arguments)
    accelerator.wait_for_everyone()  # else the first one to end would close the group that the others use
    if accelerator.is_main_process:
        track_pictures(accelerator, arguments.output_dir)
    finish_trackers(accelerator)
    accelerator.end_training()
