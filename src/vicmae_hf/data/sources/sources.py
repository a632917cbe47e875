"""Opens what a user names (folders, Parquet files, datasets) as tables of videos and images."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow.compute as pc
from huggingface_hub import HfApi, constants

from ...errors import InputError
from ...files import read_json
from ..media.reading import EncodedItem


if TYPE_CHECKING:  # only for annotations: it is loaded when there is a store
    from .frame_store import FrameStoreSource

STORE_FILE = "store.json"  # settings and list of items of a frame store
VIDEO_EXTENSIONS = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"})
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"})


class DataSourceError(InputError):
    """A data source is missing, empty or not understood; the message names it and says what was expected."""


class MediaSource:
    """
    A table of videos and images. `datasets` maps it into memory from its file, where there is one.

    Args:
        name: as the user gave it.
        table: has the column `column`, of paths (string) or of `{"path", "bytes"}` (`Image` or `Video`, not decoded).
        column: name of that column.
        is_video: whether all rows are videos; None where the file extension tells.

    Attributes:
        labels: class indices `(N,)`, int64, of the table's column of type ClassLabel; None if it has none. A row
            without a label has -1.
        class_names: of the labels, or None.
    """

    def __init__(self, name: str, table: datasets.Dataset, column: str, is_video: bool | None = None):
        self.name = name
        self.table = table.select_columns([column])  # reading a row leaves the others alone
        self.official_names = table["name"] if table.features.get("name") == datasets.Value("string") else None
        self.column = column
        self.is_video = is_video
        self.labels, self.class_names = read_labels(table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> EncodedItem:
        value = self.table[index][self.column]
        if isinstance(value, str):
            value = {"path": value, "bytes": None}
        elif value is None:
            # A row without media counts as an unreadable file, and is reported like one.
            value = {"path": None, "bytes": b""}
        path = value["path"]
        has_file = value["bytes"] is None
        is_video = self.is_video if self.is_video is not None else Path(path).suffix.lower() in VIDEO_EXTENSIONS
        name = path if has_file else f"{self.name}[{index}]" + (f" ({path})" if path else "")
        return EncodedItem(path if has_file else value["bytes"], name, is_video)

    def list_names(self) -> list[str]:
        """
        Names the items within the source: by the column `name` (in prepared tables it holds the names of the official
        list), else by the path below the folder, else by the number.
        """
        if self.official_names is not None:
            return list(self.official_names)
        paths = self.table.data.column(self.column)
        if not isinstance(self.table.features[self.column], datasets.Value):
            paths = pc.struct_field(paths, "path")
        root = str(Path(self.name).expanduser()) + os.sep
        return [
            f"[{index}]" if path is None else path.removeprefix(root) for index, path in enumerate(paths.to_pylist())
        ]

    def list_sizes(self) -> list[int]:
        """Counts the bytes of each encoded item; 0 where there is nothing."""
        values = self.table.data.column(self.column)
        if isinstance(self.table.features[self.column], datasets.Value):
            paths, sizes = values.to_pylist(), [None] * len(values)
        else:
            paths = pc.struct_field(values, "path").to_pylist()
            sizes = pc.binary_length(pc.struct_field(values, "bytes")).to_pylist()
        return [file_size(path) if size is None else size for path, size in zip(paths, sizes, strict=True)]


def file_size(path: str | None) -> int:
    try:
        return 0 if path is None else os.path.getsize(path)
    except OSError:
        return 0


def read_labels(table: datasets.Dataset) -> tuple[np.ndarray | None, list[str] | None]:
    """Returns class indices `(N,)` and names of a table's first column of type ClassLabel; None, None without one."""
    for column, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel):
            # As Arrow, not as Python numbers: tables may have millions of rows.
            labels = table.with_format("arrow").select_columns([column])[:].column(column)
            return labels.fill_null(-1).to_numpy().astype(np.int64), list(feature.names)
    return None, None


def open_source(name: str | os.PathLike) -> "MediaSource | FrameStoreSource":
    """
    Opens a folder of videos and images (any nesting), a frame store, a Parquet file or a folder of them, a folder
    written by `Dataset.save_to_disk`, or a dataset by its name on the Hub (split "train"). Names of folders are no
    labels here; `open_labelled` reads them.

    Raises:
        DataSourceError: if it does not exist, holds no videos or images, or is a frame store that is not finished.
    """
    name = os.fspath(name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".parquet":
            return _open_parquet(name, [str(path)])
        raise DataSourceError(f"{name}: expected a folder, a .parquet file or a dataset's name, got a file.")
    if not path.exists():
        return _from_dataset(name, load_hub_dataset(name, "train"))
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise DataSourceError(f"{name}: expected one split, got a folder of them: name one of {', '.join(splits)}.")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        with as_source_error(name, "the saved dataset could not be read"):
            dataset = datasets.load_from_disk(str(path))
        return _from_dataset(name, dataset)
    if (path / STORE_FILE).is_file():  # a finished one was opened above
        raise _unfinished_store_error(name, path)
    media, parquet = list_media(name, path)
    if parquet:
        return _open_parquet(name, parquet)
    return MediaSource(name, table_of_paths(name, media), "path")


def has_frames(features: datasets.Features) -> bool:
    """Whether a table's column `frames` is of type `List(Image)`, as in frame stores."""
    feature = features.get("frames")
    return isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(feature.feature, datasets.Image)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `datasets` or is a frame store, finished or not."""
    return any((folder / file).is_file() for file in ("state.json", "dataset_dict.json", STORE_FILE))


def list_media(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """
    Lists the paths of the media files and the Parquet files below a folder; one of the two lists is empty. Raises a
    DataSourceError if there are neither, or media files beside a dataset.
    """
    files = list_files(folder)
    media = [file for file in files if os.path.splitext(file)[1].lower() in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS]
    parquet = [file for file in files if file.endswith(".parquet")]
    stored = [file for file in files if os.path.basename(file) in (STORE_FILE, "state.json")]
    for other in (parquet, stored):
        if media and other:
            raise DataSourceError(
                f"{name}: holds both media files ({media[0]}) and a dataset ({other[0]}); name them separately."
            )
    if not media and not parquet:
        raise DataSourceError(
            f"{name}: no videos ({' '.join(sorted(VIDEO_EXTENSIONS))}), images ({' '.join(sorted(IMAGE_EXTENSIONS))}) "
            f"or Parquet files found among its {len(files)} files."
        )
    return media, parquet


def table_of_paths(name: str, paths: list[str], labels: list[int] | None = None, **features) -> datasets.Dataset:
    """
    Makes a table with the columns `path` and, if there are labels, `label`, of type `features["label"]`. Raises a
    DataSourceError if a path is no valid UTF-8.
    """
    columns = {"path": paths} | ({} if labels is None else {"label": labels})
    try:
        return datasets.Dataset.from_dict(
            columns, features=datasets.Features({"path": datasets.Value("string"), **features})
        )
    except UnicodeEncodeError as error:
        raise DataSourceError(f"{name}: rename {error.object!r}, file names must be valid UTF-8.") from error


@contextmanager
def as_source_error(name: str, what: str) -> Iterator[None]:
    try:
        yield
    # Any exception: the libraries under `datasets` raise pyarrow's errors, the HTTP client's, RuntimeErrors.
    except Exception as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise DataSourceError(f"{name}: {what} ({reason}).") from error


def list_files(folder: Path) -> list[str]:
    # Strings, because a million Path objects would take a minute to make and sort.
    files = []
    seen = {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        # A link may lead back to a folder that it is in, and the walk would never end.
        return (target := os.path.realpath(path)) not in seen and not seen.add(target)

    def fail(error: OSError) -> None:
        raise DataSourceError(f"{error.filename}: cannot be listed ({error.strerror}).") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = sorted(  # in place: os.walk goes down into what is left
            entry for entry in folders if not entry.startswith(".") and is_new(os.path.join(root, entry))
        )
        files += [os.path.join(root, entry) for entry in sorted(names) if not entry.startswith(".")]
    return files


def _unfinished_store_error(name: str, path: Path) -> DataSourceError:
    store = read_json(path / STORE_FILE)
    num_shards = len(list(path.glob("data-*.arrow")))
    return DataSourceError(
        f"{name}: the frame store is not finished, {num_shards} of {store.get('num_shards')} shards are written. Go "
        f"on with: {store.get('command') or 'pack_frames and the same arguments'}"
    )


def _open_parquet(name: str, files: list[str]) -> "MediaSource | FrameStoreSource":
    with as_source_error(name, "the Parquet files could not be read"):
        dataset = datasets.Dataset.from_parquet(files)
    return _from_dataset(name, dataset)


def load_hub_dataset(name: str, split: str, **options) -> datasets.Dataset | datasets.IterableDataset:
    """
    Loads a split of a dataset on the Hub, with options of `load_dataset`. Raises a DataSourceError if there is none of
    that name, or no network.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise DataSourceError(f"{name}: no such file or folder.")
    with as_source_error(name, "no such folder, and no dataset of that name could be loaded from the Hub"):
        if not constants.HF_HUB_OFFLINE:
            # Without network this fails at once; load_dataset would try for half a minute.
            HfApi().dataset_info(name, timeout=10)
        return datasets.load_dataset(name, split=split, **options)


def _from_dataset(name: str, dataset: datasets.Dataset) -> "MediaSource | FrameStoreSource":
    if has_frames(dataset.features):
        from .frame_store import ROW_COLUMNS, FrameStoreSource

        missing = [column for column in ROW_COLUMNS if column not in dataset.column_names]
        if missing or len(dataset) == 0:
            what = f"the column {missing[0]}" if missing else "rows"
            raise DataSourceError(f"{name}: its column `frames` makes it a frame store, but it lacks {what}.")
        return FrameStoreSource(name, dataset, *read_labels(dataset))
    # decode=False: a row then gives the path or the bytes, and data/media decodes.
    for kind, is_video in [(datasets.Video, True), (datasets.Image, False)]:
        for column, feature in dataset.features.items():
            if isinstance(feature, kind):
                return MediaSource(name, dataset.cast_column(column, kind(decode=False)), column, is_video)
    raise DataSourceError(
        f"{name}: expected a column of type Video or Image, or `frames` of type List(Image), got "
        f"{', '.join(map(str, dataset.features.values()))} in columns {', '.join(dataset.column_names)}."
    )
