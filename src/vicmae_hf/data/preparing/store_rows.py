"""Turns items into rows of a frame store: which items, which of their frames, how they are encoded."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ...errors import InputError, MediaDecodingError
from ...settings import setting
from ..media.images import DEFAULT_OPTIONS
from ..media.other_decoders import check_backend
from ..media.reading import DecodingArguments, MediaItem
from ..samples.frame_choice import choose_stored_frames
from ..sources.labelled import number_classes, open_with_labels
from ..sources.sources import SourceSettings


# The paper stores every 4th frame of videos that mostly have 30 frames/s.
DEFAULT_FRAMES_PER_SECOND = 7.5
# Decoded frames in memory at a time. A longer video is decoded in parts, each from the keyframe before it.
DECODED_BYTES = 256 * 2**20
# Arrow's `list` and `binary` count bytes in 32 bits.
MAX_ROW_BYTES = 2**31 - 2**24


@dataclass(kw_only=True)
class PackingSettings(DecodingArguments):
    """Settings that decide the content of a store, together with the list of items."""

    frames_per_second: float | None = setting(
        None,
        "most frames to keep per second of video; 0 keeps all; default: 7.5, every 4th of 30",
        minimum=0,
    )
    num_frames: int | None = setting(
        None, "frames to keep per video, evenly spread, instead of --frames_per_second", minimum=1
    )
    short_side: int = setting(
        256, "shrink frames to a short side of this many pixels, never enlarge; 0 keeps their size", minimum=0
    )
    format: Literal["jpeg", "webp"] = setting("jpeg", "how frames are encoded")
    quality: int = setting(90, "quality of the encoding, 1 to 100", minimum=1, maximum=100)
    videos_per_shard: int | None = setting(
        None, "videos and images per shard; default: chosen for 16 to 512 shards", minimum=1
    )
    seed: int = setting(0, "random seed of the order in which items are stored", minimum=0)

    def __post_init__(self):
        if self.frames_per_second is not None and self.num_frames is not None:
            raise InputError("--frames_per_second and --num_frames were both given: choose one.")
        super().__post_init__()  # first, because the rate of frame folders has to be given
        if self.frames_per_second is None and self.num_frames is None:
            self.frames_per_second = DEFAULT_FRAMES_PER_SECOND
        check_backend(self.video_backend)


@dataclass(frozen=True)
class PackingInput:
    """
    The videos and images to pack.

    Args:
        name: as the user gave it.
        items: anything that `open_source` returns.
        item_names: path of each within the input.
        item_sizes: bytes of each (number of frames for a store's rows), to notice other files of the same names.
        labels: class indices `(N,)`, or targets `(N, C)` where an item may have several labels; -1 for none; or None.
        class_names: of the labels; or None.
    """

    name: str
    items: Sequence[MediaItem]
    item_names: list[str]
    item_sizes: list[int]
    labels: np.ndarray | None
    class_names: list[str] | None

    @classmethod
    def open(
        cls,
        name: str | os.PathLike,
        labelled: bool = False,
        class_names: Sequence[str] | None = None,
        settings: SourceSettings | None = None,
    ) -> "PackingInput":
        """
        Opens a source. If `labelled`, it needs labels, and ROOT/CLASS_NAME/FILE has them. Lists, metadata files and
        datasets with a column of labels keep them in any case. Classes have the order of `class_names` (see
        `open_labelled`).
        """
        name = os.fspath(name)
        source = open_with_labels(name, labelled, class_names, "--label_names", settings)
        if labelled:
            items = source.items
            return cls(name, items, items.list_names(), items.list_sizes(), source.labels, source.class_names)
        names = source.class_names
        if names is None and source.labels is not None:
            names = number_classes(source.labels)
        return cls(name, source, source.list_names(), source.list_sizes(), source.labels, names)

    @property
    def image_range(self) -> str:
        """The numbers that were made black and white in images of more than 8 bits."""
        return getattr(self.items, "image_options", DEFAULT_OPTIONS).image_range

    def digest(self) -> str:
        """Computes the SHA-256 of names, sizes, labels and classes in their order, and of how images are read."""
        # Sizes and not contents: hashing terabytes would take as long as packing them.
        labels = None if self.labels is None else self.labels.tolist()
        content = [self.item_names, self.item_sizes, labels, self.class_names]
        options = getattr(self.items, "image_options", DEFAULT_OPTIONS)
        if options != DEFAULT_OPTIONS:  # else stores begun before there were any could not go on
            values = astuple(options)
            content.append(values[:3] if values[3:] == (None,) else values)  # the last came later
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def features(self) -> datasets.Features:
        """Describes the columns of a store; `fps` is the source's own rate, an image has none."""
        columns = {
            "name": datasets.Value("string"),
            "frames": datasets.List(datasets.Image(decode=False)),
            "timestamps": datasets.List(datasets.Value("float64")),
            "duration": datasets.Value("float64"),
            "fps": datasets.Value("float64"),
        }
        if self.class_names is not None:
            label = datasets.ClassLabel(names=self.class_names)
            columns["label"] = label if self.labels.ndim == 1 else datasets.List(label)
        return datasets.Features(columns)


def stored_label(label: np.ndarray) -> int | list[int] | None:
    """Turns an item's class index, or its targets `(C,)`, into what the column `label` of a store holds."""
    if (label < 0).any():
        return None
    return int(label) if label.ndim == 0 else np.flatnonzero(label).tolist()


def encode_frame(frame: torch.Tensor, settings: PackingSettings) -> bytes:
    """
    Makes a frame, uint8 `(3, H, W)`, smaller (bicubic, antialiased) and encodes it by Pillow.

    Raises:
        MediaDecodingError: if the format cannot hold it: WebP ends at 16,383 pixels, JPEG at 65,535.
    """
    height, width = frame.shape[-2:]
    if 0 < settings.short_side < min(height, width):
        scale = settings.short_side / min(height, width)
        size = [round(height * scale), round(width * scale)]
        frame = F.resize(frame, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    output = io.BytesIO()
    try:
        picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        picture.save(output, settings.format.upper(), quality=settings.quality)
    except (OSError, ValueError) as error:
        raise MediaDecodingError(f"a frame of {width}x{height} pixels cannot be encoded: {error}") from error
    return output.getvalue()


def pack_item(item: MediaItem, settings: PackingSettings) -> dict[str, Any]:
    """Makes the columns `frames`, `timestamps`, `duration` and `fps` of an item."""
    with item.open(settings.video_backend) as reader:
        indices = choose_stored_frames(
            reader.timestamps, reader.duration, settings.frames_per_second, settings.num_frames
        )
        # The first frame tells how many fit into memory.
        first = reader.get_frames(indices[:1])
        frames = [encode_frame(first[0], settings)]
        step = max(DECODED_BYTES // first.numel(), 1)
        for start in range(1, len(indices), step):
            decoded = reader.get_frames(indices[start : start + step])
            frames += [encode_frame(frame, settings) for frame in decoded]
    if sum(map(len, frames)) > MAX_ROW_BYTES:
        raise MediaDecodingError(
            f"its {len(frames)} encoded frames exceed the 2 GiB of a row; store fewer or smaller ones, or cut it"
        )
    return {
        "frames": [{"bytes": frame, "path": None} for frame in frames],  # as `datasets` stores an Image
        "timestamps": reader.timestamps[indices],
        "duration": reader.duration,
        "fps": reader.num_frames / reader.duration if reader.duration > 0 else None,
    }
