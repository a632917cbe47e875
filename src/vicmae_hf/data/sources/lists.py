"""Reads lists of videos and images: lines `path label`, tables with named columns, metadata files beside media."""

import ast
import csv
import io
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet

from ...errors import InputError
from ..media.excerpts import name_excerpt
from ..media.reading import EncodedItem
from .label_lists import index_label_lists
from .listed_files import find_files, take_frame_counts
from .selection import table_of_paths
from .sources import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaSource, SourceSettings
from .tables import LABEL_COLUMNS, as_source_error, index_labels


logger = logging.getLogger(__name__)

PATH_COLUMNS = ("path", "file_name", "filename", "file", "video_path", "image_path", "video", "image")
LABEL_NAMES = (*LABEL_COLUMNS, "class", "class_name")
TIME_COLUMNS = {"start": ("start", "start_time", "start_seconds"), "end": ("end", "end_time", "end_seconds")}
LINE = "line number"  # column of where in the file a row is; no header has a name of two words
WHITESPACE = " "
DELIMITERS = ("\t", ",", ";", WHITESPACE)
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
SNIFFED_LINES = 1000  # enough to tell how the lines of a list are divided
MEDIA_NAME = re.compile(
    "|".join(rf"{re.escape(extension)}\b" for extension in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS), re.IGNORECASE
)
INDEX = re.compile(r"\d+")
SEVERAL_INDICES = re.compile(r"-?\d+([\s,;|]+-?\d+)+")  # a negative one is refused

Columns = dict[str, list[Any]]


class ListedSource(MediaSource):
    """
    The rows of a list, which may be parts of files.

    Args:
        name, table, labels, class_names: see `MediaSource`; the table has the columns `path` and `name`.
        starts, ends: seconds, float64 `(N,)`, NaN for the beginning or the end of the file.
    """

    def __init__(
        self,
        name: str,
        table: datasets.Dataset,
        labels: np.ndarray | None,
        class_names: list[str] | None,
        starts: np.ndarray,
        ends: np.ndarray,
    ):
        super().__init__(name, table, "path", labels=labels, class_names=class_names)
        self.starts, self.ends = starts, ends

    def __getitem__(self, index: int) -> EncodedItem:
        item = super().__getitem__(index)
        start, end = drop_nan(float(self.starts[index]), float(self.ends[index]))
        if start is None and end is None:
            return item
        return replace(item, name=f"{item.name} {name_excerpt(start, end)}", start=start, end=end)


def open_list(name: str, path: Path, settings: SourceSettings) -> ListedSource:
    """
    Opens a list of videos and images. Paths begin in `--data_root`, else in the folder of the list. Every row is an
    item, also one that repeats another.

    Raises:
        InputError: if it is malformed, or more rows than allowed have no file (see `find_files`).
    """
    root = Path(settings.data_root or path.parent).expanduser()
    columns = read_list(path, frames_root=root if settings.frame_folders else None)
    written = take_column(path, columns, PATH_COLUMNS)
    if written is None:
        found = ", ".join(column for column in columns if column != LINE)
        raise InputError(f"{path}: expected a column `path` of videos or images, got the columns {found}.")
    paths = find_files(path, root, columns[LINE], written, settings)
    starts, ends = read_times(path, columns)
    known = {LINE, *PATH_COLUMNS, *LABEL_NAMES, *TIME_COLUMNS["start"], *TIME_COLUMNS["end"], settings.label_column}
    if others := [column for column in columns if column and column not in known]:
        logger.warning("%s: the columns %s are not used.", path, ", ".join(others))
    labels = take_column(path, columns, LABEL_NAMES, settings.label_column) if settings.reads_labels else None
    indices, class_names = (None, None) if labels is None else read_label_values(path, columns[LINE], labels)
    names = [
        entry if math.isnan(start) and math.isnan(end) else f"{entry} {name_excerpt(*drop_nan(start, end))}"
        for entry, start, end in zip(written, starts.tolist(), ends.tolist(), strict=True)
    ]
    with as_source_error(name, "its paths must be valid UTF-8"):
        table = datasets.Dataset.from_dict({"path": paths, "name": names})
    return ListedSource(name, table, indices, class_names, starts, ends)


def open_metadata(
    name: str, files: Sequence[Path], media: Sequence[str], settings: SourceSettings, keep_all: bool = False
) -> MediaSource | None:
    """
    Opens media with the labels that metadata files beside them have: columns `file_name` (a path below the file's
    folder) and `label`, or the one of `--label_column`. Returns None if no file has these columns. Media that no file
    names are left out, or with `keep_all` have no label.

    Raises:
        InputError: if a metadata file names too many files that are missing (see `find_files`).
    """
    labels = {}
    for file in files:
        # Of the same name, but of something else.
        if file.suffix == ".csv" and "file_name" not in (find_header(decode_file(file).partition("\n")[0])[0] or []):
            continue
        columns = read_list(file)
        written, values = columns.get("file_name"), None
        if settings.label_column is None or settings.label_column.lower() in columns:
            values = take_column(file, columns, LABEL_NAMES, settings.label_column)
        if written is not None and values is not None:
            found = find_files(file, file.parent, columns[LINE], written, settings, fate="are left out")
            files_of_rows = list(map(os.path.abspath, found))
            has_times = any(name in columns for names in TIME_COLUMNS.values() for name in names)
            if has_times or len(set(files_of_rows)) < len(files_of_rows):
                raise InputError(f"{file}: names parts of files, or a file twice; give it instead of its folder.")
            labels |= dict(zip(files_of_rows, values, strict=True))
    if not labels:
        return None
    unlisted = [path for path in media if os.path.abspath(path) not in labels]
    if len(unlisted) == len(media):
        raise InputError(f"{files[0]}: names none of the videos and images in {name}, such as {media[0]}.")
    listed = media if keep_all else [path for path in media if os.path.abspath(path) in labels]
    if len(listed) < len(media):
        message = "%s: left out %d files that no metadata file lists, the first: %s"
        logger.warning(message, name, len(unlisted), unlisted[0])
    values = [labels.get(os.path.abspath(path)) for path in listed]
    indices, class_names = read_label_values(files[0], range(1, len(values) + 1), values)
    return MediaSource(name, table_of_paths(name, listed), "path", None, indices, class_names)


def drop_nan(*times: float) -> list[float | None]:
    return [None if math.isnan(time) else time for time in times]


def take_column(path: Path, columns: Columns, names: Sequence[str], wanted: str | None = None) -> list[Any] | None:
    """Returns the column `wanted`, or the first of those with one of `names`; None if there is none of them."""
    if wanted is None:
        return next((columns[name] for name in names if name in columns), None)
    column = next((column for column in columns if column.lower() == wanted.lower()), None)
    if column is None:
        found = ", ".join(name for name in columns if name != LINE)
        raise InputError(f"{path}: has no column {wanted!r} (--label_column), but {found}.")
    return columns[column]


# From a file to columns


def read_list(path: Path, frames_root: Path | None = None) -> Columns:
    """
    Reads a list as columns of text, JSON lines also of numbers: `path`, `label` and others, and the line numbers.
    Lines without a header have a path, or a path and a label. If the paths may be folders of frames, they begin in
    `frames_root`.
    """
    if path.suffix == ".parquet":
        return read_parquet_columns(path)
    text = blank_comments(path, decode_file(path))
    # Not `splitlines`, which also splits at characters that a path may have.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: is empty; expected a list of videos or images, one `path label` a line.")
    if lines[0][1].lstrip().startswith("{"):
        return read_json_columns(path, lines)
    if re.match(r"\s*\[\s*(\{|$)", lines[0][1]):
        raise InputError(f"{path}: expected JSON lines, an object in each, got a JSON array.")
    header, delimiter = find_header(lines[0][1])
    try:
        if header is None:
            return split_lines(path, lines, find_delimiter(lines), frames_root)
        if delimiter == WHITESPACE:
            return read_columns(path, header, ((number, split_words(line, header)) for number, line in lines[1:]))
        # The whole text, because quoted values may hold line ends. The line number is that of a row's end.
        reader = csv.reader(io.StringIO(text), delimiter=delimiter)
        rows = ((reader.line_num, row) for row in reader if any(map(str.strip, row)))
        next(rows)  # the header
        return read_columns(path, header, rows)
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as a table ({error}).") from error


def decode_file(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is not a video, image or Parquet file, nor a list of them in UTF-8 ({error.reason} at byte "
            f"{error.start}). Save a list as UTF-8 (in Excel: CSV UTF-8)."
        ) from error
    if "\0" in text:
        raise InputError(f"{path}: is not a video, image or Parquet file, nor a list of them: it holds binary data.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def blank_comments(path: Path, text: str) -> str:
    """
    Empties the lines that begin with # and are no items: a space follows, or no video or image is named. The numbers
    of the others stay. A warning counts them.
    """
    if "#" not in text:
        return text
    lines = text.split("\n")
    places = [
        place
        for place, line in enumerate(lines)
        if re.match(r"\s*#", line) and (re.match(r"\s*#+(\s|$)", line) or not MEDIA_NAME.search(line))
    ]
    for place in places:
        lines[place] = ""
    if places:
        logger.warning("%s: %d lines that begin with # were skipped.", path, len(places))
    return "\n".join(lines)


def read_parquet_columns(path: Path) -> Columns:
    with as_source_error(str(path), "cannot be read as Parquet"):
        table = pyarrow.parquet.read_table(path)
    return {name.lower(): table.column(name).to_pylist() for name in table.column_names} | {
        LINE: list(range(1, len(table) + 1))
    }


def read_json_columns(path: Path, lines: list[tuple[int, str]]) -> Columns:
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: expected a JSON object ({error}).") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {line.strip()[:40]}.")
        rows.append({key.strip().lower(): value for key, value in row.items()})
        if len(rows[-1]) < len(row):
            raise InputError(f"{path}, line {number}: expected each column once, got {', '.join(row)}.")
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in keys} | {LINE: [number for number, _ in lines]}


def find_header(line: str) -> tuple[list[str] | None, str]:
    """Finds the column names of a first line, in small letters, and what divides them; None if it is no header."""
    for delimiter in DELIMITERS:
        cells = line.split() if delimiter == WHITESPACE else next(csv.reader([line], delimiter=delimiter))
        names = [cell.strip().strip('"').lower() for cell in cells]
        # A class may be called "image"; a path in the line tells that it is no header.
        has_path = any(os.path.splitext(name)[1] in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS for name in names)
        if not has_path and any(name in PATH_COLUMNS for name in names):
            return names, delimiter
    return None, ""


def read_columns(path: Path, header: list[str], rows) -> Columns:
    """Makes columns of rows `(line number, cells)`. Raises an InputError for a row of another length."""
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise InputError(f"{path}: its header has the column {twice[0]} twice.")
    numbers, columns = [], [[] for _ in header]
    for number, cells in rows:
        cells = [cell.strip() for cell in cells]
        while len(cells) > len(header) and not cells[-1]:  # a delimiter at the end of the line
            cells.pop()
        if len(cells) != len(header):
            raise InputError(
                f"{path}, line {number}: expected {len(header)} values ({', '.join(header)}), got {len(cells)}. "
                "Put quotes around values that hold the delimiter."
            )
        numbers.append(number)
        for column, cell in zip(columns, cells, strict=True):
            column.append(cell)
    if not numbers:
        raise InputError(f"{path}: has a header and no rows; expected videos or images below it.")
    return dict(zip(header, columns, strict=True)) | {LINE: numbers}


def split_words(line: str, header: list[str]) -> list[str]:
    """Divides a line by spaces, where a path that is the first or the last value may hold spaces itself."""
    if header[0] in PATH_COLUMNS:
        path, rest = split_path(line, WHITESPACE)
        if len(header) == 1:
            return [line]
        # A label may hold spaces as well, if nothing follows it.
        return [path, *rest.split(None, len(header) - 2)]
    return line.split(None, len(header) - 1)


def find_delimiter(lines: list[tuple[int, str]]) -> str | None:
    """
    Finds what divides path and label: what most often follows the extension of a video or image. None if nothing
    follows. Paths without extensions are divided by the first of `DELIMITERS` that the first line holds.
    """
    endings = "|".join(re.escape(extension) for extension in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS)
    sample = [line.strip() for _, line in lines[:SNIFFED_LINES]]
    counts = {None: sum(bool(re.search(rf'({endings})"?$', line, re.IGNORECASE)) for line in sample)}
    for delimiter in DELIMITERS:
        pattern = re.compile(rf'({endings})"?\s*{re.escape(delimiter)}', re.IGNORECASE)
        counts[delimiter] = sum(bool(pattern.search(line)) for line in sample)
    if any(counts.values()):
        return max(counts, key=counts.get)  # the first of equals
    return next((delimiter for delimiter in DELIMITERS if delimiter in sample[0]), None)


def split_lines(path: Path, lines: list[tuple[int, str]], delimiter: str | None, frames_root: Path | None) -> Columns:
    """Divides lines without a header into the columns `path` and, if there are labels, `label`."""
    numbers = [number for number, _ in lines]
    if delimiter is None:
        return {"path": [line.strip().strip('"') for _, line in lines], LINE: numbers}
    paths, labels = [], []
    for number, line in lines:
        media, label = split_path(line, delimiter)
        label = label.rstrip(delimiter + WHITESPACE)  # at the end of the line
        # VideoMAE's lists for pretraining have "path 0 -1", where -1 stands for no label.
        if re.fullmatch(r"\d+\s+-1", label):
            label = "-1"
        if not media or not label:
            raise InputError(f"{path}, line {number}: expected `path label`, got {line.strip()[:80]!r}.")
        paths.append(media)
        labels.append(label)
    if frames_root is not None:
        paths, labels = take_frame_counts(path, frames_root, numbers, paths, labels)
        if not any(labels):
            return {"path": paths, LINE: numbers}
    check_several(path, numbers, labels)
    return {"path": paths, "label": labels, LINE: numbers}


def check_several(path: Path, numbers: list[int], labels: list[str]) -> None:
    """Raises an InputError if some lines have several class indices, and others show that these are no labels."""
    several = next((row for row, label in enumerate(labels) if SEVERAL_INDICES.fullmatch(label)), None)
    if several is None:
        return
    if other := next((row for row, label in enumerate(labels) if not is_indices(label)), 0):
        raise InputError(
            f"{path}: expected class indices in all lines if one has several, as line {numbers[several]} with "
            f"{labels[several]!r}; got {labels[other]!r} in line {numbers[other]}."
        )
    # In lists of frame folders, the first of two numbers counts the frames.
    if all(re.fullmatch(r"\d+\s+\d+", label) for label in labels):
        raise InputError(
            f"{path}, line {numbers[0]}: expected one label after the path, got {labels[0]!r}, as in all lines. If "
            "these are two labels, put commas between them; if they are frames and label of folders, give "
            "--frame_folders."
        )


def split_path(line: str, delimiter: str) -> tuple[str, str]:
    """
    Divides a line into path and rest. Both may hold the delimiter: the path ends with the last value that has the
    extension of a video or image, or else before the last value.
    """
    line = line.strip()
    if delimiter == WHITESPACE and not line.startswith('"'):
        cells = line.replace("\t", " ").split(" ")  # not with `csv`, because quotes within a path belong to it
    else:
        cells = next(csv.reader([line], delimiter=delimiter))
    extensions = VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
    ends = [
        place for place, cell in enumerate(cells[:-1], 1) if os.path.splitext(cell.strip())[1].lower() in extensions
    ]
    end = ends[-1] if ends else len(cells) - 1
    return delimiter.join(cells[:end]).strip(), delimiter.join(cells[end:]).strip()


# From columns to items


def is_indices(label: str) -> bool:
    """Whether a label is one class index or several, or -1 for none."""
    return bool(INDEX.fullmatch(label) or SEVERAL_INDICES.fullmatch(label)) or label == "-1"


def read_label_values(path: Path, numbers: Sequence[int], labels: list[Any]) -> tuple[np.ndarray, list[str] | None]:
    """
    Turns the labels of a list into class indices `(N,)` and class names (see `index_labels`), or, if a row has
    several, into targets `(N, C)` (see `index_label_lists`). Several are a list of JSON lines or Parquet, indices with
    spaces, commas, semicolons or | between them, or a list as Python and pandas write it. Any other text names one
    class.
    """
    check_flat(path, numbers, labels)
    texts = ["" if label is None else str(label).strip() for label in labels]
    if not any(isinstance(label, list) for label in labels):
        filled = [text for text in texts if text and text != "-1"]
        if any(map(SEVERAL_INDICES.fullmatch, filled)) and all(map(is_indices, filled)):
            labels = [None if text in ("", "-1") else re.split(r"[\s,;|]+", text) for text in texts]
        elif filled and all(text.startswith("[") and text.endswith("]") for text in filled):
            try:
                lists = [ast.literal_eval(text) if text else None for text in texts]
            except (ValueError, SyntaxError):  # names in brackets
                return index_labels(str(path), labels)
            labels = lists
            check_flat(path, numbers, labels)
        else:
            return index_labels(str(path), labels)
    return index_label_lists(str(path), [label if isinstance(label, list | None) else [label] for label in labels])


def check_flat(path: Path, numbers: Sequence[int], labels: list[Any]) -> None:
    """Raises an InputError if a label is more than a text, a number, or a list of these."""
    for number, label in zip(numbers, labels, strict=True):
        entries = label if isinstance(label, list) else [label]
        if any(isinstance(entry, list | dict) for entry in entries):
            raise InputError(f"{path}, line {number}: expected a label or a list of labels, got {label}.")


def read_times(path: Path, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Reads the columns `start` and `end`, seconds, float64 `(N,)`, NaN where there is nothing."""
    numbers = columns[LINE]
    times = []
    for column, names in TIME_COLUMNS.items():
        values = take_column(path, columns, names) or [None] * len(numbers)
        times.append(np.full(len(numbers), np.nan))
        for row, (number, value) in enumerate(zip(numbers, values, strict=True)):
            if value is None or value == "":
                continue
            try:
                times[-1][row] = float(value)
            except (TypeError, ValueError):
                times[-1][row] = -1.0
            if not 0 <= times[-1][row] < math.inf:
                raise InputError(f"{path}, line {number}: expected seconds from 0 on as `{column}`, got {value!r}.")
    starts, ends = times
    wrong = np.flatnonzero(ends <= np.nan_to_num(starts))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"{path}, line {numbers[row]}: ends at {ends[row]} s, which is not after its start, "
            f"{np.nan_to_num(starts[row])} s."
        )
    return starts, ends
