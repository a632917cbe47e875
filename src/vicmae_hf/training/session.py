"""Does what every training script needs around its training: errors, accelerator, output folder, model, upload."""

import contextlib
import ctypes
import errno
import json
import logging
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from filelock import FileLock, Timeout
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..command_line import command_to_go_on, launching_command, one_line, parse_config_overrides
from ..configuration_vicmae import ViCMAEConfig
from ..convert_checkpoint import own_checkpoint
from ..data.loading.loader import end_workers
from ..errors import InputError, NonFiniteError
from ..files import check_writable
from ..modeling_vicmae import ViCMAEForPreTraining
from ..settings import ArgumentsError
from .arguments import TrainingArguments
from .checkpointing import list_checkpoints
from .devices.hardware import choose_precision_of_products, compile_layers, set_threads
from .devices.sharding import set_up_sharding
from .engines import check_engine, check_sharding
from .reporting import RESULTS_FILE, finish_trackers, track_pictures
from .resuming import CheckpointError
from .stopping import STOPPED_EXIT_STATUS, RunStopped


logger = get_logger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)

# Loading a model raises these, where a file is damaged, does not fit, or asks for code or packages.
MODEL_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError),
    *(StrictDataclassError, SafetensorError, UnpicklingError),
)
# For everything that opens a checkpoint: Transformers would ask the user, and might take a script's input for a yes.
NO_FOREIGN_CODE = {"trust_remote_code": False}
# Requests to the Hub raise these: refusals and files, unreachable servers, wrong names, failed transfers.
HUB_ERRORS = (OSError, HTTPError, ValueError, RuntimeError)

PR_SET_PDEATHSIG = 1  # of prctl(2) on Linux: the signal that a process gets when its parent ends

LAUNCHER_SECONDS = 5.0  # until a launcher has noticed that a process ended, and ends the others

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock-holder"  # who holds the lock; not in the locked file, which Windows lets nobody else read
LOCK_SECONDS = 10.0  # loading workers of a run that was killed live for some seconds more
held_locks: list[FileLock] = []  # of the run that this process makes
made_folders: list[Path] = []  # for its output, the innermost first

# Errors of the system about a place, not about the program: full, read-only, somebody else's, or no place at all.
MENDABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR),
}


# Modules that say the same in every process of a machine: what data is there, and how many threads. What others say is
# of their own process, such as a file that it cannot read.
SAID_IN_ALL = (
    *("vicmae_hf.data.sources", "vicmae_hf.data.media.frame_folders"),
    *("vicmae_hf.training.devices", "vicmae_hf.classification.setup"),
)


class UploadError(InputError):
    """The output folder could not be uploaded; the message says why, and how to upload it later."""


def run_script(main: Callable[[], None]) -> None:
    """
    Runs a script. An error that the user can mend ends it with one line on stderr and exit status 1; any other error
    ends it with its traceback. A training that was asked to stop ends with `STOPPED_EXIT_STATUS`.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(said_once)
    logging.getLogger("vicmae_hf").setLevel(logging.INFO)  # what this package says, and not all that others do
    # Transformers would show a bar for every file that it writes or reads.
    disable_progress_bar()
    # Of the default number of loading processes, where that is more than the cores: it is no fault of the user's.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    # PyTorch calls it so since 2.13; Accelerate knows no other name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    try:
        main()
    except (CheckpointError, NonFiniteError) as error:
        # All processes find these, or the main one alone.
        end_script(f"error: {error}" if is_main_process() else "", 1)
    except InputError as error:
        end_script(f"error: {without_traceback(error)}", 1)
    except (OSError, SafetensorError) as error:
        if find_errno(error) not in MENDABLE:
            raise
        end_script(f"error: a file cannot be opened or written: {without_traceback(error)}", 1)
    except RunStopped as stopped:
        # All processes stop together.
        end_script(f"{stopped}. Go on with: {command_to_go_on()}" if is_main_process() else "", STOPPED_EXIT_STATUS)
    except RuntimeError:
        if "VICMAE_LAUNCHER" in os.environ and not is_main_process():
            # Perhaps only that another process ended, which says why. The launcher ends this one meanwhile.
            time.sleep(LAUNCHER_SECONDS)
        raise
    except KeyboardInterrupt:  # outside of the training: there is nothing to keep
        end_script("Interrupted.", 128 + signal.SIGINT)


def said_once(record: logging.LogRecord) -> bool:
    """Lets through what is said in a run, once on each machine."""
    # Accelerate's loggers speak in the first process alone, and put its rank before what they say.
    record.msg = str(record.msg).removeprefix("[RANK 0] ")
    return os.environ.get("LOCAL_RANK", "0") == "0" or not record.name.startswith(SAID_IN_ALL)


def without_traceback(error: Exception) -> str:
    """Returns the message of an error. Of one in a loader's worker, PyTorch puts the worker's traceback before it."""
    message = str(error).strip()
    return message.splitlines()[-1].partition(": ")[2] if message.startswith("Caught ") else message


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def end_script(message: str, status: int) -> None:
    """
    Ends a script with a message of one line on stderr. An error is also left for the launcher of several processes,
    because others may fail after this one, and say more than this one did. `vicmae` says it when all have ended.
    """
    if message and status == 1 and "TORCHELASTIC_ERROR_FILE" in os.environ:
        left = {"message": one_line(message), "timestamp": int(time.time())}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(left), encoding="utf-8")
    if message and (status != 1 or "VICMAE_LAUNCHER" not in os.environ):
        print(one_line(message), file=sys.stderr, flush=True)
    release_output_dir()
    # Workers: one whose decoder hangs would keep the script alive. torch would report their deaths as errors.
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_workers()
    if dist.is_initialized():
        # Other processes may wait for this one. sys.exit would wait for them; so it ends at once, and the launcher
        # sees it gone and stops the others.
        os._exit(status)
    sys.exit(status)


def find_errno(error: Exception) -> int | None:
    """Finds the system's number of an error, which some libraries have in their text only: "(os error 28)"."""
    found = re.search(r"\b(?:errno|os error) (\d+)", str(error), re.IGNORECASE)
    return int(found[1]) if found else None


def stop_with_launcher() -> None:
    """
    Lets this process be asked to stop when its launcher ends. `accelerate launch` hands no SIGTERM on: the training
    would go on alone, in a folder that nobody watches.
    """
    if sys.platform == "linux" and launching_command(sys.argv[0]):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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


def remove_record(path: Path) -> None:
    """Removes a record (see `BadFiles`). It belongs to another run, whose bad files may be repaired by now."""
    path.unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)


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


def check_output_dir(arguments: TrainingArguments) -> None:
    """Raises an ArgumentsError if the run would replace another one without being told to, or write into its data."""
    folder = Path(arguments.output_dir)
    other_data = [getattr(arguments, name, None) for name in ("eval_data", "probe_data")]
    refuse_data_folder(folder, [*arguments.train_data, *other_data])
    if folder.exists() and not folder.is_dir():
        raise ArgumentsError(f"--output_dir {folder} is a file; expected a folder.")
    for path in [*folder.glob("*"), *folder.glob("plots/*")]:
        if path.is_symlink() and not path.name.startswith("checkpoint-"):
            raise ArgumentsError(f"--output_dir: {path} is a link, and a run would write through it. Remove it.")
    has_checkpoints, has_model = bool(list_checkpoints(folder)), (folder / "model.safetensors").exists()
    # A classification keeps its best model long before its first checkpoint; the results are written at the end.
    is_finished = (folder / RESULTS_FILE).exists()
    resumed = arguments.resume_from_checkpoint
    # A run writes its settings first: a model without them was put there by somebody.
    is_complete = is_finished or (has_model and not (folder / "arguments.json").exists())
    if resumed == "latest" and is_complete and not has_checkpoints and not arguments.overwrite_output_dir:
        raise ArgumentsError(
            f"--resume_from_checkpoint latest: {folder} holds a finished run, but no checkpoint to go on from. Choose "
            f"another folder, start from its weights (--model_name_or_path {folder}), or replace it "
            "(--overwrite_output_dir)."
        )
    holds_run = has_checkpoints or has_model
    goes_on = resumed == "latest" or (resumed and Path(resumed).resolve().parent == folder.resolve())
    if holds_run and not goes_on and not arguments.overwrite_output_dir:
        raise ArgumentsError(
            f"--output_dir {folder} already holds a run. Go on with it (--resume_from_checkpoint latest), choose "
            "another folder, or replace it (--overwrite_output_dir)."
        )


def refuse_data_folder(folder: str | os.PathLike, data: Iterable[str | None]) -> None:
    """Raises an ArgumentsError if an output folder is one of data. (A folder below it is left out of the data.)"""
    for name in data:
        if name is not None and os.path.exists(name) and os.path.realpath(name) == os.path.realpath(folder):
            raise ArgumentsError(f"--output_dir {folder} is a folder of data; choose another, or one below it.")


def lock_output_dir(folder: Path, flag: str = "--output_dir") -> None:
    """
    Lets no other run write to the folder until this process ends or begins another run.

    Raises:
        ArgumentsError: if a run is writing to it.
    """
    path, holder_path = folder / LOCK_FILE, folder / HOLDER_FILE
    release_output_dir()
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout as error:
        holder = holder_path.read_text(encoding="utf-8", errors="replace").strip() if holder_path.exists() else ""
        raise ArgumentsError(
            f"{flag} {folder}: another run is writing there{holder and f' ({holder})'}, and each would delete "
            "what the other wrote. Wait until it ends, stop it, or choose another place."
        ) from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s); make sure that no other run writes there.", folder, error)
        return
    held_locks.append(lock)
    holder_path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")


def release_output_dir() -> None:
    """
    Lets other runs write to the folder that this process has locked, if any. A folder that was made for a run, and in
    which the run has left nothing because it was refused, is removed.
    """
    while held_locks:
        held_locks.pop().release()
    with contextlib.suppress(OSError):  # another run has begun there meanwhile
        for folder in made_folders:
            if {path.name for path in folder.iterdir()} - {LOCK_FILE, HOLDER_FILE}:
                break
            for name in (LOCK_FILE, HOLDER_FILE):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
    made_folders.clear()


def create_repository(arguments: TrainingArguments) -> None:
    """
    Creates the repository, or finds it, and sets `arguments.hub_model_id` to its full name.

    Raises:
        ArgumentsError: if the Hub can't be reached, or does not let this user write there.
    """
    hub = HfApi()
    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    try:
        private = True if arguments.private else None  # else as the organisation has it
        arguments.hub_model_id = hub.create_repo(name, private=private, exist_ok=True).repo_id
        # Creating passes if the repository exists, also where this user may only read. Better now than after days.
        hub.auth_check(arguments.hub_model_id, write=True)
        is_public = arguments.private and not hub.model_info(arguments.hub_model_id).private
    except HUB_ERRORS as error:
        raise ArgumentsError(
            f"--push_to_hub: the repository {name} on {hub.endpoint} cannot be written to ({one_line(error)}). Log in "
            "with `hf auth login` and a token that may write, or choose another --hub_model_id."
        ) from error
    if is_public:
        raise ArgumentsError(
            f"--private: the repository {arguments.hub_model_id} is there already, and public. Make it private in its "
            "settings on the Hub, or choose another --hub_model_id."
        )


def build_model(
    model_class: type[Model], arguments: TrainingArguments, replaced: str | None = None, **settings
) -> Model:
    """
    Builds a model with random weights, or from `--model_name_or_path`, and applies `--image_size` and
    `--config_overrides`.

    Args:
        replaced: beginning of the names of parameters that need not fit the checkpoint's (a new classifier).
        settings: more fields of the config.

    Raises:
        ArgumentsError: if there is no such checkpoint, the settings do not fit together, or its weights do not fit
            them.
    """
    changes = parse_config_overrides(model_class.config_class, arguments.config_overrides) | settings
    if arguments.image_size is not None:
        changes["image_size"] = arguments.image_size if len(arguments.image_size) == 2 else arguments.image_size[0]
    try:
        if arguments.model_name_or_path is None:
            model = model_class(model_class.config_class(**changes))
        else:
            model, loaded = load_model(model_class, arguments.model_name_or_path, changes)
            check_shapes(loaded["mismatched_keys"], replaced)
            check_encoder(loaded["missing_keys"])
    except MODEL_ERRORS as error:
        source = arguments.model_name_or_path or "--image_size and --config_overrides"
        raise ArgumentsError(f"The model cannot be built from {source}: {explain(error)}") from error
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if arguments.torch_compile:
        compile_layers(model)
    if not torch.cuda.is_available():
        set_threads(arguments.num_threads, arguments.dataloader_num_workers, model)
    return model


def explain(error: Exception) -> str:
    """Says in one line why a model could not be loaded."""
    text = one_line(error)
    if isinstance(error, UnpicklingError):
        # PyTorch would advise to load the file nevertheless.
        wanted = re.search(r"GLOBAL (\S+)", text)
        reason = f"want to use {wanted[1]}, which may run code" if wanted else "hold things other than tensors"
        return f"its weights (.bin) are refused, because they {reason}. Nothing in them was run."
    if "trust_remote_code" in text:
        return "it needs code that comes with it, and such code is never run here. Nothing of it was run."
    return text


def load_model(model_class: type[Model], name: str, changes: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """
    Returns the model and Transformers' report on loading it. Checkpoints of MAE, ViTMAE and ViC-MAE's authors are
    converted. Raises a ValueError if it is of another kind.
    """
    with own_checkpoint(name, changes) as folder:
        config = AutoConfig.from_pretrained(folder, **NO_FOREIGN_CODE)
        if config.model_type != model_class.config_class.model_type:
            raise ValueError(
                f"expected a checkpoint of {model_class.config_class.model_type}, MAE or ViTMAE, got one of "
                f"{config.model_type}."
            )
        if folder != name and issubclass(model_class, ViCMAEForPreTraining) and "contrastive_loss" not in changes:
            changes = choose_objective(name, config) | changes
        # A checkpoint may be stored in half precision. Trained so, weights would lose small updates by rounding.
        # Mismatched sizes are let through, because `check_shapes` names them better.
        model, loaded = model_class.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **changes
        )
    model.config.name_or_path = name  # and not a folder that is gone
    return model, loaded


def choose_objective(name: str, converted: PreTrainedConfig) -> dict[str, Any]:
    """Of a converted checkpoint that says MAE's own objective: ViC-MAE's, because that is what is pretrained here."""
    if converted.contrastive_loss != "none":
        return {}
    objective = {field: getattr(ViCMAEConfig(), field) for field in ("contrastive_loss", "reconstruct")}
    chosen = ",".join(f"{field}={value}" for field, value in objective.items())
    if is_main_process():  # Accelerate's logger works only once there is an `Accelerator`
        logging.getLogger(__name__).warning(
            "%s: weights of MAE, now trained with the objective of ViC-MAE (%s). For plain MAE, give "
            '--config_overrides "contrastive_loss=none".',
            name,
            chosen,
        )
    return objective


def check_encoder(missing: Iterable[str]) -> None:
    """Raises a ValueError if weights of the encoder are missing, except temporal positions, which start from zero."""
    # Transformers would only warn, and the run would train an encoder that is random in parts.
    lacking = [name for name in missing if name.startswith("vicmae.") and "temporal_position" not in name]
    if lacking:
        raise ValueError(f"it lacks {len(lacking)} weights of the encoder, the first: {min(lacking)}.")


def check_shapes(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], replaced: str | None) -> None:
    """Raises a ValueError that names the first parameter whose shape differs between checkpoint and model."""
    for name, found, expected in sorted(mismatched):
        if replaced is None or not name.startswith(replaced):
            raise ValueError(f"{name} has shape {list(found)} there, but {list(expected)} by these settings.")


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


def upload(arguments: TrainingArguments) -> None:
    # Checkpoints hold the optimizer: three times the model, of use only for going on with this run.
    left_out = ["checkpoint-*/**", ".partial-*/**", LOCK_FILE, HOLDER_FILE]
    try:
        HfApi().upload_folder(
            repo_id=arguments.hub_model_id,
            folder_path=arguments.output_dir,
            ignore_patterns=left_out,
            commit_message="End of training",
        )
    except HUB_ERRORS as error:
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in left_out)
        raise UploadError(
            f"The training is done and saved in {arguments.output_dir}, but it was not uploaded ({one_line(error)}). "
            f"To upload it: hf upload {arguments.hub_model_id} {arguments.output_dir} {excluded}"
        ) from error
