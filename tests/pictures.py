"""Pictures of runs: drawn only where a test looks at them. In a tiny run, drawing takes most of the time."""

from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from matplotlib.figure import Figure
from PIL import Image

from vicmae_hf.files import partial_file
from vicmae_hf.reports import plots


draw = plots.save_picture


def leave_blank(figure: Figure, path: str | Path) -> None:
    """In place of `save_picture`: a file at the same place, of one pixel."""
    with partial_file(Path(path)) as partial:
        Image.new("L", (1, 1)).save(partial, "PNG")


def drawn() -> AbstractContextManager:
    return mock.patch.object(plots, "save_picture", draw)


def blank() -> AbstractContextManager:
    return mock.patch.object(plots, "save_picture", leave_blank)


def are_blank() -> bool:
    return plots.save_picture is leave_blank
