"""
Divides long recordings: into segments, so that an epoch, a batch and a row of a store mean the same as for clips; into
steps of time, of which each has features of its own.
"""

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from ...errors import MediaDecodingError
from ..media.excerpts import name_excerpt
from ..media.reading import EncodedItem, MediaReader, call_within
from ..media.video import warn_once
from .sources import MediaSource


logger = logging.getLogger(__name__)

NUM_THREADS = 8  # that open files; they wait for disks
SHORTEST_REST = 0.1  # of a step; what is left over at the end of a video and shorter belongs to the step before
DURATION_TOLERANCE = 0.01  # seconds, by which tables may round


@dataclass(frozen=True)
class Segment(EncodedItem):
    """A part of a recording of which a table says how long it is, in seconds; None if none does."""

    table_seconds: float | None = None

    def _open(self, video_backend: str) -> MediaReader:
        reader = super()._open(video_backend)
        if self.table_seconds is not None and reader.duration > self.table_seconds + DURATION_TOLERANCE:
            warn_once(
                "table's duration",
                "%s: the file is %.3f s long, but its table says %.3f s (duration_seconds), so the rest is not read. "
                "Make the table anew, or leave that column out. Not said again for further files.",
                *(self.media if isinstance(self.media, str) else self.name, reader.duration, self.table_seconds),
            )
        return reader


class SegmentedSource:
    """
    Segments of the items of a source, with the interface of `MediaSource`.

    Args:
        source: the recordings.
        places: index of the recording of each segment, int64 `(N,)`.
        times: start and end of each segment in seconds, of the recording; None for an item as a whole.
    """

    def __init__(self, source: MediaSource, places: np.ndarray, times: Sequence[tuple[float, float] | None]):
        self.name = source.name
        self.source = source
        self.table = source.table
        self.places = places
        self.times = times
        self.labels = None if source.labels is None else source.labels[places]
        self.class_names = source.class_names

    @property
    def image_options(self):
        return self.source.image_options

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> EncodedItem:
        item, times = self.source[int(self.places[index])], self.times[index]
        if times is None:
            return item
        part = {"name": name_segment(item.name, item, times), "start": times[0], "end": times[1]}
        durations = self.source.durations
        seconds = None if durations is None else durations[int(self.places[index])]
        return Segment(**vars(item) | part, table_seconds=seconds)

    def list_names(self) -> list[str]:
        """Names the segments by their recordings and times."""
        names = self.source.list_names()
        return [
            names[place] if times is None else name_segment(names[place], self.source[int(place)], times)
            for place, times in zip(self.places, self.times, strict=True)
        ]

    def list_sizes(self) -> list[int]:
        """Counts the bytes of the recording of each segment."""
        sizes = self.source.list_sizes()
        return [sizes[place] for place in self.places]

    def select(self, indices: np.ndarray) -> "SegmentedSource":
        """Returns the segments at `indices`."""
        return SegmentedSource(self.source, self.places[indices], [self.times[index] for index in indices])


class SteppedSource(SegmentedSource):
    """
    Steps of time of the items of a source. An item is several steps that follow each other, because opening a
    recording for each of them would take longer than reading it.

    Args:
        source, places: as above.
        bounds: of each item, the seconds of the recording at which its S steps begin and the last one ends,
            `(S + 1,)`; None for an image, and for a video that could not be opened.
    """

    def __init__(self, source: MediaSource, places: np.ndarray, bounds: Sequence[np.ndarray | None]):
        times = [None if steps is None else (float(steps[0]), float(steps[-1])) for steps in bounds]
        super().__init__(source, places, times)
        self.bounds = bounds

    def step_times(self, items: np.ndarray) -> torch.Tensor:
        """
        Lists the times of rows `(R,)` of embeddings, of which each item has one for each of its steps, one after the
        other: starts and ends `(R, 2)`, float64; NaN for an image.
        """
        distinct = np.unique(items)
        bounds = [np.full(2, np.nan) if self.bounds[item] is None else self.bounds[item] for item in distinct]
        return torch.from_numpy(np.concatenate([np.stack([steps[:-1], steps[1:]], axis=1) for steps in bounds]))

    def select(self, indices: np.ndarray) -> "SteppedSource":
        return SteppedSource(self.source, self.places[indices], [self.bounds[index] for index in indices])


def divide(source: MediaSource, seconds: float, seconds_per_file: float) -> SegmentedSource:
    """
    Divides each video of a source into equal segments of about `seconds`; what is shorter than one and a half of them
    stays whole, as do images, and files that cannot be opened within `seconds_per_file`: these are reported when
    they are read. Where the source's table has durations, no file is opened.
    """
    spans = find_spans(source, seconds_per_file)
    places, times = [], []
    for place, (start, duration) in enumerate(spans):
        count = max(int(duration / seconds + 0.5), 1)
        bounds = np.linspace(start, start + duration, count + 1).round(3).tolist()
        places += [place] * count
        times += [None] if count == 1 else list(pairwise(bounds))
    num_whole = times.count(None)
    if num_whole == len(source):
        if any(duration for _, duration in spans):  # of images alone there is nothing to say
            message = "%s: no file is long enough for two segments of %g s, so each stays whole."
            logger.info(message, source.name, seconds)
    else:
        counts = (len(source) - num_whole, len(times) - num_whole, seconds, num_whole)
        message = "%s: %d files are divided into %d segments of about %g s, %d others stay whole."
        logger.info(message, source.name, *counts)
    return SegmentedSource(source, np.array(places, dtype=np.int64), times)


def cut_into_steps(source: MediaSource, seconds: float, steps_per_item: int, seconds_per_file: float) -> SteppedSource:
    """
    Cuts each video of a source into steps of `seconds` from its beginning, or from that of the part that a list names.
    The last one is shorter, or up to a tenth longer. No file is opened where the source's table has durations.
    """
    places, bounds = [], []
    for place, (start, duration) in enumerate(find_spans(source, seconds_per_file)):
        if duration == 0:
            places.append(place)
            bounds.append(None)
            continue
        count = max(math.ceil(duration / seconds - SHORTEST_REST), 1)
        times = (start + np.append(np.arange(count) * seconds, duration)).round(6)  # (steps + 1,)
        firsts = range(0, count, steps_per_item)
        places += [place] * len(firsts)
        bounds += [times[first : first + steps_per_item + 1] for first in firsts]
    return SteppedSource(source, np.array(places, dtype=np.int64), bounds)


def find_spans(source: MediaSource, seconds_per_file: float) -> list[tuple[float, float]]:
    """Finds start and duration of each item (see `find_span`), without opening it where the table has durations."""

    def span(index: int) -> tuple[float, float]:
        duration = None if source.durations is None else source.durations[index]
        return find_span(source[index], seconds_per_file) if duration is None else (0.0, duration)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(pool.map(span, range(len(source))))


def name_segment(name: str, item: EncodedItem, times: tuple[float, float]) -> str:
    """Names a segment by its item's name, and its times in place of those of a part that a list names."""
    is_part = item.start is not None or item.end is not None
    return (
        f"{name.removesuffix(name_excerpt(item.start, item.end)).rstrip() if is_part else name} {name_excerpt(*times)}"
    )


def read_duration(item: EncodedItem, video_backend: str, seconds_per_file: float) -> float:
    """Opens an item and closes it. Raises a `MediaDecodingError` if that fails or takes too long."""

    def read() -> float:
        with item.open(video_backend) as reader:
            return reader.duration

    return call_within(seconds_per_file, read, item.name)


def find_span(item: EncodedItem, seconds_per_file: float) -> tuple[float, float]:
    """Finds when a video, or a part of one, begins, and how long it is; 0 s for images and what cannot be opened."""
    if item.is_video:
        # Segments count the recording's own seconds.
        item = replace(item, image_options=replace(item.image_options, video_frames_per_second=None))
        try:
            return item.start or 0.0, read_duration(item, "pyav", seconds_per_file)
        except MediaDecodingError:
            pass  # it is reported when it is read
    return 0.0, 0.0
