"""Divides long recordings into segments, so that an epoch, a batch and a row of a store mean the same as for clips."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np

from ...errors import MediaDecodingError
from ..media.excerpts import name_excerpt
from ..media.reading import EncodedItem
from .sources import MediaSource


logger = logging.getLogger(__name__)

NUM_THREADS = 8  # that open files; they wait for disks


class SegmentedSource:
    """
    Segments of the items of a source, with the interface of `MediaSource`.

    Args:
        source: the recordings.
        places: index of the recording of each segment, int64 `(N,)`.
        times: start and end of each segment in seconds, within the item of the source; None for an item as a whole.
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
        offset = item.start or 0.0  # of a part in a list
        start, end = (round(offset + time, 3) for time in times)
        return replace(item, name=f"{item.name} {name_excerpt(start, end)}", start=start, end=end)

    def list_names(self) -> list[str]:
        """Names the segments by their recordings and times."""
        names = self.source.list_names()
        return [
            names[place] if times is None else f"{names[place]} {name_excerpt(*(round(time, 3) for time in times))}"
            for place, times in zip(self.places, self.times, strict=True)
        ]

    def list_sizes(self) -> list[int]:
        """Counts the bytes of the recording of each segment."""
        sizes = self.source.list_sizes()
        return [sizes[place] for place in self.places]


def divide(source: MediaSource, seconds: float) -> SegmentedSource:
    """
    Divides each video of a source into equal segments of about `seconds`; what is shorter than one and a half of them
    stays whole, as do images, and files that cannot be opened: these are told of when they are read.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        durations = list(pool.map(lambda index: find_duration(source[index]), range(len(source))))
    places, times = [], []
    for place, duration in enumerate(durations):
        count = max(int(duration / seconds + 0.5), 1)
        bounds = np.linspace(0.0, duration, count + 1).tolist()
        places += [place] * count
        times += [None] if count == 1 else list(pairwise(bounds))
    logger.warning("%s: %d files are %d segments of about %g s.", source.name, len(source), len(places), seconds)
    return SegmentedSource(source, np.array(places, dtype=np.int64), times)


def find_duration(item: EncodedItem) -> float:
    """Finds the seconds of a video; 0 for images, and where it cannot be opened."""
    if not item.is_video:
        return 0.0
    try:
        with item.open("pyav") as reader:
            return reader.duration
    except MediaDecodingError:
        return 0.0
