"""What the datasets share: what is asked for, what a list promises, and how lists, files and classes are found."""

import csv
import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ...errors import InputError
from ..sources.labelled import find_classes, read_class_names
from ..sources.selection import list_files
from ..sources.sources import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


OFFICIAL_CLASS_NAMES = Path(__file__).parent / "class_names"
# Names of a split in folders, in lists and in a list's own column.
SPLIT_NAMES = {"train": ["train"], "val": ["val", "validate", "validation"], "test": ["test"]}
NO_LABEL = -1  # `datasets` stores a missing ClassLabel so


@dataclass(frozen=True)
class Request:
    """
    Where a dataset is on disk.

    Args:
        root: its folder; ImageNet's may also be a Parquet file, a folder of them, or a dataset's name on the Hub.
        split: "train", "val" or "test"; None for a plain labelled folder without splits.
        annotations: the list of the split; None looks for it under `root`.
        media: the folder of the split's files; None looks for it under `root`.
        class_names: the classes in the order of their indices; None takes the official order.
    """

    root: str
    split: str | None = None
    annotations: str | None = None
    media: str | None = None
    class_names: Sequence[str] | None = None


@dataclass(frozen=True)
class Listing:
    """
    The files that a list promises, and the files that are there.

    Args:
        source: the list, or the folder that stands for it.
        media: the folder of the files.
        is_video: whether the files are videos; images otherwise.
        class_names: in the order of their indices.
        rows: rows of the list, in its order: the name (id) of a file and its class index, `NO_LABEL` where the list of
            a test split has none.
        files: the paths of all files in `media`, by name.
        example: the path of a listed file below `media`, for messages.
        listed_elsewhere: names in the lists of other splits, if their files are in the same folder.
    """

    source: str
    media: str
    is_video: bool
    class_names: list[str]
    rows: list[tuple[str, int]]
    files: dict[str, list[str]]
    example: str
    listed_elsewhere: frozenset[str] = frozenset()


def list_class_folders(
    media: str, class_names: list[str], extensions: frozenset[str], name_of: Callable[[str], str]
) -> Listing:
    """Lists files in folders of classes. No list says what should be there, so the files are their own list."""
    indices = index_of(class_names)
    folders = class_folders(media)
    if not folders:
        expected = ", ".join([*class_names[:2], "..."]) if class_names else "CLASS_NAME/FILE"
        raise InputError(f"{media}: expected folders of classes ({expected}), found none.")
    for folder in folders:
        look_up(folder, indices, os.path.join(media, folder))
    files = index_files(media, extensions, name_of)
    rows = []
    for name, paths in files.items():
        places = [relative_name(media, path).split("/") for path in paths]
        # A name in two classes makes two rows, which `match_files` reports as a contradiction.
        rows += [(name, label) for label in dict.fromkeys(indices[place[0]] for place in places if len(place) == 2)]
    is_video = extensions is VIDEO_EXTENSIONS
    return Listing(media, media, is_video, class_names, rows, files, f"{class_names[0]}/FILE")


def class_folders(media: str | Path) -> list[str]:
    extensions = VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
    files = [path for path in list_files(Path(media)) if os.path.splitext(path)[1].lower() in extensions]
    return find_classes(Path(media), files)


def read_official_class_names(name: str) -> list[str]:
    """Reads the classes of "kinetics400", "ssv2" or "imagenet" (synset ids) in the order of their indices."""
    return read_class_names(OFFICIAL_CLASS_NAMES / f"{name}.txt")


def index_of(class_names: Iterable[str]) -> dict[str, int]:
    return {class_name: index for index, class_name in enumerate(class_names)}


def look_up(class_name: str, indices: dict[str, int], where: str) -> int:
    """Returns the index of a class. An error says `where` the class was found."""
    if class_name not in indices:
        near = difflib.get_close_matches(class_name, indices, n=1)
        hint = f" Did they mean {near[0]!r}?" if near else ""
        first = ", ".join(list(indices)[:2])
        raise InputError(f"{where}: unknown class {class_name!r}, expected one of {len(indices)}: {first}, ....{hint}")
    return indices[class_name]


def find_list(request: Request, names: list[str]) -> Path:
    if request.annotations is not None:
        return Path(request.annotations)
    return find_one([Path(request.root)], names, f"list of the split {request.split!r}", "--annotations")


def find_media(request: Request, names: list[str]) -> str:
    """Finds the folder of the split's files; returns its absolute path."""
    if request.media is None:
        folder = find_one([Path(request.root)], names, f"folder of the split {request.split!r}", "--media")
    else:
        folder = Path(request.media)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of media files.")
    return os.path.abspath(folder)


def find_one(folders: list[Path], names: list[str], what: str, flag: str | None = None) -> Path:
    """
    Finds the one of `names` that is in one of `folders`.

    Raises:
        InputError: if there is none, or there are several. It says what was looked for and which flag chooses.
    """
    # By real paths, because a folder and a link to it are one.
    paths = {os.path.realpath(folder / name): folder / name for folder in folders for name in names}
    found = [path for path in paths.values() if path.exists()]
    if len(found) == 1:
        return found[0]
    choice = f" Choose with {flag}." if flag else ""
    if found:
        raise InputError(
            f"{folders[0]}: several files or folders could be the {what}: {', '.join(map(str, found))}.{choice}"
        )
    raise InputError(f"{folders[0]}: {what} not found; expected {' or '.join(names)} there.{choice}")


def index_files(media: str, extensions: frozenset[str], name_of: Callable[[str], str]) -> dict[str, list[str]]:
    """Lists the paths of all files in `media`, at any depth, by name."""
    files = {}
    for path in list_files(Path(media)):
        if os.path.splitext(path)[1].lower() in extensions:
            files.setdefault(name_of(path), []).append(path)
    return files


def stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def relative_name(media: str, path: str) -> str:
    return path[len(media.rstrip(os.sep)) + 1 :].replace(os.sep, "/")


@contextmanager
def open_list(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # -sig: some lists begin with a byte order mark
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a list ({error}).") from error


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields for each line its place (file and number) and its text; leaves out empty lines."""
    with open_list(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", line.strip()


def read_json(path: Path) -> list | dict:
    with open_list(path) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: is not valid JSON ({error.msg}).") from error
