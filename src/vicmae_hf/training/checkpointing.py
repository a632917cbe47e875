"""Writes and reads checkpoints, from which a run continues exactly where it was."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel

from ..errors import NonFiniteError
from ..files import read_json, write_json
from .devices.sharding import gather_model, gather_optimizer, load_optimizer, load_weights
from .resuming import CheckpointError, check_same_run, describe_changes, reading


logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"  # the step, and the settings of the run
CHECKSUMS_FILE = "checksums.json"  # size and SHA-256 of every other file
# These files say that a run is done, and with what. A run that begins anew must not find those of another.
RESULTS_OF_A_RUN = ("all_results.json", "train_files.txt")

Whole = tuple[PreTrainedModel | None, dict[str, Any]]  # model and state of the optimizer


def unwrap(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """Returns the model as it was before Accelerate prepared it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Lists the folders `checkpoint-STEP`, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))  # as numbers: 900 comes before 1000


def sync_to_disk(paths: Iterable[Path]) -> None:
    """Waits until files, and the names in folders, are on disk: they are there after a power failure, too."""
    for path in paths:
        is_folder = path.is_dir()
        try:  # Windows syncs only what is open for writing, and opens no folders
            descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        except PermissionError:
            if is_folder:
                continue
            raise
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def list_checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Lists the files of a folder, as `{"bytes", "sha256"}` by their paths within it."""
    checksums = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        checksums[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return checksums


def find_damage(checkpoint: Path) -> str | None:
    """Says what is wrong with the files of a checkpoint: missing, cut short or changed; None if they are whole."""
    try:
        expected = json.loads((checkpoint / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        found = list_checksums(checkpoint)
        for name, checksum in expected.items():
            if name not in found:
                return f"{name} is missing"
            if found[name]["bytes"] != checksum["bytes"]:
                return f"{name} has {found[name]['bytes']} bytes, {checksum['bytes']} were written"
            if found[name] != checksum:
                return f"{name} is not what was written (SHA-256)"
        return None if STATE_FILE in expected else f"{CHECKSUMS_FILE} lists no {STATE_FILE}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS_FILE} cannot be read ({error}); older versions wrote none"


def check_weights(model: nn.Module) -> None:
    """Raises a NonFiniteError, which names the first one, if a weight is infinite or NaN."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    # Stacked: one transfer from the device.
    are_finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    bad = [name for name, is_finite in zip(tensors, are_finite, strict=True) if not is_finite]
    if bad:
        raise NonFiniteError(f"{len(bad)} of {len(tensors)} weights are not finite, the first: {bad[0]}")


def save_finite(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Saves the model that users open. Raises a NonFiniteError if a weight is infinite or NaN: nobody could use it."""
    check_weights(model)
    model.save_pretrained(folder)


class CheckpointPart(Protocol):
    """A thing that a checkpoint holds beside model and optimizer."""

    def save(self, folder: Path) -> None:
        """Writes into a checkpoint; called in the main process."""

    def load(self, folder: Path) -> None:
        """Restores what was written; called in all processes."""


class TrainedModule(nn.Module):
    """A module around a model, which decides itself how it is saved."""

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the model that users open."""
        raise NotImplementedError

    def save_checkpoint(self, folder: Path) -> None:
        """Writes what `load_checkpoint` restores."""
        raise NotImplementedError

    def load_checkpoint(self, folder: Path) -> None:
        raise NotImplementedError


class Checkpoints:
    """
    Writes and reads `output_dir/checkpoint-STEP`: the model as `save_pretrained` leaves it, Accelerate's state of
    optimizer and gradient scaler, and the step. Only the main process writes. All processes read.

    A folder of that name is always whole, whenever a run is killed: it is written under another name, to the disk, and
    then renamed, which happens at once or not at all. It is renamed before it is deleted, for the same reason. A disk
    may still damage it later, so sizes and checksums are compared before it is used.

    Args:
        accelerator: has prepared model and optimizer.
        output_dir: where the folders are.
        save_total_limit: how many of the newest are kept; None keeps all.
        run_settings: all settings of the run. A checkpoint of another run is refused (see `check_same_run`).
        parts: what else is saved and restored.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | os.PathLike,
        save_total_limit: int | None,
        run_settings: dict[str, Any],
        parts: Sequence[CheckpointPart] = (),
    ):
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.save_total_limit = save_total_limit
        # As JSON gives them back, so that tuples and lists are alike.
        self.run_settings = json.loads(json.dumps(run_settings))
        self.parts = parts
        accelerator.register_save_state_pre_hook(self._save_model)
        accelerator.register_load_state_pre_hook(self._load_model)

    def start(self, resume_from: str | None) -> int:
        """
        Makes the output folder ready for a run that goes on from a checkpoint, or begins. Returns how many updates are
        done.

        Raises:
            CheckpointError: if there is none to go on from, or it is damaged or of another run.
        """
        checkpoint = self.choose(resume_from) if resume_from else None
        step = 0 if checkpoint is None else self.load(checkpoint)
        if self.accelerator.is_main_process:
            self.remove_leftovers()
            if not resume_from:
                self.remove_all()
                for name in RESULTS_OF_A_RUN:
                    (self.output_dir / name).unlink(missing_ok=True)
            elif step > 0:
                logger.info("Resuming from step %d.", step)
                self.remove_later(step)
            else:
                logger.info("No checkpoint in %s yet: starting from the beginning.", self.output_dir)
        return step

    def save(self, step: int) -> None:
        """
        Writes the checkpoint of `step`, then removes the oldest beyond the limit. All processes call it.

        Raises:
            CheckpointError: if it cannot be written.
            NonFiniteError: if a weight is not finite.
        """
        whole = self._gather() if self.accelerator.is_fsdp2 else None
        if self.accelerator.is_main_process:
            partial = self.output_dir / f".partial-checkpoint-{step}"
            final = self.output_dir / f"checkpoint-{step}"
            try:
                self._write(partial, final, step, whole)
            except NonFiniteError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            # torch and safetensors have errors of their own for a full disk.
            except (OSError, RuntimeError, ValueError, SafetensorError) as error:
                shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(
                    f"{final} cannot be written ({error}); {self.describe_newest()}. The disk has "
                    f"{shutil.disk_usage(self.output_dir).free >> 20} MiB left. Make room, then resume with "
                    "--resume_from_checkpoint latest."
                ) from error
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path) -> int:
        """Restores a checkpoint, and returns its step. Raises a CheckpointError if it is of another run."""
        state = read_json(checkpoint / STATE_FILE)
        with reading(checkpoint):
            check_same_run(str(checkpoint), state["run_settings"], self.run_settings)
            if self.accelerator.is_fsdp2:
                self._load_whole(checkpoint)
            else:
                self.accelerator.load_state(str(checkpoint))
            # Accelerate's count of batches, which it restores in the main process only: an update begins here, however
            # the batch was divided before.
            self.accelerator.step = 0
            for part in self.parts:
                part.load(checkpoint)
        if self.accelerator.is_main_process:
            for line in describe_changes(state["run_settings"], self.run_settings):
                logger.warning(line)
        return state["step"]

    def find(self, path: str) -> Path | None:
        """
        Finds the folder that "latest" or a path means. "latest" is the newest one that is whole; None if there is none
        at all.

        Raises:
            CheckpointError: if there is no checkpoint, or it is damaged; for "latest", if all are.
        """
        if path != "latest":
            if not (Path(path) / STATE_FILE).is_file():
                raise CheckpointError(
                    f"--resume_from_checkpoint {path}: no checkpoint there ({STATE_FILE} is missing)."
                )
            if damage := find_damage(Path(path)):
                raise CheckpointError(f"--resume_from_checkpoint {path}: it is damaged: {damage}.")
            return Path(path)
        checkpoints = list_checkpoints(self.output_dir)
        for checkpoint in reversed(checkpoints):
            damage = find_damage(checkpoint)
            if damage is None:
                return checkpoint
            logger.warning("%s is damaged, the one before it is used: %s.", checkpoint, damage)
        if checkpoints:
            raise CheckpointError(
                f"--resume_from_checkpoint latest: all checkpoints in {self.output_dir} are damaged (see above). "
                "Start anew with --overwrite_output_dir and without --resume_from_checkpoint."
            )
        return None

    def choose(self, path: str) -> Path | None:
        """As `find`, for all processes: one looks, so that all go on from the same."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = self.find(path)
            except CheckpointError as error:
                found[1] = str(error)
        checkpoint, message = broadcast_object_list(found)
        if message is not None:
            raise CheckpointError(message)
        return checkpoint

    def describe_newest(self) -> str:
        newest = next(reversed(list_checkpoints(self.output_dir)), None)
        return "there is no checkpoint yet" if newest is None else f"the last checkpoint is {newest}"

    def remove_all(self) -> None:
        """Removes every checkpoint."""
        for path in list_checkpoints(self.output_dir):
            self._remove(path)

    def remove_later(self, step: int) -> None:
        """Removes checkpoints after `step`: the run will make these updates again, perhaps with other results."""
        for path in list_checkpoints(self.output_dir):
            if int(path.name.split("-")[1]) > step:
                logger.warning("%s is removed: the run goes on from before it.", path)
                self._remove(path)

    def remove_leftovers(self) -> None:
        """Removes what interrupted runs left half written or half deleted."""
        for path in self.output_dir.glob(".partial-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _write(self, partial: Path, final: Path, step: int, whole: Whole | None) -> None:
        shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
        partial.mkdir(parents=True)
        if whole is None:
            self.accelerator.save_state(str(partial))
        else:
            self._write_whole(partial, *whole)
        for part in self.parts:
            part.save(partial)
        write_json(partial / STATE_FILE, {"step": step, "run_settings": self.run_settings})
        write_json(partial / CHECKSUMS_FILE, list_checksums(partial))
        sync_to_disk([*partial.rglob("*"), partial])
        if os.path.lexists(final):
            self._remove(final)
        partial.rename(final)
        sync_to_disk([final.parent])
        # Only now, so that a whole checkpoint is there at any time.
        for path in list_checkpoints(self.output_dir)[: -self.save_total_limit] if self.save_total_limit else []:
            self._remove(path)

    # Of a model that FSDP2 divides, a checkpoint has the same files as of others, so that a run may go on with or
    # without FSDP. Accelerate would write a part for each process, in a format that needs FSDP.
    def _gather(self) -> Whole:
        model, optimizer = self.accelerator._models[0], self.accelerator._optimizers[0]
        return gather_model(self.accelerator, model), gather_optimizer(self.accelerator, optimizer)

    def _write_whole(self, folder: Path, model: PreTrainedModel, optimizer: dict[str, Any]) -> None:
        save_finite(model, folder)
        torch.save(optimizer, folder / "optimizer.bin")
        # What is left is the state of the random numbers.
        save_accelerator_state(str(folder), [], [], [], [], self.accelerator.process_index, self.accelerator.step)

    def _load_whole(self, folder: Path) -> None:
        load_weights(self.accelerator._models[0], folder / "model.safetensors")
        load_optimizer(self.accelerator._optimizers[0], folder / "optimizer.bin")
        load_accelerator_state(str(folder), [], [], [], [], self.accelerator.process_index)

    # Accelerate calls these two instead of saving the model itself. In its own format a checkpoint of several
    # processes would not open in one, nor with `from_pretrained`.
    def _save_model(self, models: list, weights: list, output_dir: str) -> None:
        model = unwrap(self.accelerator, models[0])
        if isinstance(model, TrainedModule):
            check_weights(model)
            model.save_checkpoint(Path(output_dir))
        else:
            save_finite(model, output_dir)
        weights.clear()  # Accelerate would save what is left here, too

    def _load_model(self, models: list, input_dir: str) -> None:
        model = unwrap(self.accelerator, models.pop())  # taken away: Accelerate loads those that are left
        if isinstance(model, TrainedModule):
            model.load_checkpoint(Path(input_dir))
        else:
            load_model(model, Path(input_dir) / "model.safetensors")

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f".partial-{path.name}-old")
        path.rename(doomed)
        if doomed.is_dir() and not doomed.is_symlink():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()  # a link, or a file in the place of a checkpoint
