"""Other views of an open video: a part of it, as if it were a file of its own, and frames by number, not by time."""

from collections.abc import Sequence

import numpy as np
import torch

from ...errors import MediaDecodingError
from .images import MediaReader, check_indices


MIN_PART_SECONDS = 10.0  # of a long video: at least some frames, whatever the frame rate
ROUNDING_SECONDS = 1e-6  # of times that a user or a table gives


def name_excerpt(start: float | None, end: float | None) -> str:
    """Names a part of a recording for messages: "[12.5-17.0 s]"."""
    return f"[{0.0 if start is None else start}-{'end' if end is None else end} s]"


def draw_part(reader: MediaReader, seconds: float, generator: np.random.Generator) -> MediaReader:
    """Draws a part of a long video, longer than the `seconds` of a sample, so that it may lie anywhere."""
    length = max(2 * seconds, MIN_PART_SECONDS)
    # Some parts begin before the video or end behind it, and are cut. Else samples at its ends would be rare: few
    # parts have them, and within a part a sample lies anywhere.
    margin = (length - seconds) / 2
    start = generator.uniform(-margin, max(reader.duration - length + margin, -margin))
    start, end = max(start, 0.0), start + length
    part = Excerpt(reader, start, end, name_excerpt(round(start, 3), round(end, 3)))
    if part.num_frames > 1:
        return part
    reader.read_whole()  # one picture stands still there; elsewhere there are others
    return reader


def view_video(
    reader: MediaReader, start: float | None, end: float | None, name: str, frames_per_second: float | None
) -> "Excerpt | EvenFrames":
    """
    Returns a part of a video (see `Excerpt`), with `frames_per_second` by number of frames (see `EvenFrames`). Closes
    the video if that fails.
    """
    try:
        if start is not None or end is not None:
            reader = Excerpt(reader, start, end, name)
        return reader if frames_per_second is None else EvenFrames(reader, frames_per_second)
    except BaseException:
        reader.close()
        raise


class View(MediaReader):
    """An open video shown in another way. It closes the video."""

    reader: MediaReader

    def close(self) -> None:
        self.reader.close()


class EvenFrames(View):
    """
    The frames of an open video as if they followed each other at `frames_per_second`. It takes the number of frames,
    so the whole index of a long video is read.
    """

    def __init__(self, reader: MediaReader, frames_per_second: float):
        self.reader = reader
        self.num_frames = reader.num_frames
        self.timestamps = np.arange(self.num_frames) / frames_per_second
        self.duration = self.num_frames / frames_per_second

    def get_frames(self, indices: Sequence[int]) -> torch.Tensor:
        return self.reader.get_frames(indices)


class Excerpt(View):
    """
    The frames that an open video shows between two times. Its first frame is the one on the screen at `start`, which
    is its time 0. It ends at `end`, or with the video if that is earlier. Of a long video only this part is read.

    Args:
        reader: the video, which the excerpt closes.
        start, end: seconds; None for the beginning and the end of the video.
        name: for messages.

    Raises:
        MediaDecodingError: if the video is over before `start`, or cannot be read.
    """

    def __init__(self, reader: MediaReader, start: float | None, end: float | None, name: str):
        self.reader = reader
        start = 0.0 if start is None else start
        end = reader.duration if end is None else min(end, reader.duration)
        if start >= reader.duration > 0:
            raise MediaDecodingError(f"{name}: has no frames, the file ends at {reader.duration:.3f} s")
        if reader.is_long:
            reader.read_part(start, end)
        # The frame that is shown at `start` began before.
        self.first = max(int(reader.timestamps.searchsorted(start + ROUNDING_SECONDS, "right")) - 1, 0)
        last = int(reader.timestamps.searchsorted(end - ROUNDING_SECONDS, "left"))  # the first one behind the end
        if last <= self.first:
            raise MediaDecodingError(f"{name}: has no frames, the file ends at {reader.duration:.3f} s")
        self.timestamps = np.maximum(reader.timestamps[self.first : last] - start, 0.0)
        self.num_frames = len(self.timestamps)
        self.duration = end - start

    def get_frames(self, indices: Sequence[int]) -> torch.Tensor:
        indices = check_indices(indices, self.num_frames, "The excerpt")
        return self.reader.get_frames([self.first + index for index in indices])
