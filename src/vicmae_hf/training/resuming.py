"""Decides whether a run may continue from a checkpoint: only the same run, but for what cannot change its numbers."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate.utils import gather_object, load
from safetensors import SafetensorError, safe_open

from ..errors import InputError


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or of another run, or cannot be written; the message says which and why."""


# What may differ in a resumed run: where things are and how they are reported, how fast and how patiently files
# are read, how the same batch is divided, how memory is saved.
MAY_CHANGE = {
    *("output_dir", "train_data", "eval_data", "probe_data", "data_root", "probe_steps"),
    *("logging_steps", "checkpointing_steps", "save_total_limit", "report_to", "push_to_hub", "hub_model_id"),
    *("project", "run_name", "private", "plan"),
    *("resume_from_checkpoint", "overwrite_output_dir", "num_train_epochs", "max_train_steps", "max_skipped_updates"),
    *("dataloader_num_workers", "seconds_per_file", "max_bad_files", "gradient_checkpointing"),
    *("torch_compile", "num_threads"),
    *("num_processes", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    # These decide the model, which is compared itself; the others say what wrote it.
    *("config_overrides", "image_size"),
    *("model.transformers_version", "model.dtype", "model.architectures", "model._name_or_path"),
}
# How a total batch is divided.
DIVISION = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
# In a stream each worker reads shards of its own, so their number decides the order, too.
DIVISION_OF_STREAM = {"dataloader_num_workers", *DIVISION}
# These follow from the others, and are named only where none of those differs.
FOLLOWING = {"learning_rate", "steps_per_epoch"}


# A damaged, foreign or hostile file raises these. Nothing in it is run: torch's files are read with weights_only.
UNREADABLE = (OSError, EOFError, LookupError, TypeError, ValueError, RuntimeError, UnpicklingError, SafetensorError)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turns an error of reading a checkpoint, in its block, into a CheckpointError that names the file."""
    try:
        yield
    except InputError:
        raise
    except UNREADABLE as error:
        for path in sorted(checkpoint.iterdir()):
            try:
                if path.suffix == ".safetensors":
                    safe_open(path, "pt")
                elif path.suffix in (".bin", ".pt"):
                    load(path, map_location="cpu")
            except UNREADABLE:
                message = f"{path} is damaged, or holds things other than tensors and numbers. Nothing in it was run."
                raise CheckpointError(message) from error
        raise CheckpointError(f"{checkpoint} does not fit this run ({error}).") from error


def fingerprint(names: Iterable[str]) -> str:
    """Number and SHA-256 of names. `train_data` and `eval_data` may change: the same files may lie elsewhere."""
    digest, num_names = hashlib.sha256(), 0
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        num_names += 1
    return f"{num_names} names, SHA-256 {digest.hexdigest()}"


def check_same_in_all_processes(data: dict[str, str]) -> None:
    """
    Compares the fingerprints of data between processes, which divide it by places in its list. All call it.

    Raises:
        InputError: in all of them, if one has found other items: it may have been unable to open a file for a moment,
            or have another copy of the data.
    """
    found = gather_object([data])
    for process, other in enumerate(found):
        if other != found[0]:
            name = next(name for name in data if other[name] != found[0][name])
            raise InputError(
                f"{name}: process {process} has found other items ({other[name]}) than process 0 ({found[0][name]}). "
                "Run again; if that fails too, make sure that all machines read the same files."
            )


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"hidden_size": 8}}` -> `{"model.hidden_size": 8}`."""
    flat = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def check_same_run(checkpoint: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """
    Compares the settings in a checkpoint with those of the run that is to go on from it.

    Raises:
        CheckpointError: if they differ in what decides its samples or numbers; the message lists every difference.
    """
    before, now = flatten(before), flatten(now)
    allowed = MAY_CHANGE - DIVISION_OF_STREAM if now.get("streaming") else MAY_CHANGE
    names = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    names -= {"num_steps", *allowed}
    differences = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in sorted(names - FOLLOWING or names)
    ]
    if "total_batch_size" in names:
        was, is_now = (" x ".join(str(settings.get(name)) for name in DIVISION) for settings in (before, now))
        differences.append(f"the total batch is {' x '.join(DIVISION)}, it was {was}, is {is_now}")
    if not differences and now["num_steps"] < before["num_steps"]:
        differences.append(
            f"num_steps was {before['num_steps']}, is {now['num_steps']}: it can only become longer "
            "(--num_train_epochs or --max_train_steps)"
        )
    if differences:
        raise CheckpointError(
            f"{checkpoint} is of another run: {'; '.join(differences)}. Use the same settings, or start anew from its "
            "weights with --model_name_or_path."
        )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Says what a resumed run does differently from before, of what a user should know."""
    lines = []
    if now["num_steps"] != before["num_steps"]:
        lines.append(
            f"The run is now {now['num_steps']} updates long (was {before['num_steps']}): from here on the learning "
            "rate follows the longer schedule."
        )
    if any(now[name] != before[name] for name in DIVISION):
        processes, batch, accumulation = (f"{now[name]} (was {before[name]})" for name in DIVISION)
        lines.append(
            f"The batch of {now['total_batch_size']} is divided differently now: {processes} processes, {batch} "
            f"samples each, {accumulation} steps an update. The samples, views and masks stay the same. Dropout, "
            "stochastic depth and mixing draw other numbers, if they are used."
        )
    compared, before_compared = (
        settings["num_processes"] * settings["per_device_train_batch_size"] for settings in (now, before)
    )
    has_contrast = "contrastive_start_epoch" in now and now["model"]["contrastive_loss"] != "none"
    has_contrast = has_contrast and not now["contrast_across_accumulation"]  # else it is the total batch, as before
    if has_contrast and compared != before_compared:
        lines.append(
            f"The contrastive loss now compares {compared} samples with each other (was {before_compared}), so its "
            "values differ. Keep processes x samples the same to avoid this."
        )
    return lines
