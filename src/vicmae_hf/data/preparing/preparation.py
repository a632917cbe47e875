"""
Turns a dataset on disk into a validated table, and reports what is missing, broken or repeated.

The files that a list promises (`layouts.py`) are matched with the files that are there. Each file is opened. Those
that can be read go into a table with the official class indices. docs/datasets.md shows layouts, commands and reports.
"""

import hashlib
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import torch
from tqdm.auto import tqdm

from ...errors import InputError, MediaDecodingError
from ...files import check_writable, write_csv, write_json, write_whole, writing
from ..media.reading import EncodedItem, MediaLoader, MediaReader
from ..sources.labelled import format_list
from ..sources.segments import read_duration
from ..sources.sources import MediaSource
from .imagenet import is_imagenet_table, open_imagenet_table
from .layouts import LAYOUTS
from .listing import NO_LABEL, Listing, Request


logger = logging.getLogger(__name__)

Check = Literal["none", "header", "decode"]

HEAD_BYTES = 2**16  # enough to tell most files apart without reading them whole


class Problem(NamedTuple):
    """
    One line of problems.csv. The kinds of problems:

    - missing: listed, but not there;
    - unreadable: there, but cannot be opened or decoded;
    - listed twice: listed again with the same class, and in the table once;
    - several classes: listed with different classes, and not in the table;
    - present twice: there are several files of that name, of which the first is in the table;
    - same content: byte for byte another listed file; both are in the table, as the official list has both;
    - not listed: a media file in the folder that the list does not have.
    """

    problem: str
    name: str
    class_name: str
    path: str
    detail: str


class Outcome(NamedTuple):
    """
    The result of checking a file: why it cannot be read (None: it can), its size and a hash of its beginning, and of a
    video its duration in seconds.
    """

    error: str | None
    content: tuple[int, bytes] | None
    duration: float | None = None


def prepare_dataset(
    dataset: str,
    root: str | os.PathLike,
    output: str | os.PathLike,
    split: str | None = None,
    annotations: str | os.PathLike | None = None,
    media: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    check: Check = "header",
    num_proc: int = 1,
    loader: MediaLoader | None = None,
) -> dict[str, Any]:
    """
    Writes the folder `output`: a table for `datasets.load_from_disk` with the columns `video` or `image` (absolute
    paths, not decoded), `label` (ClassLabel in the official order; -1 where a test list has none), `name` (the id in
    the list) and, of videos that were opened, `duration_seconds`; beside it report.json, classes.csv, problems.csv and
    list.tsv. The folder appears when it is whole.

    Args:
        dataset: a key of `LAYOUTS`.
        root, split, annotations, media, class_names: see `listing.Request`.
        check: how far each file is read. "none" only checks that it is there; "header" opens it (of a video, reads
            the index of its frames; an image is decoded); "decode" decodes the first and the last frame.
        num_proc: processes that check.
        loader: reads the files.

    Returns:
        The content of report.json.

    Raises:
        InputError: if a list or folder is missing or malformed, names an unknown class, lists nothing, nothing of it
            is there or readable, or `output` exists or cannot be written.
    """
    output = Path(output).expanduser()
    # Now and not at the end, because reading every file of a dataset takes hours.
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already; choose another output folder, or delete it.")
    check_writable(output)
    paths = [None if path is None else os.path.expanduser(path) for path in (root, annotations, media)]
    request = Request(paths[0], split, *paths[1:], class_names)
    table, problems, list_source = open_listed(dataset, request)
    if check != "none":
        table, found_problems = keep_readable(table, check, num_proc, loader or MediaLoader())
        problems += found_problems
    report = {
        "dataset": dataset,
        "split": split,
        "root": absolute_path(request.root),
        "list": absolute_path(list_source),
        "check": check,
        **count(table, problems, check),
    }
    write_results(output, table, problems, report)
    return report


def open_listed(dataset: str, request: Request) -> tuple[datasets.Dataset, list[Problem], str]:
    """Returns the table of the listed files that are there, the problems of the others, and the place of the list."""
    layout = LAYOUTS[dataset]
    if request.split not in layout.splits:
        splits = ", ".join(filter(None, layout.splits))
        raise InputError(f"{layout.title} has the splits {splits}, got {request.split}.")
    if dataset == "imagenet" and is_imagenet_table(request):
        return open_imagenet_table(request), [], request.root
    listing = layout.list_items(request)
    return *match_files(listing), listing.source


def absolute_path(path: str) -> str:
    """Makes the path of a file or folder absolute. The name of a dataset on the Hub stays as it is."""
    return os.path.abspath(path) if os.path.exists(path) else path


def match_files(listing: Listing) -> tuple[datasets.Dataset, list[Problem]]:
    """Returns the table of the listed files that are there, in the list's order, and the problems of the others."""
    labels_of: dict[str, list[int]] = {}
    for name, label in listing.rows:
        labels_of.setdefault(name, []).append(label)
    if not labels_of:
        raise InputError(f"{listing.source}: lists no files; expected names like {listing.example}.")
    found, problems = [], []
    for name, labels in labels_of.items():
        class_name = name_of_class(listing.class_names, labels[0])
        paths = listing.files.get(name, [])
        if len(set(labels)) > 1:
            classes = " and ".join(name_of_class(listing.class_names, label) for label in dict.fromkeys(labels))
            # Nobody knows which class is right, so the file is left out.
            problems.append(Problem("several classes", name, "", paths[0] if paths else "", f"listed as {classes}"))
            continue
        if len(labels) > 1:
            # Only a note: the class is not in doubt.
            problems.append(Problem("listed twice", name, class_name, "", f"{len(labels)} times"))
        if not paths:
            problems.append(Problem("missing", name, class_name, "", ""))
            continue
        problems += [Problem("present twice", name, class_name, path, f"used: {paths[0]}") for path in paths[1:]]
        found.append((name, labels[0], paths[0]))
    # Reported, because files that the list lacks are often a sign of a wrong list or a wrong split.
    for name, paths in listing.files.items():
        if name not in labels_of and name not in listing.listed_elsewhere:
            problems += [Problem("not listed", name, "", path, "") for path in paths]
    if not found:
        raise InputError(
            f"{listing.media}: none of the {len(labels_of)} files that {listing.source} lists is there; expected "
            f"files like {listing.example}, found {len(listing.files)} others."
        )
    return build_table(found, listing), problems


def build_table(found: list[tuple[str, int, str]], listing: Listing) -> datasets.Dataset:
    """
    Builds the table. Its media column is a plain structure until `save_table`, because `save_to_disk` would copy the
    files of a column of type Video or Image into the table.
    """
    column = "video" if listing.is_video else "image"
    names, labels, paths = zip(*found, strict=True)
    features = {
        column: {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "label": datasets.ClassLabel(names=listing.class_names),
        "name": datasets.Value("string"),
    }
    try:
        return datasets.Dataset.from_dict(
            {
                column: [{"bytes": None, "path": path} for path in paths],
                "label": list(labels),
                "name": list(names),
            },
            features=datasets.Features(features),
        )
    except UnicodeEncodeError as error:
        raise InputError(f"{listing.media}: rename {error.object!r}: file names must be valid UTF-8.") from error


def name_of_class(class_names: Sequence[str], label: int) -> str:
    return "" if label == NO_LABEL else class_names[label]


class CheckedFiles(torch.utils.data.Dataset):
    """Outcomes of reading the items of a source, as a dataset: a DataLoader computes them in many processes."""

    def __init__(self, source: MediaSource, check: Check, loader: MediaLoader):
        self.source, self.check, self.loader = source, check, loader

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Outcome:
        item, durations = self.source[index], []

        def first_and_last_frame(reader: MediaReader) -> list[int]:
            durations.append(reader.duration)
            return [0, reader.num_frames - 1]

        try:
            if self.check == "decode":
                self.loader.read_frames(item, first_and_last_frame)
            else:
                durations.append(read_duration(item, self.loader.video_backend, self.loader.seconds_per_file))
            # Both are cheap here, where the file was just read, and what `find_same_content` compares first.
            head = read_bytes(item, HEAD_BYTES)
            size = os.path.getsize(item.media) if isinstance(item.media, str) else len(item.media)
        except (MediaDecodingError, OSError) as error:
            return Outcome(str(error), None)
        return Outcome(None, (size, hashlib.sha256(head).digest()), durations[0])


def read_bytes(item: EncodedItem, limit: int = -1) -> bytes:
    if isinstance(item.media, bytes):
        return item.media if limit < 0 else item.media[:limit]
    with open(item.media, "rb") as file:
        return file.read(limit)


def keep_readable(
    table: datasets.Dataset, check: Check, num_proc: int, loader: MediaLoader
) -> tuple[datasets.Dataset, list[Problem]]:
    """Returns the part of the table that can be read, and the problems that reading found."""
    column = "video" if "video" in table.features else "image"
    source = MediaSource("table", table, column, is_video=column == "video")
    files = CheckedFiles(source, check, loader)
    # `list` keeps the outcomes as they are, where the default would try to make tensors of them.
    batches = torch.utils.data.DataLoader(files, batch_size=16, num_workers=num_proc, collate_fn=list)
    outcomes = []
    with tqdm(total=len(files), desc="Checking files", unit="file", dynamic_ncols=True) as progress:
        for batch in batches:
            outcomes += batch
            progress.update(len(batch))
    names, class_names = table["name"][:], class_names_of(table)

    def problem(kind: str, row: int, detail: str) -> Problem:
        path = source[row].media
        return Problem(kind, names[row], class_names[row], path if isinstance(path, str) else "", detail)

    problems = [problem("unreadable", row, outcome.error) for row, outcome in enumerate(outcomes) if outcome.error]
    if len(problems) == len(table):
        raise InputError(
            f"None of the {len(table)} files that were found can be read. The first: {problems[0].detail}"
        )
    for first, *others in find_same_content(source, outcomes):
        detail = f"as {names[first]} ({class_names[first]})"
        problems += [problem("same content", row, detail) for row in others]
    if column == "video":
        durations = [outcome.duration for outcome in outcomes]
        table = table.add_column("duration_seconds", durations, feature=datasets.Value("float64"))
    return table.select([row for row, outcome in enumerate(outcomes) if not outcome.error]), problems


def find_same_content(source: MediaSource, outcomes: list[Outcome]) -> list[list[int]]:
    """Groups rows whose files are the same byte for byte. Only files of one size and beginning are read whole."""
    groups: dict[Any, list[int]] = {}
    for row, outcome in enumerate(outcomes):
        if outcome.content is not None:
            groups.setdefault(outcome.content, []).append(row)
    # Only now, and only candidates, are files read whole.
    same: dict[bytes, list[int]] = {}
    for row in (row for rows in groups.values() if len(rows) > 1 for row in rows):
        try:
            content = read_bytes(source[row])
        except OSError as error:  # it could be read when it was checked
            logger.warning("%s: cannot be read any more, and is not compared (%s).", source[row].name, error)
            continue
        same.setdefault(hashlib.sha256(content).digest(), []).append(row)
    return [rows for rows in same.values() if len(rows) > 1]


def class_names_of(table: datasets.Dataset) -> list[str]:
    """Returns the class name of each row; empty without a label."""
    class_names = table.features["label"].names
    return [name_of_class(class_names, label) for label in table["label"][:]]


def list_table(table: datasets.Dataset) -> str:
    """Writes the text of list.tsv (see `format_list`)."""
    return format_list(table["name"], class_names_of(table))


def count(table: datasets.Dataset, problems: list[Problem], check: Check) -> dict[str, Any]:
    """Counts the figures of a report. None stands where nothing was looked for."""
    counts = Counter(problem.problem for problem in problems)
    in_table = Counter(class_names_of(table))
    class_names = table.features["label"].names
    was_read = check != "none"
    return {
        # Every listed name is in exactly one of these four groups.
        "listed": len(table) + counts["unreadable"] + counts["missing"] + counts["several classes"],
        "found": len(table) + counts["unreadable"],
        "missing": counts["missing"],
        "unreadable": counts["unreadable"] if was_read else None,
        "in_table": len(table),
        "listed_twice": counts["listed twice"],
        "several_classes": counts["several classes"],
        "present_twice": counts["present twice"],
        "same_content": counts["same content"] if was_read else None,
        "not_listed": counts["not listed"],
        "num_classes": len(class_names),
        "classes_without_files": sum(in_table[name] == 0 for name in class_names),
        "list_sha256": hashlib.sha256(list_table(table).encode()).hexdigest(),
    }


def write_results(output: Path, table: datasets.Dataset, problems: list[Problem], report: dict[str, Any]) -> None:
    """Writes everything into a folder beside `output` and renames it at the end: `output` is whole or absent."""
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, because renaming works at once only within a file system.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
            folder = Path(temporary, output.name)
            save_table(table, folder)
            write_whole(folder / "list.tsv", list_table(table))
            write_json(folder / "report.json", report)
            write_csv(folder / "problems.csv", Problem._fields, problems)
            write_csv(folder / "classes.csv", *count_classes(table, problems))
            folder.rename(output)


def save_table(table: datasets.Dataset, folder: Path) -> None:
    """Saves the table, and writes the media column's type (Video or Image, not decoded) afterwards (`build_table`)."""
    table.save_to_disk(folder)
    media = (
        {"video": datasets.Video(decode=False)}
        if "video" in table.features
        else {"image": datasets.Image(decode=False)}
    )
    # `save_to_disk` wrote a plain structure. Only the description changes, so the files are read as media and not
    # copied.
    info = table.info.copy()
    info.features = datasets.Features({**table.features, **media})
    info.write_to_directory(str(folder))


def count_classes(table: datasets.Dataset, problems: list[Problem]) -> tuple[list[str], list[list[Any]]]:
    """Makes names and rows of classes.csv: files of each class that are listed, in the table, missing, unreadable."""
    in_table = Counter(class_names_of(table))
    counts = Counter((problem.problem, problem.class_name) for problem in problems)
    rows = []
    for label, name in enumerate(table.features["label"].names):
        missing, unreadable = counts["missing", name], counts["unreadable", name]
        rows.append([label, name, in_table[name] + missing + unreadable, in_table[name], missing, unreadable])
    return ["label", "class_name", "listed", "in_table", "missing", "unreadable"], rows


def summarize(report: dict[str, Any]) -> str:
    """Formats the figures of a report as a short table."""
    explanations = {
        "listed": "different names in the list",
        "found": "there is a file",
        "missing": "there is none",
        "unreadable": "left out; reasons in problems.csv",
        "in_table": {"none": "not opened", "header": "opened, not decoded", "decode": "first and last frame decoded"}[
            report["check"]
        ],
        "listed_twice": "in the table once",
        "several_classes": "listed with different classes, left out",
        "present_twice": "several files of one name, the first is used",
        "same_content": "byte for byte another listed file, kept",
        "not_listed": "files that the list does not have, left out",
        "num_classes": "in the class list",
        "classes_without_files": "of them have no file in the table",
    }
    lines = [f"{LAYOUTS[report['dataset']].title} {report['split'] or ''}".rstrip()]
    for key, explanation in explanations.items():
        number = "not checked" if report[key] is None else f"{report[key]:,}"
        lines.append(f"  {key.replace('_', ' '):<22}{number:>11}  {explanation}")
    return "\n".join([*lines, f"  list sha256  {report['list_sha256']}"])
