"""Reads files one by one, each in a fresh process, as the measure of what the scripts should find."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from launching import FORKS
from plain_user import give_up_capabilities

from vicmae_hf.data.media.reading import EncodedItem, MediaLoader, MediaReader
from vicmae_hf.data.samples.frame_choice import choose_view_clips
from vicmae_hf.data.sources.sources import VIDEO_EXTENSIONS
from vicmae_hf.errors import MediaDecodingError


SECONDS = 60
# As the scripts of the test are told to.
CLIP_FRAMES = 4


@dataclass(frozen=True)
class Reading:
    """
    Whether a file can be read.

    Args:
        frames: each of its frames alone; empty if it cannot be opened.
        whole: all of them at once.
        clip: those of an evaluation's clip at once.
        longest_side: pixels of the first frame, along the longer side; 0 if it cannot be read.
        end: how the reading ended if not so: "hang", an exit status, or an error that is no decoding error.
    """

    frames: list[bool]
    whole: bool
    clip: bool
    longest_side: int = 0
    end: str | None = None


def read_alone(path: Path) -> Reading:
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_send_reading, args=(str(path), sender))
    process.start()
    sender.close()
    try:
        reading = receiver.recv() if receiver.poll(SECONDS) else Reading([], False, False, end="hang")
    except EOFError:  # it died
        process.join()
        reading = Reading([], False, False, end=f"exit status {process.exitcode}")
    process.kill()
    process.join()
    return reading


def _send_reading(path: str, sender: Connection) -> None:
    give_up_capabilities()
    try:
        sender.send(_read(EncodedItem(path, path, Path(path).suffix in VIDEO_EXTENSIONS)))
    except Exception as error:
        sender.send(Reading([], False, False, end=f"{type(error).__name__}: {error}"))


def _read(item: EncodedItem) -> Reading:
    try:
        with item.open("pyav") as reader:
            num_frames = reader.num_frames
    except MediaDecodingError:
        return Reading([], False, False)
    sides = [_longest_side(item, lambda reader, index=index: [index]) for index in range(num_frames)]
    frames = [side > 0 for side in sides]
    if num_frames == 1:
        return Reading(frames, *frames, *frames, sides[0])
    return Reading(
        frames,
        whole=_longest_side(item, lambda reader: range(reader.num_frames)) > 0,
        clip=_longest_side(item, choose_clip) > 0,
        longest_side=sides[0],
    )


def choose_clip(reader: MediaReader) -> np.ndarray:
    """Of a protocol with one clip, spread over the whole video."""
    return np.unique(choose_view_clips(reader.timestamps, reader.duration, CLIP_FRAMES, None, 1))


def _longest_side(item: EncodedItem, choose_frames: Callable[[MediaReader], Sequence[int]]) -> int:
    """In pixels; 0 if these frames cannot be read."""
    try:
        return max(MediaLoader("pyav", 0).read_frames(item, choose_frames).shape[-2:])
    except MediaDecodingError:
        return 0
