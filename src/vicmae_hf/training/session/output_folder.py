"""The output folder of a run: what it may replace, and who may write there."""

import contextlib
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from accelerate.logging import get_logger
from filelock import FileLock, Timeout

from ...settings import ArgumentsError
from ..arguments import TrainingArguments
from ..checkpointing import list_checkpoints
from ..reporting import RESULTS_FILE


logger = get_logger(__name__)

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock-holder"  # who holds the lock; not in the locked file, which Windows lets nobody else read
LOCK_SECONDS = 10.0  # loading workers of a run that was killed live for some seconds more
held_locks: list[FileLock] = []  # of the run that this process makes
made_folders: list[Path] = []  # for its output, the innermost first


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
            f"--resume_from_checkpoint latest: {folder} holds a finished run, but no checkpoint to resume from. "
            f"Choose another folder, start from its weights (--model_name_or_path {folder}), or replace it "
            "(--overwrite_output_dir)."
        )
    holds_run = has_checkpoints or has_model
    goes_on = resumed == "latest" or (resumed and Path(resumed).resolve().parent == folder.resolve())
    if holds_run and not goes_on and not arguments.overwrite_output_dir:
        raise ArgumentsError(
            f"--output_dir {folder} already holds a run. Resume it (--resume_from_checkpoint latest), choose "
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


def remove_record(path: Path) -> None:
    """Removes a record (see `BadFiles`). It belongs to another run, whose bad files may be repaired by now."""
    path.unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
