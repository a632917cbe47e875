"""
Reading of images: files, and the frames of a store; and what all readers share. Here are plain JPEGs, which nearly all
are; `other_images.py` has what Pillow reads, and images that are videos.
"""

import contextlib
import importlib.util
import io
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, features

from ...errors import MediaDecodingError


# What Pillow reads. Its wheels have all of these formats, other builds may lack some; HEIF is an extra.
IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".pfm"}
    | ({".jp2", ".j2k", ".jpc", ".j2c", ".jpf", ".jpx"} if features.check("jpg_2000") else set())
    | ({".avif", ".avifs"} if features.check("avif") else set())
    | ({".heic", ".heif", ".hif"} if importlib.util.find_spec("pillow_heif") else set())
)
# JPEG markers (ITU-T T.81, table B.1).
JPEG_START = b"\xff\xd8"
JPEG_START_OF_SCAN = b"\xff\xda"
JPEG_METADATA = b"\xff\xe1"  # APP1: EXIF or XMP, either of which may tell an orientation
JPEG_FILL = b"\xff\xff"


class ImageDecodingError(MediaDecodingError):
    """An image could not be read; the message names it and says why."""


@dataclass(frozen=True)
class ImageOptions:
    """
    How images are read.

    Args:
        image_range: of numbers of more than 8 bits (see `media_reading_vicmae.py`).
        frame_folders: whether folders of numbered frames are videos.
        frames_per_second: of these, and of animations and stacks of images in place of their own times.
        video_frames_per_second: of all videos in place of their own times.
    """

    image_range: str = "type"
    frame_folders: bool = False
    frames_per_second: float | None = None
    video_frames_per_second: float | None = None


DEFAULT_OPTIONS = ImageOptions()


class MediaReader:
    """
    An open video, image or row of a frame store; a context manager.

    Attributes:
        timestamps: float64 array (T,), seconds: when each frame is shown, ascending from 0.
        duration: seconds, to the end of the last frame.
        num_frames: T.
        is_long: whether `timestamps` and `num_frames` are still to be read, which takes long; `read_part` saves it.
    """

    timestamps: np.ndarray
    duration: float
    num_frames: int
    is_long = False

    def read_part(self, start: float, end: float) -> None:
        """
        Reads only the frames that are shown between two times in seconds; only called where `is_long`. `timestamps`
        are those of the whole, as is `duration`; some before and after may be listed, and others left out.
        """

    def read_whole(self) -> None:
        """Takes `read_part` back."""

    def get_frames(self, indices: Iterable[int]) -> torch.Tensor:
        """
        Frames (len(indices), 3, H, W), uint8, upright, in any order and with repetitions. In memory the channels are
        last. Raises a MediaDecodingError if one cannot be read, and a ValueError as `check_indices`.
        """
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def check_indices(indices: Iterable[int], num_frames: int, name: str) -> list[int]:
    """Lists indices. Raises a ValueError if there is none, or one that `name`, of so many frames, does not have."""
    indices = [operator.index(index) for index in indices]
    if not indices or min(indices) < 0 or max(indices) >= num_frames:
        raise ValueError(f"{name} has frames 0 to {num_frames - 1}, asked for {indices}")
    return indices


class ImageReader(MediaReader):
    """An image (3, H, W), uint8, as a video of one frame (see `MediaReader`), so that both go the same way."""

    timestamps = np.zeros(1)
    duration = 0.0
    num_frames = 1

    def __init__(self, image: torch.Tensor):
        self.image = image

    def close(self) -> None:
        self.image = None

    def get_frames(self, indices: Sequence[int]) -> torch.Tensor:
        """Returns the image once for each index, uint8 `(len(indices), 3, H, W)`; all share one memory."""
        return self.image.expand(len(indices), -1, -1, -1)


def open_image(source: str | os.PathLike | bytes, options: ImageOptions = DEFAULT_OPTIONS):
    """
    Opens an image file, or its bytes: an `ImageReader`; of an animation or a stack an `AnimationReader`. In memory the
    channels are last: decoders write them so, and views are cut fastest from them.

    Raises:
        ImageDecodingError: if it cannot be read.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else source
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            data = file.read() if file.read(len(JPEG_START)) == JPEG_START and not file.seek(0) else b""
    except OSError as error:
        raise ImageDecodingError(f"{name}: {error}") from error
    if _plain_jpeg_size(data):
        # Pillow may still read what simplejpeg rejects. If it cannot, its error says why.
        with contextlib.suppress(ValueError):
            return ImageReader(torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1))
    # Imported here, because few need it.
    from .other_images import open_with_pillow

    return open_with_pillow(data or source, name, options)


def read_image(source: str | os.PathLike | bytes, options: ImageOptions = DEFAULT_OPTIONS) -> torch.Tensor:
    """Reads an image (of an animation the first), uint8 RGB `(3, H, W)`. Raises an ImageDecodingError."""
    with open_image(source, options) as reader:
        return reader.get_frames([0])[0]


def decode_jpegs(encoded: Sequence[bytes]) -> torch.Tensor | None:
    """
    Decodes JPEG images of one size to uint8 `(len(encoded), 3, H, W)`, channels last in memory. Returns None if they
    are anything else, or damaged; then `read_image` reads them one by one, or says what is wrong.
    """
    sizes = {_plain_jpeg_size(data) for data in encoded}
    if len(sizes) != 1 or None in sizes:
        return None
    pixels = np.empty((len(encoded), *sizes.pop(), 3), dtype=np.uint8)
    try:
        for data, image in zip(encoded, pixels, strict=True):
            simplejpeg.decode_jpeg(data, buffer=image)  # to where it stays: stacking would copy every frame
    except ValueError:
        return None
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """
    Returns height and width of a JPEG for which simplejpeg, which is faster, gives the same pixels as Pillow. None for
    anything else: CMYK, pictures that have to be turned, and sizes that Pillow takes for an attack.
    """
    if not data.startswith(JPEG_START):
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if color_space in ("CMYK", "YCCK") or height * width > (Image.MAX_IMAGE_PIXELS or np.inf):
        return None
    return None if _may_be_turned(data) and _orientation(data) != 1 else (height, width)


def _may_be_turned(data: bytes) -> bool:
    """
    Whether a JPEG has metadata before its image data, or anything that is not understood here. Only then do we open
    it with Pillow to know its orientation, which takes longer than this look.
    """
    position = len(JPEG_START)
    while position + 4 <= len(data):
        marker = data[position : position + 2]
        if marker == JPEG_START_OF_SCAN:
            return False
        if marker[0] != 0xFF or marker in (JPEG_METADATA, JPEG_FILL):
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4])  # the length counts itself
    return True


def _orientation(data: bytes) -> int:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
