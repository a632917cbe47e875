"""Something-Something v2."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from ..sources.sources import VIDEO_EXTENSIONS
from .listing import (
    NO_LABEL,
    Listing,
    Request,
    find_list,
    find_media,
    index_files,
    index_of,
    look_up,
    read_json,
    read_official_class_names,
    stem,
)


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
