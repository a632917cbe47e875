"""Opens tables (Parquet files, datasets on the disk or the Hub, frame stores), and finds their labels."""

import logging
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from huggingface_hub import HfApi, constants

from ...errors import InputError
from ...files import read_json
from .frame_store import ROW_COLUMNS, FrameStoreSource, has_frames
from .sources import STORE_FILE, DataSourceError, MediaSource, SourceSettings


logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels")  # names of a column of labels that is no ClassLabel, first come first
MAX_CLASSES = 1_000_000  # larger indices are numbers of something else
# Whole numbers, also as pandas writes them where some are missing.
INDEX = re.compile(r"[+-]?\d+(\.0+)?")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)


@contextmanager
def as_source_error(name: str, what: str) -> Iterator[None]:
    try:
        yield
    # Any exception: the libraries under `datasets` raise pyarrow's errors, the HTTP client's, RuntimeErrors.
    except Exception as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise DataSourceError(f"{name}: {what} ({reason}).") from error


def open_saved_dataset(name: str, path: Path, settings: SourceSettings) -> MediaSource | FrameStoreSource:
    """Opens a folder of `Dataset.save_to_disk`, or a frame store."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise DataSourceError(f"{name}: expected one split, got a folder of them: name one of {', '.join(splits)}.")
    if not (path / "state.json").is_file():  # which `datasets` needs, and a store gets last
        store = read_json(path / STORE_FILE)
        num_shards = len(list(path.glob("data-*.arrow")))
        raise DataSourceError(
            f"{name}: the frame store is not finished, {num_shards} of {store.get('num_shards')} shards are written. "
            f"Resume with: {store.get('command') or 'pack_frames and the same arguments'}"
        )
    with as_source_error(name, "the saved dataset could not be read"):
        dataset = datasets.load_from_disk(str(path))
    if (path / STORE_FILE).is_file():
        image_range = read_json(path / STORE_FILE).get("image_range", "type")  # stores of before do not say
        if image_range != (settings.image_range or "type"):
            logger.warning(
                "%s: was packed with --image_range %s, but other images are read with %s, here and by the saved "
                "processor. If they are of the same kind, give the same --image_range.",
                name,
                image_range,
                settings.image_range or "type",
            )
    return source_of(name, dataset, settings)


def open_parquet(name: str, files: list[str], settings: SourceSettings) -> MediaSource | FrameStoreSource:
    # Without the files that have no rows: `datasets` takes the size of its batches from one.
    files = [file for file in files if count_rows(file)]
    if not files:
        raise DataSourceError(f"{name}: expected Parquet with rows, got none.")
    with as_source_error(name, "the Parquet files could not be read"):
        dataset = datasets.Dataset.from_parquet(files)
    return source_of(name, dataset, settings)


def count_rows(file: str) -> int:
    """Reads the number of rows at the end of a Parquet file. Raises a DataSourceError if it has no such end."""
    with as_source_error(file, "cannot be read as Parquet; it may be only partly written"):
        return pyarrow.parquet.read_metadata(file).num_rows


def open_hub_dataset(name: str, settings: SourceSettings) -> MediaSource | FrameStoreSource:
    return source_of(name, load_hub_dataset(name, **hub_options(settings)), settings)


def hub_options(settings: SourceSettings) -> dict[str, str | None]:
    """Arguments of `load_hub_dataset`."""
    return {"split": settings.split or "train", "config_name": settings.config_name, "revision": settings.revision}


def load_hub_dataset(
    name: str, split: str, config_name: str | None = None, revision: str | None = None, **options
) -> datasets.Dataset | datasets.IterableDataset:
    """
    Loads a split of a dataset on the Hub, with options of `load_dataset`. Raises a DataSourceError if there is none of
    that name, or no network.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise DataSourceError(f"{name}: no such file or folder.")
    with as_source_error(name, "no such folder, and no dataset of that name could be loaded from the Hub"):
        if not constants.HF_HUB_OFFLINE:
            # Without network this fails at once; load_dataset would try for half a minute.
            HfApi().dataset_info(name, revision=revision, timeout=10)
        return datasets.load_dataset(name, config_name, split=split, revision=revision, **options)


def source_of(name: str, dataset: datasets.Dataset, settings: SourceSettings) -> MediaSource | FrameStoreSource:
    """Makes a source of a table. Raises a DataSourceError if it has no column of videos, images or stored frames."""
    labels = read_labels(name, dataset, settings.label_column) if settings.reads_labels else (None, None)
    if has_frames(dataset.features):
        missing = [column for column in ROW_COLUMNS if column not in dataset.column_names]
        if missing or len(dataset) == 0:
            what = f"the column {missing[0]}" if missing else "rows"
            raise DataSourceError(f"{name}: its column `frames` makes it a frame store, but it lacks {what}.")
        return FrameStoreSource(name, dataset, *labels)
    # decode=False: a row then gives the path or the bytes, and data/media decodes.
    for kind, is_video in [(datasets.Video, True), (datasets.Image, False)]:
        for column, feature in dataset.features.items():
            if isinstance(feature, kind):
                table = dataset.cast_column(column, kind(decode=False))
                source = MediaSource(name, table, column, is_video, *labels)
                if dataset.features.get("duration_seconds") == datasets.Value("float64"):
                    source.durations = read_durations(name, dataset["duration_seconds"][:])
                return source
    raise DataSourceError(
        f"{name}: expected a column of type Video or Image, or `frames` of type List(Image), got "
        f"{', '.join(map(str, dataset.features.values()))} in columns {', '.join(dataset.column_names)}."
    )


def read_durations(name: str, values: list[float | None]) -> list[float | None]:
    """
    Checks the seconds of a table's videos; None, NaN and 0 stand for what only the file tells. Raises an InputError
    for what is no time.
    """
    for row, seconds in enumerate(values):
        if seconds is not None and (seconds < 0 or math.isinf(seconds)):
            raise InputError(f"{name}[{row}]: expected seconds from 0 on as `duration_seconds`, got {seconds}.")
    return [seconds if seconds and not math.isnan(seconds) else None for seconds in values]


def read_labels(name: str, table: datasets.Dataset, column: str | None) -> tuple[np.ndarray | None, list[str] | None]:
    """
    Reads class indices `(N,)`, -1 for none, and class names, of a column or of the one that `find_label_column` finds.
    A column of lists gives targets `(N, C)` (see `index_label_lists`). The names are None where the column has plain
    numbers. None, None without a column; a warning says so of one that was found and has fractions.
    """
    is_found = column is None
    if is_found:
        column = find_label_column(table.features)
    elif column not in table.features:
        raise InputError(f"{name}: has no column {column!r} (--label_column), but {', '.join(table.column_names)}.")
    if column is None:
        return None, None
    feature = table.features[column]
    entry = entry_of(feature)
    # As Arrow, not as Python numbers: tables may have millions of rows.
    values = table.with_format("arrow").select_columns([column])[:].column(column)
    if isinstance(feature, datasets.ClassLabel):
        return values.fill_null(-1).to_numpy().astype(np.int64), list(feature.names)
    if not is_label(feature):
        raise InputError(
            f"{name}: expected class names or indices in column {column!r} (--label_column), got {feature}."
        )
    where = f"{name}, column {column!r}"
    if entry is feature:
        try:
            return index_labels(where, values.to_pylist())
        except InputError as error:
            if not (is_found and feature.dtype.startswith("float")):
                raise
            logger.warning("%s (%s) So it is not read as a column of labels.", error, feature)
            return None, None
    from .label_lists import index_label_lists  # imported here, because few items have several labels

    return index_label_lists(where, values.to_pylist(), getattr(entry, "names", None))


def entry_of(feature: Any) -> Any:
    """The type of a column, or of the entries of a column of lists."""
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature


def is_label(feature: Any) -> bool:
    """
    Whether a column may be one of class names or indices, or of lists of them. Indices may be floats, as pandas writes
    them where some are missing, and truth values are names.
    """
    entry = entry_of(feature)
    if isinstance(entry, datasets.ClassLabel):
        return True
    kinds = ("int", "uint", "string", "large_string") + (("float", "bool") if entry is feature else ())
    return isinstance(entry, datasets.Value) and entry.dtype.startswith(kinds)


def find_label_column(features: datasets.Features) -> str | None:
    """
    Finds the column of labels: the ClassLabel, or the list of them, if there is one, else the column `label`. None if
    it is unclear.
    """
    columns = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    columns = columns or [
        column for column, entry in features.items() if isinstance(entry_of(entry), datasets.ClassLabel)
    ]
    if len(columns) == 1:
        return columns[0]
    named = [column for column in LABEL_COLUMNS if column in (columns or features)]
    return next((column for column in named if columns or is_label(features[column])), None)


def index_labels(where: str, values: Sequence[str | int | float | None]) -> tuple[np.ndarray, list[str] | None]:
    """
    Turns class names into indices of the sorted names, int64 `(N,)`. Numbers alone are indices already, and have no
    names. Empty values and negative numbers become -1, which stands for no label. Messages call their place `where`.

    Raises:
        InputError: if they are numbers, but not all of them whole and below `MAX_CLASSES`.
    """
    # One form for letters with marks, because file systems and editors write them in two.
    texts = [unicodedata.normalize("NFC", "" if value is None else str(value).strip()) for value in values]
    texts = ["" if text.lower() == "nan" else text for text in texts]  # as pandas writes what is missing
    if all(INDEX.fullmatch(text) for text in texts if text):
        if large := [text for text in texts if text and float(text) >= MAX_CLASSES]:
            raise InputError(
                f"{where}: expected labels to be class indices below {MAX_CLASSES:,}, got {large[0][:40]}."
            )
        return np.array([int(max(float(text), -1)) if text else -1 for text in texts], dtype=np.int64), None
    if all(NUMBER.fullmatch(text) for text in texts if text):
        other = next(text for text in texts if text and not INDEX.fullmatch(text))
        raise InputError(f"{where}: expected class names, or class indices, as labels; got the number {other}.")
    texts = ["" if INDEX.fullmatch(text) and text.startswith("-") else text for text in texts]
    class_names = sorted(set(texts) - {""})
    numbers = [class_name for class_name in class_names if INDEX.fullmatch(class_name)]
    if numbers:
        other = next(class_name for class_name in class_names if not INDEX.fullmatch(class_name))
        message = "%s: labels like %s count as names, not as indices, because there are others like %s."
        logger.warning(message, where, numbers[0], other)
    positions = {class_name: index for index, class_name in enumerate(class_names)}
    return np.array([positions.get(text, -1) for text in texts], dtype=np.int64), class_names
