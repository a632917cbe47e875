"""Videos and images behind one interface: frames, and the times at which they are shown."""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch

from ...errors import InputError, MediaDecodingError
from ...settings import Settings, setting
from .images import DEFAULT_OPTIONS, ImageOptions, MediaReader, open_image
from .video import open_video


class TimeLimitError(MediaDecodingError):
    """Reading a file took longer than the limit."""


class DamagedPlaceError(MediaDecodingError):
    """Some frames of a file cannot be read. Others may be."""


class MediaItem(Protocol):
    """One video or image of a source, not opened yet. Messages call it `name`."""

    name: str

    def open(self, video_backend: str) -> MediaReader:
        """Opens it. Raises a `MediaDecodingError` if it cannot be read."""


@dataclass(frozen=True)
class EncodedItem:
    """A video or image file: its path, or its bytes. Of a video, only what is shown from `start` to `end` seconds."""

    media: str | bytes
    name: str
    is_video: bool
    start: float | None = None
    end: float | None = None
    image_options: ImageOptions = DEFAULT_OPTIONS

    def open(self, video_backend: str) -> MediaReader:
        reader, rate = self._open(video_backend), self.image_options.video_frames_per_second
        if self.start is None and self.end is None and rate is None:
            return reader
        from .excerpts import view_video  # imported here, because few ask for parts or other rates

        return view_video(reader, self.start, self.end, self.name, rate if self.is_video else None)

    def _open(self, video_backend: str) -> MediaReader:
        if not self.is_video:
            return open_image(self.media, self.image_options)
        if self.image_options.frame_folders and os.path.isdir(self.media):
            from .frame_folders import FrameFolderReader  # imported here, because few have such folders

            return FrameFolderReader(self.media, self.image_options)
        return open_video(self.media, video_backend)


@dataclass(kw_only=True)
class DecodingArguments(Settings):
    """The choice of a video decoder."""

    video_backend: Literal["decord", "torchcodec", "pyav"] = setting("pyav", "video decoder to try first")


@dataclass(kw_only=True)
class ReadingArguments(DecodingArguments):
    """Settings of reading files, for a `MediaLoader`."""

    seconds_per_file: float = setting(
        60.0, "a file that takes longer to read counts as unreadable; 0: no limit", minimum=0
    )


@dataclass(frozen=True)
class MediaLoader:
    """
    Reads frames of items.

    Args:
        video_backend: what decodes videos (see `open_video`).
        seconds_per_file: a file that takes longer is given up. 0 sets no limit. Reading ends with the packet at hand.
            A decoder that hangs cannot be stopped. It is left behind in a thread, which ends with the process.

    Raises:
        InputError: if the backend is unknown or not installed, or the limit negative.
    """

    video_backend: str = "pyav"
    seconds_per_file: float = 60.0

    def __post_init__(self):
        if self.video_backend != "pyav":  # imported here: decord's wheel does not load on every machine
            from .other_decoders import check_backend

            check_backend(self.video_backend)
        if not self.seconds_per_file >= 0:
            raise InputError(f"seconds_per_file must not be negative, got {self.seconds_per_file}.")

    def read_frames(
        self,
        item: MediaItem,
        choose_frames: Callable[[MediaReader], Sequence[int]],
        choose_part: Callable[[MediaReader], MediaReader] = lambda reader: reader,
    ) -> torch.Tensor:
        """
        Opens an item, decodes the frames whose indices `choose_frames` returns, of the part that `choose_part`
        returns, and closes it.

        Returns:
            uint8 `(T, 3, H, W)`.

        Raises:
            MediaDecodingError: if it cannot be read; `TimeLimitError` if that takes too long, `DamagedPlaceError` if
                other frames may be readable.
        """

        def read() -> torch.Tensor:
            with item.open(self.video_backend) as whole:
                reader = choose_part(whole)
                indices = choose_frames(reader)
                try:
                    return reader.get_frames(indices)
                except MediaDecodingError as error:
                    if reader.num_frames == 1:
                        raise
                    raise DamagedPlaceError(str(error)) from error

        # Frames of a store lie in memory-mapped files. No decoder could hang there, and another thread costs time.
        if not isinstance(item, EncodedItem):
            return read()
        return call_within(self.seconds_per_file, read, item.name)


def part_at_random(reader: MediaReader, seconds: float | None, generator: np.random.Generator) -> MediaReader:
    """Returns a random part of a long video, for a sample that needs `seconds`; None needs all of it."""
    if not reader.is_long or seconds is None:
        return reader
    from .excerpts import draw_part  # imported here, because few have long videos

    return draw_part(reader, seconds, generator)


class ReadingThread:
    """
    Makes calls in a thread, one after the other, until nobody holds this object any more.

    Many files share one: with a thread for each, the allocator gives them different arenas, and one after the other
    fills up (docs/decoding.md).
    """

    def __init__(self):
        self.calls = queue.SimpleQueue()
        # daemon: the process may end although a call hangs.
        self.thread = threading.Thread(target=make_calls, args=(self.calls,), daemon=True)
        self.thread.start()

    def __del__(self):
        self.calls.put(None)


def make_calls(calls: queue.SimpleQueue) -> None:
    """Makes calls until None comes. Each comes with a queue for its result and its error."""
    for function, outcome in iter(calls.get, None):
        try:
            outcome.put((function(), None))
        except BaseException as error:  # the caller raises it
            outcome.put((None, error))
        del function, outcome  # nothing of this file is kept until the next one comes


idle = threading.local()  # `thread`: the ReadingThread of a thread that calls, while it has nothing to do


def call_within(seconds: float, function: Callable[[], torch.Tensor], name: str) -> torch.Tensor:
    """
    Calls `function` and returns its result, or raises its error. After `seconds`, raises a `TimeLimitError` that names
    `name`. 0 sets no limit.

    The call is made in another thread, because decoders are native code, which no signal interrupts: a hanging thread
    can be left behind, a hanging main thread cannot.
    """
    if seconds == 0:
        return function()
    thread, idle.thread = getattr(idle, "thread", None), None
    if thread is None or not thread.thread.is_alive():  # none survives a fork
        thread = ReadingThread()
    outcome = queue.SimpleQueue()
    thread.calls.put((function, outcome))
    try:
        result, error = outcome.get(timeout=min(seconds, threading.TIMEOUT_MAX))  # seconds may be infinite
    except queue.Empty:
        thread.thread.is_given_up = True  # what reads packets looks at it
        thread.calls.put(None)  # it ends as soon as it no longer hangs
        raise TimeLimitError(f"{name}: not read within {seconds:g} s") from None
    idle.thread = thread
    if error is not None:
        raise error
    return result
