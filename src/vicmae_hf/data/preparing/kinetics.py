"""Kinetics-400, -600 and -700."""

import csv
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from ..sources.sources import VIDEO_EXTENSIONS
from .listing import (
    NO_LABEL,
    SPLIT_NAMES,
    Listing,
    Request,
    find_list,
    find_media,
    find_one,
    index_files,
    index_of,
    look_up,
    open_list,
    read_official_class_names,
    stem,
)


KINETICS_SUFFIXES = (".csv", ".txt")  # the second for some lists of Kinetics-600


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
