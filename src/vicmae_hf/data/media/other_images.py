"""Images that Pillow reads: every format but plain JPEG; animations and stacks, which are videos."""

import contextlib
import io
import os
import struct
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ...media_reading_vicmae import IMAGE_FORMATS, list_frames, to_rgb
from .images import ImageDecodingError, ImageOptions, ImageReader, MediaReader, check_indices
from .video import warn_once


# Seconds. Browsers show frames that are shorter, or have no time, for so long.
SHORTEST_FRAME, DEFAULT_FRAME = 0.011, 0.1


def open_with_pillow(
    source: str | os.PathLike | bytes, name: str, options: ImageOptions
) -> "ImageReader | AnimationReader":
    """Opens a file or its bytes (see `open_image`), which messages call `name`."""
    with as_image_error(name):
        # A path stays one, because Pillow reads only the wanted pictures of a stack.
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)
        frames, num_left_out = list_frames(image)
        if num_left_out:
            message = "%s: its %d pages have several sizes; only the largest is read. "
            warn_once("pages", message + "Not said again for further files.", name, num_left_out + 1)
        if len(frames) > 1:
            return AnimationReader(image, frames, name, options)
        with image:
            image.seek(frames[0])
            return ImageReader(to_tensor(image, options))


def to_tensor(image: Image.Image, options: ImageOptions) -> torch.Tensor:
    # A copy where Pillow's memory may not be written to.
    return torch.from_numpy(np.require(to_rgb(image, options.image_range), requirements="W")).permute(2, 0, 1)


class AnimationReader(MediaReader):
    """
    An animated GIF, PNG, WebP or AVIF, or a TIFF of several pages of one size, as a video (see `MediaReader`). Frames
    are shown as long as the file says, or follow each other at `frames_per_second`. Pages of a TIFF have no times.
    """

    def __init__(self, image: Image.Image, frames: list[int], name: str, options: ImageOptions):
        self.image = image
        self.frames = frames
        self.name = name
        self.options = options
        self.num_frames = len(frames)
        ends = np.cumsum(self._read_durations())
        self.timestamps = np.concatenate([[0.0], ends[:-1]])
        self.duration = float(ends[-1])

    def close(self) -> None:
        self.image.close()

    def get_frames(self, indices: Iterable[int]) -> torch.Tensor:
        """
        Frames at `indices` (see `MediaReader`). A TIFF reads only these; frames of an animation are differences from
        the one before, and are decoded from the first.
        """
        indices = check_indices(indices, self.num_frames, self.name)
        pictures = {}
        with as_image_error(self.name):
            for index in sorted(set(indices)):
                self.image.seek(self.frames[index])
                pictures[index] = to_tensor(self.image, self.options).permute(1, 2, 0)
        return torch.stack([pictures[index] for index in indices]).permute(0, 3, 1, 2)

    def _read_durations(self) -> np.ndarray:
        """Returns how long each frame is shown, in seconds."""
        if self.options.frames_per_second is not None:
            return np.full(self.num_frames, 1 / self.options.frames_per_second)
        if self.image.format == "TIFF":
            warn_of_unknown_rate(self.name)
            return np.full(self.num_frames, DEFAULT_FRAME)
        durations = []
        for frame in self.frames:
            self.image.seek(frame)
            self.image.load()  # WebP and AVIF know the time of a frame only then
            durations.append(self.image.info.get("duration", 0) / 1000)  # milliseconds
        return np.array([seconds if seconds >= SHORTEST_FRAME else DEFAULT_FRAME for seconds in durations])


def warn_of_unknown_rate(name: str) -> None:
    """Warns once per process and not for every file."""
    warn_once(
        "rate",
        "%s: its pages have no times, so %g frames per second are assumed; --source_frames_per_second sets another "
        "rate. Not said again for further files.",
        *(name, 1 / DEFAULT_FRAME),
    )


@contextlib.contextmanager
def as_image_error(name: str) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageDecodingError(f"{name}: in no image format of {', '.join(IMAGE_FORMATS)}") from error
    # What Pillow raises on broken files, or on broken EXIF data in them.
    except (OSError, SyntaxError, TypeError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ImageDecodingError(f"{name}: {error}") from error
    # Damaged bytes make its parsers fail in other ways, too (IndexError, KeyError, RuntimeError, ...), and no run must
    # end at one file.
    except Exception as error:
        raise ImageDecodingError(f"{name}: damaged ({type(error).__name__}: {error})") from error
