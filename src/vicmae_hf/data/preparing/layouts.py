"""
Reads datasets on disk: the files that their official lists promise, and the files that are there.
Each dataset has a function; docs/datasets.md shows the trees that they expect.

Official lists decide, and not what lies in a folder: a missing class would shift the indices of all others, and two
laboratories that miss different files would train and test on different data without knowing.
"""

import csv
import difflib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import datasets
import numpy as np
import pyarrow.compute as pc

from ...errors import InputError
from ..sources.labelled import find_classes, number_classes, read_class_names
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
from ..sources.sources import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, DataSourceError
from ..sources.tables import as_source_error, load_hub_dataset


logger = logging.getLogger(__name__)

OFFICIAL_CLASS_NAMES = Path(__file__).parent / "class_names"
# Names of a split in folders, in lists and in a list's own column.
SPLIT_NAMES = {"train": ["train"], "val": ["val", "validate", "validation"], "test": ["test"]}
NO_LABEL = -1  # `datasets` stores a missing ClassLabel so
KINETICS_SUFFIXES = (".csv", ".txt")  # the second for some lists of Kinetics-600


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


def list_kinetics(request: Request, official_classes: str | int) -> Listing:
    """
    Lists Kinetics-400, -600 and -700 as the CVD Foundation hosts them (github.com/cvdfoundation/kinetics-dataset):
    `annotations/{train,val,test}.csv`, and for each split a folder of files `ID_SSSSSS_EEEEEE.mp4` (seconds), in
    folders of classes or not.

    Args:
        official_classes: the name of the class list that ships with this package, or the number of classes. In the
            second case their order is that of the sorted names in `train.csv`.
    """
    names = [
        f"{folder}{name}{suffix}"
        for folder in ["annotations/", ""]
        for suffix in KINETICS_SUFFIXES
        for name in SPLIT_NAMES[request.split]
    ]
    path = find_list(request, names)
    if request.class_names is not None:
        class_names = list(request.class_names)
    elif isinstance(official_classes, str):
        class_names = read_official_class_names(official_classes)
    else:
        class_names = sorted_training_classes(request, path, official_classes)
    indices = index_of(class_names)
    rows = [
        (name, NO_LABEL if label is None else look_up(label, indices, where))
        for where, name, label in read_kinetics_list(path, request.split)
    ]
    media = find_media(request, SPLIT_NAMES[request.split])
    files = index_files(media, VIDEO_EXTENSIONS, stem)
    return Listing(str(path), media, True, class_names, rows, files, "ID_SSSSSS_EEEEEE.mp4")


def read_kinetics_list(path: Path, split: str) -> Iterator[tuple[str, str, str | None]]:
    """Yields for each row its place (file and line), its file's name, and its class; None if a test list has none."""
    with open_list(path) as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        needed = ["youtube_id", "time_start", "time_end"] + (["label"] if split != "test" else [])
        lacking = [name for name in needed if name not in columns]
        if lacking:
            raise InputError(
                f"{path}, line 1: expected the columns {', '.join(needed)}; {', '.join(lacking)} missing."
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            # DictReader puts fields too many under None, and None for those that lack.
            if None in row or None in row.values():
                raise InputError(f"{where}: expected {len(columns)} fields ({','.join(columns)}), got more or fewer.")
            # Lists are easily swapped, and training on the test split would not show.
            named_split = row.get("split")
            others = [name for other, names in SPLIT_NAMES.items() if other != split for name in names]
            if named_split in others:
                raise InputError(f"{where}: is of the split {named_split!r}; expected the list of {split!r}.")
            times = [row["time_start"], row["time_end"]]
            if not row["youtube_id"] or not all(time.isdecimal() for time in times):
                raise InputError(
                    f"{where}: expected a youtube_id and whole seconds in time_start and time_end, got "
                    f"{row['youtube_id']!r}, {times[0]!r}, {times[1]!r}."
                )
            if not row.get("label") and split != "test":
                raise InputError(f"{where}: expected a class in the column label, got nothing.")
            start, end = map(int, times)
            # The CVD Foundation names its files so.
            yield where, f"{row['youtube_id']}_{start:06d}_{end:06d}", row.get("label") or None


def sorted_training_classes(request: Request, path: Path, num_classes: int) -> list[str]:
    """Sorts the class names of the training list at `path` or beside it."""
    if request.split != "train":
        names = [f"{folder}train{suffix}" for folder in ["", "annotations/"] for suffix in KINETICS_SUFFIXES]
        path = find_one([path.parent, Path(request.root)], names, "training list")
    # The training list for every split: another list may lack a class, which would shift the indices behind it.
    class_names = sorted({label for _, _, label in read_kinetics_list(path, "train")})
    if len(class_names) != num_classes:
        raise InputError(
            f"{path}: names {len(class_names)} classes, expected {num_classes}: the sorted names of the whole "
            "training list are the class order. Restore the official list, or give the order with --class_names FILE."
        )
    return class_names


def list_something_something(request: Request) -> Listing:
    """
    Lists Something-Something v2: `something-something-v2-{train,validation,test}.json` (or `train.json`, ...), with
    the files `ID.webm` of all splits in one folder. A `template` without its brackets is the class. If there is a
    `...labels.json`, it must have the order that ships with this package.
    """
    list_names = {"train": "train", "val": "validation", "test": "test"}
    prefixes = [
        f"{folder}{name}" for folder in ["", "labels/", "annotations/"] for name in ["something-something-v2-", ""]
    ]
    path = find_list(request, [f"{prefix}{list_names[request.split]}.json" for prefix in prefixes])
    if request.class_names is None:
        class_names = read_official_class_names("ssv2")
        check_something_something_labels(path, class_names)
    else:
        class_names = list(request.class_names)
    indices = index_of(class_names)
    rows = []
    for where, name, template in read_something_something_list(path):
        if template is None and request.split != "test":
            raise InputError(f'{where}: expected "id" and "template", the template is missing.')
        label = NO_LABEL if template is None else look_up(re.sub(r"[\[\]]", "", template), indices, where)
        rows.append((name, label))
    # All splits share a folder: a file that another list has is not reported as unlisted.
    others = [path.with_name(path.name.replace(list_names[request.split], name)) for name in list_names.values()]
    others = [other for other in others if other != path and other.is_file()]
    elsewhere = {name for other in others for _, name, _ in read_something_something_list(other)}
    media = find_media(request, ["20bn-something-something-v2", "something-something-v2", "videos"])
    files = index_files(media, VIDEO_EXTENSIONS, stem)
    return Listing(str(path), media, True, class_names, rows, files, "ID.webm", frozenset(elsewhere))


def read_something_something_list(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Yields for each entry its place, its id, and its template or None."""
    entries = read_json(path)
    if not isinstance(entries, list):
        raise InputError(f"{path}: expected a list of entries, got {type(entries).__name__}.")
    for number, entry in enumerate(entries, 1):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict) or "id" not in entry:
            raise InputError(f'{where}: expected an object with "id" and "template", got {json.dumps(entry)[:100]}.')
        yield where, str(entry["id"]), entry.get("template")


def check_something_something_labels(path: Path, class_names: list[str]) -> None:
    """Raises an InputError if there is a label file beside the list and its order is not that of `class_names`."""
    for name in ["something-something-v2-labels.json", "labels.json"]:
        label_file = path.with_name(name)
        if not label_file.is_file():
            continue
        labels = read_json(label_file)
        if not isinstance(labels, dict):
            raise InputError(f"{label_file}: expected an object of class names and indices.")
        expected = {class_name: str(index) for index, class_name in enumerate(class_names)}
        found = {class_name: str(index) for class_name, index in labels.items()}
        for class_name in [*found, *expected]:
            if found.get(class_name) != expected.get(class_name):
                raise InputError(
                    f"{label_file}: {class_name!r} has the index {found.get(class_name)}, expected "
                    f"{expected.get(class_name)} as in the official file. Restore it, or give the order with "
                    "--class_names FILE."
                )


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


def list_imagenet(request: Request) -> Listing:
    """
    Lists ImageNet-1K as folders `{train,val}/n01440764/*.JPEG`, named by synset. The sorted ids are the class order.
    The list of ids ships with this package, so a missing folder shifts nothing. An image's name is its file name
    without extension (`n01440764_10026`, `ILSVRC2012_val_00000293`).
    """
    media = find_media(
        request, [f"{folder}{name}" for folder in ["", "ILSVRC/Data/CLS-LOC/"] for name in SPLIT_NAMES[request.split]]
    )
    class_names = list(request.class_names or read_official_class_names("imagenet"))
    return list_class_folders(media, class_names, IMAGE_EXTENSIONS, stem)


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


def is_imagenet_table(request: Request) -> bool:
    """Whether ImageNet is a Parquet file, a folder of them or a name on the Hub, rather than folders of classes."""
    root = Path(request.root)
    return not root.is_dir() or any(root.glob("*.parquet")) or any(root.glob("*/*.parquet"))


def open_imagenet_table(request: Request) -> datasets.Dataset:
    """
    Opens ImageNet-1K as a Parquet file, a folder of them with splits in their names, or a dataset on the Hub.

    Returns:
        Columns `image` (not decoded), `label` (ClassLabel, as it is there), `name` (the file name without extension,
        and without the synset at the end of the Hub's names; the row's number if names repeat).

    Raises:
        InputError: if it cannot be opened, or lacks an image column or a ClassLabel column of 1,000 classes.
    """
    split = {"train": "train", "val": "validation", "test": "test"}[request.split]
    if request.class_names is not None:
        raise InputError(f"{request.root}: a dataset has its own class order; leave out --class_names.")
    if not os.path.exists(request.root):
        table = load_hub_dataset(request.root, split)
    else:
        with as_source_error(request.root, f"the split {split!r} could not be opened as a dataset"):
            if os.path.isfile(request.root):
                table = datasets.Dataset.from_parquet(request.root)
            else:
                table = datasets.load_dataset(request.root, split=split)
    columns = {
        kind: next((name for name, feature in table.features.items() if isinstance(feature, kind)), None)
        for kind in [datasets.Image, datasets.ClassLabel]
    }
    if None in columns.values():
        raise DataSourceError(
            f"{request.root}: expected a column of type Image and one of type ClassLabel, got {table.features}."
        )
    table = table.select_columns(list(columns.values())).rename_columns(
        {columns[datasets.Image]: "image", columns[datasets.ClassLabel]: "label"}
    )
    num_classes = table.features["label"].num_classes
    official = read_official_class_names("imagenet")
    names = table.features["label"].names
    # The Hub's names are words ("tench, Tinca tinca"), whose order cannot be checked; synsets can.
    if num_classes != len(official) or (set(names) == set(official) and names != official):
        raise InputError(
            f"{request.root}: expected the 1,000 classes of ImageNet-1K in their order, got {num_classes}."
        )
    table = table.cast_column("image", datasets.Image(decode=False))
    # Only the paths are read; the images stay on disk.
    batches = table.with_format("arrow").select_columns("image").iter(1000)
    paths = [path for batch in batches for path in pc.struct_field(batch["image"], "path").to_pylist()]
    # Without the Hub's synset a name is that of the folders, and two laboratories can compare lists.
    names = [re.sub(r"_n\d{8}$", "", stem(path or "")) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{row:09d}" for row in range(len(names))]
    return table.add_column("name", names)


def read_official_class_names(name: str) -> list[str]:
    """Reads the classes of "kinetics400", "ssv2" or "imagenet" (synset ids) in the order of their indices."""
    return read_class_names(OFFICIAL_CLASS_NAMES / f"{name}.txt")


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
