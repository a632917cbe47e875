"""Labelled media: folders ROOT/CLASS_NAME/FILE, lists, and tables with a column of labels."""

import copy
import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...errors import InputError
from ...settings import setting
from ..media.reading import MediaItem
from .frame_store import FrameStoreSource
from .label_lists import has_no_label, renumber, to_targets, used_classes
from .lists import ListedSource
from .selection import finish_source, list_files, select_media, table_of_paths
from .sources import MediaSource, SourceSettings, is_saved_dataset, open_source


logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class LabelledSource:
    """
    Labelled videos and images, or a part of them.

    Args:
        name: as the user gave it.
        items: all items of the source.
        all_labels: their class indices, int64 `(N,)`; or, where items may have several, targets, int8 `(N, C)`, which
            are 1 where an item has the class and else 0.
        class_names: `class_names[label]` is the name of a class.
        indices: which of the items are in this part, in order.
        has_names: False if the labels are indices that nobody named; the names are then "0", "1", ...
    """

    name: str
    items: Sequence[MediaItem]
    all_labels: np.ndarray
    class_names: list[str]
    indices: np.ndarray
    has_names: bool = True

    @property
    def labels(self) -> np.ndarray:
        """Class index of each item of this part, `(len(self),)`, or its targets, `(len(self), C)`."""
        return self.all_labels[self.indices]

    @property
    def is_multi_label(self) -> bool:
        """Whether items may have several labels."""
        return self.all_labels.ndim == 2

    def with_targets(self) -> "LabelledSource":
        """Returns the same with targets in place of class indices: each item has one of several possible labels."""
        return replace(self, all_labels=to_targets(self.all_labels, len(self.class_names)))

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


@dataclass(kw_only=True)
class CheckpointSourceSettings(SourceSettings):
    """Settings of data for a checkpoint, which says how images were read when it was trained."""

    image_range: str | None = setting(
        None,
        "values that become black and white in images of more than 8 bits: type, file or LOW,HIGH (docs/data.md); "
        "default: the checkpoint's",
    )


@dataclass(kw_only=True)
class HeldOutSettings(CheckpointSourceSettings):
    """Settings of data to train on, and of data to evaluate on."""

    eval_split: str | None = setting(None, "split of eval_data, if it is on the Hub; default: validation")

    @property
    def of_evaluation(self) -> SourceSettings:
        settings = copy.copy(self)  # with settings of subclasses, such as how many files may be missing
        settings.split = self.eval_split or "validation"
        return settings


def open_labelled(
    name: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    known_from: str = "the model",
    settings: SourceSettings | None = None,
) -> LabelledSource:
    """
    Opens a folder ROOT/CLASS_NAME/FILE, a list of labelled files, or any dataset or frame store with a column of
    labels.

    Args:
        name: see `open_source`.
        class_names: the classes in the order of their indices, as a model has them. Default: sorted names, or the
            order of the ClassLabel of a dataset. Labels that are numbers are indices into them.
        known_from: the owner of these classes, as messages call it.

    Raises:
        InputError: if the source does not exist, is empty or has no labels, or has classes that `class_names` lacks.
    """
    name = os.fspath(name)
    folder = Path(name).expanduser()
    is_folder = folder.is_dir() and not is_saved_dataset(folder)
    settings = SourceSettings() if settings is None else settings
    source = open_labelled_folder(name, folder, settings) if is_folder else None
    has_folders = source is not None  # not if it holds only Parquet files
    source = finish_source(source, settings) if has_folders else open_source(name, settings)
    if source.labels is None:
        raise InputError(f"{name}: has no labels; expected {describe_labels(source)}.")
    # Training would take -1 for the last class or fail late, so we refuse here.
    without = np.flatnonzero(has_no_label(source.labels))
    if len(without):
        raise InputError(
            f"{name}: {len(without)} of {len(source)} items have no label, the first: {source[int(without[0])].name}. "
            "Label them or leave them out."
        )
    names = number_classes(source.labels) if source.class_names is None else source.class_names
    has_names = source.class_names is not None and (has_folders or not are_numbers(source.class_names))
    labelled = LabelledSource(name, source, source.labels, names, np.arange(len(source)), has_names)
    used = used_classes(source.labels)
    if labelled.is_multi_label:
        if not len(used):
            raise InputError(f"{name}: all its lists of labels are empty.")
        logger.warning("%s: an item may have several labels, of %d classes.", name, len(names))
    if class_names is not None:
        return with_class_names(labelled, class_names, known_from)
    if source.class_names is None and len(used) < len(names):
        first = np.setdiff1d(np.arange(len(names)), used)[0]
        logger.warning("%s: %d classes by its largest index, but class %d has no file.", name, len(names), first)
    return labelled


def open_with_labels(
    name: str | os.PathLike,
    labelled: bool,
    class_names: Sequence[str] | None = None,
    known_from: str = "the class names",
    settings: SourceSettings | None = None,
) -> LabelledSource | MediaSource | FrameStoreSource:
    """
    Opens data with the labels that it has, for those who keep labels but need none. It is `open_labelled` if
    `labelled`, else all items of `open_source`, where -1 stands for no label. Metadata files beside media give labels;
    names of folders do not, and a message says so.

    Raises:
        InputError: as these do; if there are `class_names` and no labels.
    """
    if labelled:
        return open_labelled(name, class_names, known_from, settings)
    settings = SourceSettings() if settings is None else settings
    whole = copy.copy(settings)  # segments get their labels when all items have theirs
    whole.segment_seconds = None
    source = open_source(name, whole)
    folder = Path(source.name).expanduser()
    if source.labels is None and folder.is_dir() and not is_saved_dataset(folder) and "path" in source.table.features:
        source = add_metadata(source, folder, settings)
    if class_names is not None:
        if source.labels is None:
            raise InputError(
                f"{source.name}: has no labels for {known_from} to name; expected {describe_labels(source)}."
            )
        name_classes(source, class_names, known_from)
    return finish_source(source, settings)


def add_metadata(source: MediaSource, folder: Path, settings: SourceSettings) -> MediaSource:
    """Returns the media of a folder with the labels of metadata files, if there are any."""
    media = source.table["path"][:]
    if metadata := find_metadata(folder, media):
        from .lists import open_metadata  # imported here, because few have such files

        try:
            return open_metadata(source.name, metadata, media, settings, keep_all=True) or source
        except InputError as error:
            logger.warning("%s: labels of metadata files are left out (%s)", source.name, error)
    elif all(len(path.removeprefix(str(folder) + os.sep).split(os.sep)) == 2 for path in media):
        logger.info("%s: is read without labels; --labelled takes its folders as classes.", source.name)
    return source


def name_classes(source: MediaSource | FrameStoreSource, class_names: Sequence[str], known_from: str) -> None:
    """Turns the labels of a source into indices into `class_names` (see `with_class_names`). Some may be missing."""
    names = number_classes(source.labels) if source.class_names is None else source.class_names
    rows = np.flatnonzero(~has_no_label(source.labels))
    labels = LabelledSource(source.name, source, source.labels[rows], names, rows, not are_numbers(source.class_names))
    named = with_class_names(labels, class_names, known_from)
    source.labels = np.full((len(source), *named.all_labels.shape[1:]), -1, dtype=named.all_labels.dtype)
    source.labels[rows], source.class_names = named.all_labels, named.class_names


def describe_labels(source: MediaSource | FrameStoreSource) -> str:
    """Says where labels could come from, for a source without."""
    if isinstance(source, FrameStoreSource):
        return "a store that was packed with --labelled, or --label_column"
    if isinstance(source, ListedSource):
        return "lines of `path label`, or a column called `label`; name another with --label_column"
    if source.table.column_names == ["path"]:
        return "ROOT/CLASS_NAME/FILE, or a list of `path label`, or with --frame_folders ROOT/CLASS_NAME/VIDEO/FRAME"
    return "a column of type ClassLabel or one called `label`; name another with --label_column"


def number_classes(labels: np.ndarray) -> list[str]:
    """Names classes that have only indices: "0", "1", ..., to the largest of `labels`, `(N,)` or `(N, C)`."""
    largest = int(labels.max(initial=-1)) if labels.ndim == 1 else labels.shape[1] - 1
    return [str(label) for label in range(largest + 1)]


def are_numbers(class_names: Sequence[str] | None) -> bool:
    """
    Whether classes have no names but their indices. Stores and prepared tables of lists with indices call them "0",
    "1", ...
    """
    return class_names is None or list(class_names) == [str(label) for label in range(len(class_names))]


def open_labelled_folder(name: str, folder: Path, settings: SourceSettings) -> MediaSource | None:
    """
    Opens videos and images beside a metadata file with labels, or of `folder/CLASS_NAME/FILE`. Class indices follow
    sorted names. Files elsewhere have no class, and a warning counts them. Returns None if no file has a class.
    """
    media = select_media(name, list_files(folder), settings.frame_folders)
    metadata = find_metadata(folder, media)
    if metadata:
        from .lists import open_metadata  # imported here, because few have such files

        source = open_metadata(name, metadata, media, settings)
        if source is not None:
            return source
    class_names = find_classes(folder, media)
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    places = [path.removeprefix(str(folder) + os.sep).split(os.sep) for path in media]
    rows = [(path, labels[place[0]]) for path, place in zip(media, places, strict=True) if len(place) == 2]
    if not rows:
        return None
    if settings.label_column is not None:  # it may be that of other data, such as a list to evaluate on
        message = "%s: has no column %r (--label_column) beside its files; its folders are the classes."
        logger.warning(message, name, settings.label_column)
    if len(rows) < len(media):
        first = next(path for path, place in zip(media, places, strict=True) if len(place) != 2)
        logger.warning(
            "%s: left out %d files that are not FOLDER/CLASS_NAME/FILE, the first: %s. To use them, name each in a "
            "list of `path label`.",
            name,
            len(media) - len(rows),
            first,
        )
    paths, labels = map(list, zip(*rows, strict=True))
    return MediaSource(name, table_of_paths(name, paths), "path", None, np.array(labels), class_names)


def find_classes(folder: Path, media: Sequence[str]) -> list[str]:
    """
    Finds the classes of ROOT/CLASS_NAME/FILE, sorted. Folders without media (annotations, what is left of an archive)
    are no classes, and a warning names them. Folders with media in deeper folders only are none, either; their files
    are counted by who opens the others.
    """
    root = str(folder) + os.sep
    places = [path.removeprefix(root).split(os.sep) for path in media]
    class_names = sorted({place[0] for place in places if len(place) == 2})
    entries = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    others = sorted(set(entries) - {place[0] for place in places if len(place) >= 2})
    if class_names and others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        logger.warning("%s: %d folders without videos or images are no classes: %s", folder, len(others), shown)
    return class_names


def find_metadata(folder: Path, media: Sequence[str]) -> list[Path]:
    """Finds the metadata files (the layout of VideoFolder and ImageFolder of `datasets`) in the folders of media."""
    folders = {Path(path) for path in {os.path.dirname(path) for path in media}}
    folders |= {parent for path in folders for parent in path.parents if parent.is_relative_to(folder)}
    # From the outermost on: the file that is nearest to a video has the last word.
    candidates = [path / name for path in sorted(folders) for name in METADATA_FILES]
    return [path for path in candidates if path.is_file()]


def with_class_names(source: LabelledSource, class_names: Sequence[str], known_from: str) -> LabelledSource:
    """
    Turns labels into indices into `class_names`, by name; where they have no names, they are such indices. Raises an
    InputError, which calls the owner of these classes `known_from`, for classes that it lacks.
    """
    class_names = list(class_names)
    # Only classes that occur: a dataset's list of names may be longer than what its files use.
    used = [source.class_names[label] for label in used_classes(source.all_labels)]
    if not source.has_names and not set(used) <= set(class_names):  # else the classes are called by numbers
        largest = int(used_classes(source.all_labels).max())
        if largest >= len(class_names):
            raise InputError(
                f"{source.name}: has the class index {largest}, but {known_from} has {len(class_names)} classes, 0 to "
                f"{len(class_names) - 1}."
            )
        labels = to_targets(source.all_labels, len(class_names)) if source.is_multi_label else source.all_labels
        return replace(source, all_labels=labels, class_names=class_names, has_names=True)
    positions = {compose(class_name): index for index, class_name in enumerate(class_names)}
    positions |= {class_name: index for index, class_name in enumerate(class_names)}
    unknown = [class_name for class_name in used if not {class_name, compose(class_name)} & positions.keys()]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise InputError(
            f"{source.name}: {len(unknown)} classes are unknown to {known_from}: {shown}. Expected some of its "
            f"{len(class_names)}: {', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''}."
        )
    # -1 stands for classes that do not occur, so no label becomes -1.
    mapping = np.array(
        [positions.get(name, positions.get(compose(name), -1)) for name in source.class_names], dtype=np.int64
    )
    labels = renumber(source.all_labels, mapping, len(class_names))
    return replace(source, all_labels=labels, class_names=class_names, has_names=True)


def match_labels(source: LabelledSource, is_multi_label: bool, owner: str) -> LabelledSource:
    """
    Returns a source with the kind of labels of a classifier, which the message calls `owner`. Raises an InputError if
    items may have several, and the classifier gives one.
    """
    if is_multi_label and not source.is_multi_label:
        return source.with_targets()
    if not is_multi_label:
        refuse_several_labels(source, owner)
    return source


def refuse_several_labels(source: LabelledSource, what: str) -> None:
    """Raises an InputError if items may have several labels, where `what` needs one of each."""
    if source.is_multi_label:
        raise InputError(f"{source.name}: its items may have several labels each, and {what} needs one of each.")


def compose(name: str) -> str:
    """Composes letters with marks, for which Unicode has two forms: file systems and editors may take either."""
    return unicodedata.normalize("NFC", name)


def read_class_names(path: str | os.PathLike) -> list[str]:
    """
    Reads class names from a text file, one a line, in the order of their indices.

    Raises:
        InputError: if it cannot be read, is empty, or names a class twice.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
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
