"""Reads frame stores: tables whose rows are lists of encoded frames."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ...errors import MediaDecodingError
from ..media.images import MediaReader, check_indices, decode_jpegs, read_image


ROW_COLUMNS = ("frames", "timestamps", "duration")


def has_frames(features: datasets.Features) -> bool:
    """Whether a table's column `frames` is of type `List(Image)`, as in frame stores."""
    feature = features.get("frames")
    return isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(feature.feature, datasets.Image)


class FrameStoreSource:
    """
    Rows of stored frames, with the interface of `MediaSource`.

    `datasets` has mapped the file into memory, and the columns are read there: reading a frame touches only its own
    bytes, and workers share them.

    Args:
        name: as the user gave it.
        table: has the columns `frames` (`List(Image)`), `timestamps` (seconds, one per frame, ascending from 0) and
            `duration` (seconds); `name` is shown in messages if there is one. It has no indices mapping (as after
            `shuffle`), because rows are read by their place in the file.
        labels, class_names: see `MediaSource`.
    """

    def __init__(self, name: str, table: datasets.Dataset, labels: np.ndarray | None, class_names: list[str] | None):
        self.name = name
        self.table = table
        self.labels = labels
        self.class_names = class_names
        # Arrow's own columns, because `table[index]` would decode or copy every frame of the row.
        self.columns = {column: table.data.column(column) for column in ROW_COLUMNS}
        self.row_names = table.data.column("name") if "name" in table.column_names else None

    def __reduce__(self):
        # Workers get a copy. `datasets` sends the paths of its files; pyarrow's columns would be sent with all bytes.
        return type(self), (self.name, self.table, self.labels, self.class_names)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> "StoredItem":
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has rows 0 to {len(self) - 1}, asked for {index}.")
        row_name = self.row_names[index].as_py() if self.row_names is not None else None
        name = f"{self.name}[{index}]" + (f" ({row_name})" if row_name else "")
        return StoredItem(name, *(self.columns[column][index] for column in ROW_COLUMNS))

    def list_names(self) -> list[str]:
        """Names the rows by their source, or by their number."""
        names = [None] * len(self) if self.row_names is None else self.row_names.to_pylist()
        return [name or f"[{index}]" for index, name in enumerate(names)]

    def list_sizes(self) -> list[int]:
        """Counts the frames of each row."""
        return pc.fill_null(pc.list_value_length(self.columns["frames"]), 0).to_pylist()


@dataclass(frozen=True)
class StoredItem:
    """A row of a frame store: its name for messages, and its values of three columns, still in Arrow's memory."""

    name: str
    frames: pa.Scalar
    timestamps: pa.Scalar
    duration: pa.Scalar

    def open(self, video_backend: str) -> "StoredFrames":
        return StoredFrames(self)


class StoredFrames(MediaReader):
    """
    The frames of a row as an open video (see `MediaReader`). Raises a MediaDecodingError if the row has no frames, or
    not a timestamp for each.
    """

    def __init__(self, item: StoredItem):
        self.name = item.name
        if not (item.frames.is_valid and item.timestamps.is_valid and item.duration.is_valid and len(item.frames)):
            raise MediaDecodingError(f"{item.name}: the row lacks frames, timestamps or duration")
        self._frames = item.frames.values
        self.num_frames = len(self._frames)
        self.timestamps = item.timestamps.values.to_numpy(zero_copy_only=False)
        self.duration = item.duration.as_py()
        if len(self.timestamps) != self.num_frames:
            raise MediaDecodingError(f"{item.name}: {self.num_frames} frames, but {len(self.timestamps)} timestamps")

    def close(self) -> None:
        self._frames = None  # lets go of the mapped file

    def get_frames(self, indices: Iterable[int]) -> torch.Tensor:
        """
        Frames at `indices` (see `MediaReader`). Other frames of the row are not touched. Raises a MediaDecodingError
        if one of them is damaged, or they differ in size.
        """
        indices = check_indices(indices, self.num_frames, self.name)
        distinct = list(dict.fromkeys(indices))
        encoded = [self._read(index) for index in distinct]
        frames = decode_jpegs(encoded)  # the fast way for the usual case: all are JPEGs of one size
        if frames is None:
            frames = torch.stack(self._decode_each(distinct, encoded)).permute(0, 3, 1, 2)
        if distinct != indices:
            rows = [distinct.index(index) for index in indices]
            # Indexed as (T, H, W, 3), because indexing would write (T, 3, H, W) with the channels first in memory.
            frames = frames.permute(0, 2, 3, 1)[rows].permute(0, 3, 1, 2)
        return frames

    def _decode_each(self, indices: list[int], encoded: list[bytes]) -> list[torch.Tensor]:
        """Decodes frames one by one, each (H, W, 3)."""
        images = []
        for index, data in zip(indices, encoded, strict=True):
            try:
                images.append(read_image(data).permute(1, 2, 0))
            except MediaDecodingError as error:
                raise MediaDecodingError(f"{self.name}, frame {index}: {error}") from error
        if len({image.shape for image in images}) > 1:
            raise MediaDecodingError(f"{self.name}: its frames differ in size")
        return images

    def _read(self, index: int) -> bytes:
        frame = self._frames[index].as_py()
        try:
            return frame["bytes"] if frame["bytes"] is not None else Path(frame["path"]).read_bytes()
        except (OSError, TypeError) as error:
            raise MediaDecodingError(f"{self.name}, frame {index}: {error}") from error
