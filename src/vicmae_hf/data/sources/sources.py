"""Opens what a user names (folders, files, lists, datasets) as tables of videos and images."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow.compute as pc

from ...errors import InputError
from ...settings import ArgumentsError, Settings, setting
from ..media.images import DEFAULT_OPTIONS, IMAGE_EXTENSIONS, ImageOptions
from ..media.reading import EncodedItem


if TYPE_CHECKING:  # only for annotations: it is loaded when there is a store
    from .frame_store import FrameStoreSource

STORED_TIMES = "a frame store has its times from packing; pack it with --nominal_frames_per_second."
STORE_FILE = "store.json"  # settings and list of items of a frame store
VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi", ".divx", ".wmv", ".asf", ".flv"}
    | {".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".mxf", ".ogv", ".ogm", ".dv"}
    | {".rm", ".rmvb", ".mjpeg", ".mjpg", ".y4m", ".ivf", ".h264", ".264", ".hevc", ".h265", ".265"}
)


class DataSourceError(InputError):
    """A data source is missing, empty or not understood; the message names it and says what was expected."""


@dataclass(kw_only=True)
class SourceSettings(Settings):
    """Settings of how the names of data are understood, for `open_source`."""

    reads_labels = True  # False where none are needed, so that wrong labels do no harm

    data_root: str | None = setting(None, "folder that paths in a list are relative to; default: the list's own")
    split: str | None = setting(None, "split of a dataset on the Hub; default: train")
    config_name: str | None = setting(None, "configuration of a dataset on the Hub")
    revision: str | None = setting(None, "branch, tag or commit of a dataset on the Hub; default: the newest")
    label_column: str | None = setting(
        None, "column of the labels in a list or table; default: a dataset's only ClassLabel column, else `label`"
    )
    image_range: str = setting(
        "type",
        "values that become black and white in images of more than 8 bits: type (limits of the data type), file "
        "(smallest and largest value of each picture) or LOW,HIGH",
    )
    segment_seconds: float | None = setting(
        None, "divide long videos into segments of about this length, each an item; default: undivided", minimum=0.001
    )
    frame_folders: bool = setting(False, "read folders of numbered frames (VIDEO/000001.jpg) as videos")
    source_frames_per_second: float | None = setting(
        None, "frame rate of frame folders, and of animations and image stacks in place of their own", above=0
    )
    nominal_frames_per_second: float | None = setting(
        None, "treat all videos as having this frame rate: frames are counted, and their own times ignored", above=0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.frame_folders and self.source_frames_per_second is None:
            # A default is the rate of something else: of clips.
            given = getattr(self, "frames_per_second", None)
            self.source_frames_per_second = given if given != getattr(type(self), "frames_per_second", None) else None
            if not self.source_frames_per_second:
                raise ArgumentsError("--frame_folders: give the frame rate, such as --source_frames_per_second 30.")
        if self.image_range not in ("type", "file", None):
            from ...media_reading_vicmae import read_range  # imported here, because few need it

            try:
                read_range(self.image_range)
            except ValueError as error:
                raise ArgumentsError(f"--{error}") from error

    def image_options(self) -> ImageOptions:
        rates = self.source_frames_per_second, self.nominal_frames_per_second
        return ImageOptions(self.image_range or "type", self.frame_folders, *rates)


class MediaSource:
    """
    A table of videos and images. `datasets` maps it into memory from its file, where there is one.

    Args:
        name: as the user gave it.
        table: has the column `column`, of paths (string) or of `{"path", "bytes"}` (`Image` or `Video`, not decoded).
        column: name of that column.
        is_video: whether all rows are videos; None if file extensions tell.
        labels: class indices `(N,)`, int64, or targets `(N, C)` (see `LabelledSource`), or None; -1 in rows without.
        class_names: of the labels; None where the labels are indices without names.
    """

    durations: list[float | None] | None = None  # of the videos in seconds, where the table has them

    def __init__(
        self,
        name: str,
        table: datasets.Dataset,
        column: str,
        is_video: bool | None = None,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
    ):
        self.name = name
        self.table = table.select_columns([column])  # reading a row leaves the others alone
        self.official_names = table["name"] if table.features.get("name") == datasets.Value("string") else None
        self.column = column
        self.is_video = is_video
        self.labels = labels
        self.class_names = class_names
        self.image_options = DEFAULT_OPTIONS

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
        # A folder of frames has no extension of an image.
        suffix = Path(path or "image.jpg").suffix.lower()
        is_video |= self.image_options.frame_folders and suffix not in IMAGE_EXTENSIONS
        media = path if has_file else value["bytes"]
        return EncodedItem(media, name, is_video, image_options=self.image_options)

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
        paths = paths.to_pylist()
        if paths == [root[:-1]]:  # the source is one file
            return [os.path.basename(paths[0])]
        return [f"[{index}]" if path is None else path.removeprefix(root) for index, path in enumerate(paths)]

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
        if path is not None and os.path.isdir(path):
            from ..media.frame_folders import folder_size

            return folder_size(path)
        return 0 if path is None else os.path.getsize(path)
    except OSError:
        return 0


def open_source(name: str | os.PathLike, settings: SourceSettings | None = None) -> "MediaSource | FrameStoreSource":
    """
    Opens a folder of videos and images (any nesting), one video or image, a list of them, a frame store, a Parquet
    file or a folder of them, a folder written by `Dataset.save_to_disk`, or a dataset by its name on the Hub; stores
    and Parquet also by a URL (s3://, gs://, hf://). Names of folders are no labels here; `open_labelled` reads them.

    Raises:
        DataSourceError: if it does not exist, holds no videos or images, or is a frame store that is not finished.
        InputError: if a list is malformed, or some of its files are missing.
    """
    from .selection import finish_source  # imported here, because it does something for few

    settings = SourceSettings() if settings is None else settings
    return finish_source(_open(os.fspath(name), settings), settings)


def _open(name: str, settings: SourceSettings) -> "MediaSource | FrameStoreSource":
    if "://" in name:
        from .object_storage import open_remote  # imported here, because few have their data there

        return open_remote(name, settings)
    # Imported here: a folder of videos needs none of it. You may leave it out when you read how pretraining works.
    from .selection import list_media, table_of_paths
    from .tables import open_hub_dataset, open_parquet, open_saved_dataset

    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".parquet":
            return open_parquet(name, [str(path)], settings)
        if path.suffix.lower() in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
            return MediaSource(name, table_of_paths(name, [str(path)]), "path")
        from .lists import open_list

        return open_list(name, path, settings)
    if not path.exists():
        return open_hub_dataset(name, settings)
    if is_saved_dataset(path):
        return open_saved_dataset(name, path, settings)
    media, parquet = list_media(name, path, settings.frame_folders)
    if parquet:
        return open_parquet(name, parquet, settings)
    return MediaSource(name, table_of_paths(name, media), "path")


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `datasets` or is a frame store, finished or not."""
    # `datasets` writes both files. Programs of all kinds leave a state.json alone.
    is_table = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return is_table or any((folder / file).is_file() for file in ("dataset_dict.json", STORE_FILE))
