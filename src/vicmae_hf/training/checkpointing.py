"""Writes and reads checkpoints, from which a run goes on exactly where it was."""

import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from safetensors.torch import load_model
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..files import write_json


logger = logging.getLogger(__name__)

STATE_FILE = "training_state.json"
# These files say that a run is done, and with what. A run that begins anew must not find those of another.
RESULTS_OF_A_RUN = ("all_results.json", "train_files.txt")


class CheckpointError(InputError):
    """A checkpoint is missing, or belongs to another run; the message says which and why."""


def unwrap(accelerator: Accelerator, model: nn.Module) -> PreTrainedModel:
    """Returns the model as it was before Accelerate prepared it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Lists the folders `checkpoint-STEP`, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))  # as numbers: 900 comes before 1000


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
    optimizer, gradient scaler and random numbers, and the step.

    A folder of that name is always whole, whenever a run is killed: it is written under another name and then renamed,
    which happens at once or not at all. It is renamed before it is deleted, for the same reason.

    Args:
        accelerator: has prepared model and optimizer.
        output_dir: where the folders are.
        save_total_limit: how many of the newest are kept; None keeps all.
        run_settings: settings that decide the order of the data. A checkpoint of a run with other ones is refused.
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
        self.run_settings = run_settings
        self.parts = parts
        accelerator.register_save_state_pre_hook(self._save_model)
        accelerator.register_load_state_pre_hook(self._load_model)

    def start(self, resume_from: str | None) -> int:
        """
        Makes the output folder ready for a run that goes on from a checkpoint (see `load`), or begins. Returns how
        many updates are done.
        """
        if self.accelerator.is_main_process:
            self.remove_leftovers()
            if not resume_from:
                self.remove_all()
                for name in RESULTS_OF_A_RUN:
                    (self.output_dir / name).unlink(missing_ok=True)
        if not resume_from:
            return 0
        step = self.load(resume_from)
        if self.accelerator.is_main_process and step > 0:
            logger.warning("Going on from step %d.", step)
        elif self.accelerator.is_main_process:
            logger.warning("No checkpoint in %s yet: starting from the beginning.", self.output_dir)
        return step

    def save(self, step: int) -> None:
        """Writes the checkpoint of `step`, then removes the oldest beyond the limit. All processes call it."""
        partial = self.output_dir / f".partial-checkpoint-{step}"
        final = self.output_dir / f"checkpoint-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()  # every process writes its random state into the folder
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for part in self.parts:
                part.save(partial)
            write_json(partial / STATE_FILE, {"step": step, "run_settings": self.run_settings})
            if final.exists():
                self._remove(final)
            partial.rename(final)
            # Only now, so that a whole checkpoint is there at any time.
            for path in list_checkpoints(self.output_dir)[: -self.save_total_limit] if self.save_total_limit else []:
                self._remove(path)
        self.accelerator.wait_for_everyone()

    def load(self, path: str) -> int:
        """
        Restores a checkpoint, or for "latest" the newest, and returns its step; 0 if there is no latest. Raises a
        CheckpointError if it does not exist or comes from a run with other data, batch or seed.
        """
        checkpoint = self.find(path)
        if checkpoint is None:
            return 0
        state = json.loads((checkpoint / STATE_FILE).read_text())
        for name, value in self.run_settings.items():
            before = state["run_settings"].get(name)
            if before != value:
                raise CheckpointError(
                    f"{checkpoint} is of a run with {name} = {before}, this one has {value}: it cannot go on exactly "
                    "where that was. Use the same setting, or start anew from its weights with --model_name_or_path."
                )
        self.accelerator.load_state(str(checkpoint))
        for part in self.parts:
            part.load(checkpoint)
        return state["step"]

    def find(self, path: str) -> Path | None:
        """Finds the folder that "latest" or a path means; None if there is no latest."""
        if path == "latest":
            return next(reversed(list_checkpoints(self.output_dir)), None)
        if not (Path(path) / STATE_FILE).is_file():
            raise CheckpointError(f"--resume_from_checkpoint {path}: no checkpoint there ({STATE_FILE} is missing).")
        return Path(path)

    def remove_all(self) -> None:
        """Removes every checkpoint."""
        for path in list_checkpoints(self.output_dir):
            self._remove(path)

    def remove_leftovers(self) -> None:
        """Removes what interrupted runs left half written or half deleted."""
        for path in self.output_dir.glob(".partial-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    # Accelerate calls these two instead of saving the model itself. In its own format a checkpoint of several
    # processes would not open in one, nor with `from_pretrained`.
    def _save_model(self, models: list, weights: list, output_dir: str) -> None:
        if self.accelerator.is_main_process:
            model = unwrap(self.accelerator, models[0])
            if isinstance(model, TrainedModule):
                model.save_checkpoint(Path(output_dir))
            else:
                model.save_pretrained(output_dir)
        weights.clear()  # what is left here Accelerate would save, too

    def _load_model(self, models: list, input_dir: str) -> None:
        model = unwrap(self.accelerator, models.pop())  # taken away: Accelerate loads those that are left
        if isinstance(model, TrainedModule):
            model.load_checkpoint(Path(input_dir))
        else:
            load_model(model, Path(input_dir) / "model.safetensors")

    def _remove(self, path: Path) -> None:
        doomed = path.with_name(f".partial-{path.name}-old")
        path.rename(doomed)
        shutil.rmtree(doomed)
