"""Keeps the best model of a run so far, where the run leaves its model."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from ..files import read_json, write_json, writing
from ..training.checkpointing import sync_to_disk


class BestModel:
    """
    Keeps the model with the highest `eval_top1`, or `eval_map`, in `output_dir`; of equal ones the first. A
    figure that is NaN, as `eval_map` where no evaluated file has a label, is below all others.

    It is a part of checkpoints (see `CheckpointPart`). So a resumed run compares with the best model before the
    interruption, and still has it.

    Args:
        save_model: writes the model that is being trained into a folder.

    Attributes:
        figures: figures of the best evaluation, as `update` got them; none before the first.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, save_model: Callable[[Path], None]):
        self.accelerator = accelerator
        self.output_dir = output_dir
        self.save_model = save_model
        self.figures: dict[str, float] = {}
        self.files: list[str] = []

    def update(self, figures: dict[str, float]) -> None:
        """Compares an evaluation with the best one. All processes call it with the same figures."""
        compared = "eval_top1" if "eval_top1" in figures else "eval_map"
        new, best = figures[compared], self.figures.get(compared, math.nan)
        is_better = new > best or (math.isnan(best) and not math.isnan(new))
        if self.figures and not is_better:
            return
        self.figures = figures
        if self.accelerator.is_main_process:
            # Under another name first and then renamed: whenever the run is killed, a file that is there is whole.
            partial = self.output_dir / ".partial-best"
            shutil.rmtree(partial, ignore_errors=True)
            with writing(partial):
                self.save_model(partial)
                sync_to_disk(partial.iterdir())
            self.files = sorted(path.name for path in partial.iterdir())
            # File by file, because the folder holds other files of the run.
            for name in self.files:
                (partial / name).replace(self.output_dir / name)
            partial.rmdir()
        self.accelerator.wait_for_everyone()  # the files are there when any process goes on

    def save(self, folder: Path) -> None:
        # A copy, because the output folder goes on to better models while the checkpoint stays as it is.
        best = folder / "best"
        best.mkdir()
        for name in self.files:
            shutil.copyfile(self.output_dir / name, best / name)
        write_json(folder / "best.json", self.figures)

    def load(self, folder: Path) -> None:
        self.figures = read_json(folder / "best.json")
        self.files = sorted(path.name for path in (folder / "best").iterdir() if path.is_file())
        if self.accelerator.is_main_process:
            for name in self.files:
                partial = self.output_dir / f".partial-{name}"
                shutil.copyfile(folder / "best" / name, partial)
                partial.replace(self.output_dir / name)
        self.accelerator.wait_for_everyone()
