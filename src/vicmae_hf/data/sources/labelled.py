"""Labelled media: folders ROOT/CLASS_NAME/FILE, and tables with a column of labels."""

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np

from ...errors import InputError
from ..media.reading import MediaItem
from .sources import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    MediaSource,
    is_saved_dataset,
    list_files,
    open_source,
    table_of_paths,
)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledSource:
    """
    Labelled videos and images, or a part of them.

    Args:
        name: as the user gave it.
        items: all items of the source.
        all_labels: their class indices, int64.
        class_names: `class_names[label]` is the name of a class.
        indices: which of the items are in this part, in order.
    """

    name: str
    items: Sequence[MediaItem]
    all_labels: np.ndarray
    class_names: list[str]
    indices: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Class index of each item of this part, `(len(self),)`."""
        return self.all_labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> MediaItem:
        return self.items[int(self.indices[index])]

    def list_names(self) -> list[str]:
        """Names the items of this part within the source."""
        names = self.items.list_names()
        return [names[index] for index in self.indices]

    def select(self, indices: Sequence[int]) -> "LabelledSource":
        """Returns the part of this part at `indices`."""
        return replace(self, indices=self.indices[np.asarray(indices, dtype=np.int64)])


def open_labelled(
    name: str | os.PathLike, class_names: Sequence[str] | None = None, known_from: str = "the model"
) -> LabelledSource:
    """
    Opens a folder ROOT/CLASS_NAME/FILE, or any dataset or frame store with a column of type ClassLabel.

    Args:
        name: see `open_source`.
        class_names: the classes in the order of their indices, as a model has them. Default: sorted names of a
            folder's classes, the order of the ClassLabel of a dataset.
        known_from: the owner of these classes, as messages call it.

    Raises:
        InputError: if the source does not exist, is empty or has no labels, or has classes that `class_names` lacks.
    """
    name = os.fspath(name)
    folder = Path(name).expanduser()
    is_folder = folder.is_dir() and not is_saved_dataset(folder)
    source = open_labelled_folder(name, folder) if is_folder else None
    if source is None:  # also a folder that holds only Parquet files
        source = open_source(name)
    if source.labels is None:
        raise InputError(f"{name}: has no labels; expected ROOT/CLASS_NAME/FILE or a column of type ClassLabel.")
    # Training would take -1 for the last class or fail late, so we refuse here.
    without = np.flatnonzero(source.labels < 0)
    if len(without):
        raise InputError(
            f"{name}: {len(without)} of {len(source)} items have no label, the first: {source[int(without[0])].name}. "
            "Label them or leave them out."
        )
    labels = source.labels if class_names is None else relabel(source, class_names, known_from)
    names = source.class_names if class_names is None else list(class_names)
    return LabelledSource(name, source, labels, names, np.arange(len(source)))


def open_labelled_folder(name: str, folder: Path) -> MediaSource | None:
    """
    Opens videos and images of `folder/CLASS_NAME/FILE`. Class indices follow sorted names. A class without files keeps
    its index. Files elsewhere have no class, and a warning counts them. Returns None if no file has a class.
    """
    extensions = VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
    media = [path for path in list_files(folder) if os.path.splitext(path)[1].lower() in extensions]
    # Names of folders, not of files found: else a class that lacks files would shift the indices of all others.
    class_names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    places = [path.removeprefix(str(folder) + os.sep).split(os.sep) for path in media]
    rows = [(path, labels[place[0]]) for path, place in zip(media, places, strict=True) if len(place) == 2]
    if not rows:
        return None
    if len(rows) < len(media):
        first = next(path for path, place in zip(media, places, strict=True) if len(place) != 2)
        logger.warning(
            "%s: left out %d files that are not FOLDER/CLASS_NAME/FILE, the first: %s",
            name,
            len(media) - len(rows),
            first,
        )
    paths, labels = map(list, zip(*rows, strict=True))
    table = table_of_paths(name, paths, labels, label=datasets.ClassLabel(names=class_names))
    return MediaSource(name, table, "path")


def relabel(source: MediaSource, class_names: Sequence[str], known_from: str) -> np.ndarray:
    """Returns the labels of a source as indices into `class_names`. `known_from` names their owner in an error."""
    # Only classes that occur: a dataset's list of names may be longer than what its files use.
    used = [source.class_names[label] for label in np.unique(source.labels)]
    unknown = [class_name for class_name in used if class_name not in class_names]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise InputError(
            f"{source.name}: {len(unknown)} classes are unknown to {known_from}: {shown}. Expected some of its "
            f"{len(class_names)}: {', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}."
        )
    # -1 stands for classes that do not occur, so no label becomes -1.
    positions = {class_name: index for index, class_name in enumerate(class_names)}
    mapping = np.array([positions.get(class_name, -1) for class_name in source.class_names], dtype=np.int64)
    return mapping[source.labels]


def read_class_names(path: str | os.PathLike) -> list[str]:
    """
    Reads class names from a text file, one a line, in the order of their indices.

    Raises:
        InputError: if it cannot be read, is empty, or names a class twice.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of class names, one a line ({error}).") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise InputError(f"{path}: expected class names, each once, got {f'{twice[0]!r} twice' if twice else 'none'}.")
    return names


def format_list(names: Iterable[str], class_names: Iterable[str]) -> str:
    """
    Lists labelled files as lines `name<TAB>class name`, sorted by code points. Two groups of files have the same
    SHA-256 of this list exactly if they have the same files under the same classes. Neither place nor order matters.
    """
    return "".join(sorted(f"{name}\t{class_name}\n" for name, class_name in zip(names, class_names, strict=True)))
