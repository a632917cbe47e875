"""
Reads datasets on disk: the files that their official lists promise, and the files that are there.
Each dataset has a function, here or in a file of its name; docs/datasets.md shows the trees that they expect.

Official lists decide, and not what lies in a folder: a missing class would shift the indices of all others, and two
laboratories that miss different files would train and test on different data without knowing.
"""

import csv
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..sources.labelled import number_classes
from ..sources.listed_files import Folders
from ..sources.lists import (
    LABEL_NAMES,
    LINE,
    PATH_COLUMNS,
    TIME_COLUMNS,
    Columns,
    read_label_values,
    read_list,
    take_column,
)
from ..sources.selection import list_files
from ..sources.sources import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from .imagenet import list_imagenet
from .kinetics import list_kinetics
from .listing import (
    NO_LABEL,
    SPLIT_NAMES,
    Listing,
    Request,
    class_folders,
    find_list,
    find_media,
    find_one,
    index_files,
    index_of,
    list_class_folders,
    look_up,
    open_list,
    read_lines,
    relative_name,
)
from .something_something import list_something_something


logger = logging.getLogger(__name__)


def list_moments(request: Request) -> Listing:
    """
    Lists Moments in Time: `trainingSet.csv` and `validationSet.csv` (rows `class/file.mp4,label,votes for,votes
    against`), `moments_categories.txt` (rows `label,index`), and the folders `training` and `validation`.
    """
    folder, list_name = {"train": ("training", "trainingSet.csv"), "val": ("validation", "validationSet.csv")}[
        request.split
    ]
    path = find_list(request, [list_name, f"annotations/{list_name}"])
    class_names = indexed_classes(request, path, "moments_categories.txt", ",")
    indices = index_of(class_names)
    rows = []
    with open_list(path) as file:
        reader = csv.reader(file)
        for fields in filter(None, reader):
            where = f"{path}, line {reader.line_num}"
            if len(fields) < 2 or "/" not in fields[0]:
                raise InputError(f"{where}: expected class/file.mp4,label,..., got {','.join(fields)!r}.")
            rows.append((fields[0], look_up(fields[1], indices, where)))
    media = find_media(request, [folder])
    files = index_files(media, VIDEO_EXTENSIONS, partial(relative_name, media))
    return Listing(str(path), media, True, class_names, rows, files, "class/file.mp4")


def list_places(request: Request) -> Listing:
    """
    Lists Places365-Standard: `places365_train_standard.txt`, `places365_val.txt` (rows `path index`),
    `categories_places365.txt` (rows `/a/airfield 0`), images in `data_large` or `data_256`, `val_large` or `val_256`
    (torchvision renames the first two to `data_large_standard`, `data_256_standard`).
    """
    list_name = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}[request.split]
    folders = {
        "train": ["data_large", "data_large_standard", "data_256", "data_256_standard"],
        "val": ["val_large", "val_256"],
    }
    path = find_list(request, [list_name, f"filelist_places365-standard/{list_name}"])
    class_names = indexed_classes(request, path, "categories_places365.txt", " ")
    rows = []
    for where, line in read_lines(path):
        name, _, index = line.rpartition(" ")
        if not name or not index.isdecimal() or int(index) >= len(class_names):
            raise InputError(
                f"{where}: expected a path and a class index from 0 to {len(class_names) - 1}, got {line!r}."
            )
        rows.append((name.lstrip("/"), int(index)))  # the training list begins its paths with a slash
    media = find_media(request, folders[request.split])
    files = index_files(media, IMAGE_EXTENSIONS, partial(relative_name, media))
    example = "a/airfield/00000001.jpg" if request.split == "train" else "Places365_val_00000001.jpg"
    return Listing(str(path), media, False, class_names, rows, files, example)


def indexed_classes(request: Request, list_path: Path, name: str, separator: str) -> list[str]:
    """Reads the classes from a file of rows NAME, separator, INDEX beside the list or under the root."""
    if request.class_names is not None:
        return list(request.class_names)
    path = find_one([list_path.parent, Path(request.root)], [name], "list of classes")
    names = {}
    for where, line in read_lines(path):
        class_name, _, index = line.rpartition(separator)
        # An index or a name that comes twice would shift or merge classes without an error later on.
        if not class_name or not index.isdecimal() or int(index) in names or class_name in names.values():
            raise InputError(f"{where}: expected NAME{separator}INDEX, each of them once, got {line!r}.")
        names[int(index)] = class_name
    if not names or sorted(names) != list(range(len(names))):
        raise InputError(f"{path}: expected the indices 0 to N-1, got {len(names)} up to {max(names, default=None)}.")
    return [names[index] for index in range(len(names))]


def list_folder(request: Request) -> Listing:
    """
    Lists ROOT/CLASS_NAME/FILE, or with splits ROOT/SPLIT/CLASS_NAME/FILE. The sorted names of the folders are the
    class order. If there is ROOT/train, its folders decide for every split. Folders without media are no classes.
    """
    media = find_media(request, SPLIT_NAMES[request.split] if request.split else ["."])
    training = Path(request.root, "train")
    class_names = request.class_names or class_folders(training if request.split and training.is_dir() else media)
    # One kind of file in a table, whose column is of type Video or Image.
    suffixes = {os.path.splitext(path)[1].lower() for path in list_files(Path(media))}
    if suffixes & VIDEO_EXTENSIONS and suffixes & IMAGE_EXTENSIONS:
        raise InputError(f"{media}: holds both videos and images; prepare them from separate folders.")
    extensions = VIDEO_EXTENSIONS if suffixes & VIDEO_EXTENSIONS else IMAGE_EXTENSIONS
    return list_class_folders(media, list(class_names), extensions, partial(relative_name, media))


def list_listed(request: Request) -> Listing:
    """
    Lists what a list of the user's names, in any form that is read elsewhere (see `lists.py`). Its paths begin in the
    root. Classes have the order of the sorted names; labels that are numbers are indices.
    """
    if request.annotations is None:
        raise InputError("--dataset list: expected the list as --annotations FILE; its paths are relative to --root.")
    if not Path(request.root).is_dir():
        raise InputError(f"--root {request.root}: expected the folder that the list's paths are relative to.")
    path, media = Path(request.annotations), find_media(request, ["."])
    columns = read_list(path)
    written = take_column(path, columns, PATH_COLUMNS)
    if written is None or any(name in columns for names in TIME_COLUMNS.values() for name in names):
        raise InputError(
            f"{path}: expected paths of whole files; give a list of parts of files to the commands directly."
        )
    labels, class_names = label_rows(path, columns, len(written))
    if request.class_names is not None:
        indices = index_of(request.class_names)
        if class_names is not None:
            mapping = [look_up(class_name, indices, str(path)) for class_name in class_names]
            labels = [NO_LABEL if label < 0 else mapping[label] for label in labels]
        elif max(labels) >= len(indices):
            raise InputError(f"{path}: has the class index {max(labels)}, but there are {len(indices)} class names.")
        class_names = list(request.class_names)
    suffixes = {os.path.splitext(name)[1].lower() for name in written}
    if suffixes & VIDEO_EXTENSIONS and suffixes & IMAGE_EXTENSIONS:
        raise InputError(f"{path}: names both videos and images; prepare them from separate lists.")
    extensions = VIDEO_EXTENSIONS if suffixes & VIDEO_EXTENSIONS else IMAGE_EXTENSIONS
    files = index_files(media, extensions, partial(relative_name, media))
    folders, rows = Folders(), []
    for name, label in zip(written, labels, strict=True):
        file = folders.find(os.path.join(media, name))
        if file is not None:  # by one name, in whatever way the list writes it
            file = os.path.normpath(file)
            name = relative_name(media, file) if file.startswith(media + os.sep) else file
            files[name] = [file]
        rows.append((name, label))
    names = class_names or number_classes(np.array(labels))
    return Listing(str(path), media, extensions is VIDEO_EXTENSIONS, names, rows, files, written[0])


def label_rows(path: Path, columns: Columns, num_rows: int) -> tuple[list[int], list[str] | None]:
    """Reads the class index of each row of a list, `NO_LABEL` for none, and the names of classes that have some."""
    values = take_column(path, columns, LABEL_NAMES)
    if values is None:
        found = ", ".join(column for column in columns if column != LINE)
        logger.warning("%s: has no column %s, but %s; so no item gets a label.", path, " or ".join(LABEL_NAMES), found)
        return [NO_LABEL] * num_rows, None
    labels, class_names = read_label_values(path, columns[LINE], values)
    if labels.ndim == 2:
        raise InputError(f"{path}: its items may have several labels each; give the list to the commands directly.")
    return labels.tolist(), class_names


@dataclass(frozen=True)
class Layout:
    """A dataset: its title, the function that lists it, and its splits (None: a folder without splits)."""

    title: str
    list_items: Callable[[Request], Listing]
    splits: tuple[str | None, ...]


LAYOUTS = {
    "kinetics400": Layout(
        "Kinetics-400", partial(list_kinetics, official_classes="kinetics400"), ("train", "val", "test")
    ),
    "kinetics600": Layout("Kinetics-600", partial(list_kinetics, official_classes=600), ("train", "val", "test")),
    "kinetics700": Layout("Kinetics-700", partial(list_kinetics, official_classes=700), ("train", "val", "test")),
    "ssv2": Layout("Something-Something v2", list_something_something, ("train", "val", "test")),
    "moments": Layout("Moments in Time", list_moments, ("train", "val")),
    "imagenet": Layout("ImageNet-1K", list_imagenet, ("train", "val")),
    "places365": Layout("Places365", list_places, ("train", "val")),
    "list": Layout("List", list_listed, ("train", "val", "test", None)),
    "folder": Layout("Labelled folder", list_folder, ("train", "val", "test", None)),
}
