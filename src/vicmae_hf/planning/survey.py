"""Reads some of the files of a training: how much there is, how fast it is read, what a frame store of it is like."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch

from ..data.media.bad_files import BadFilesError, read_elsewhere
from ..data.media.reading import EncodedItem, MediaItem, call_within
from ..data.preparing.store_rows import PackingInput, PackingSettings, pack_item
from ..data.sources.frame_store import FrameStoreSource, StoredItem
from ..errors import MediaDecodingError


MAX_SAMPLED, MAX_SECONDS = 64, 20.0  # of a survey, whichever comes first; at least MIN_SAMPLED
MIN_SAMPLED = 4
# The trial of a store: how many items it has, how many seconds of each, and how many samples are read from it.
PACKED_ITEMS, PACKED_SECONDS, STORE_READS = 8, 20.0, 24
CONFIDENCE = 0.95

# An item, and random numbers -> a sample as training draws it.
ReadSample = Callable[[MediaItem, np.random.Generator], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Items:
    """
    What a training draws its samples from.

    Args:
        sources: with the interface of `MediaSource`.
        read: how a sample is read.
        num_samples: of an epoch.
    """

    sources: Sequence[Any]
    read: ReadSample
    num_samples: int

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> MediaItem:
        for source in self.sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)

    @property
    def wholes(self) -> list[Any]:
        """The sources before they were divided into segments."""
        items = [getattr(source, "items", source) for source in self.sources]
        return [getattr(source, "source", source) for source in items]

    @property
    def num_files(self) -> int:
        """Files, or rows; a recording that is divided is one."""
        return sum(map(len, self.wholes))

    @property
    def num_bytes(self) -> int | None:
        """Of all files; None where there are stores, whose sizes count frames."""
        if any(isinstance(source, FrameStoreSource) for source in self.wholes):
            return None
        return sum(sum(source.list_sizes()) for source in self.wholes)


@dataclass
class Survey:
    """
    What a random part of the items is like.

    Args:
        num_sampled: items that were tried; all of them where there are few.
        failures: `{"path", "error"}` of those that could not be read.
        num_videos: videos among those that could; video_seconds: their length together.
        read_seconds: mean time to read a sample, by one process.
        readable: the items that could be read.
        samples: one of each of these.
    """

    num_sampled: int = 0
    failures: list[dict[str, str]] = field(default_factory=list)
    num_videos: int = 0
    video_seconds: float = 0.0
    read_seconds: float = 0.0
    readable: list[MediaItem] = field(default_factory=list)
    samples: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def is_stored(self) -> bool:
        return all(isinstance(item, StoredItem) for item in self.readable)

    def unreadable_share(self, num_items: int) -> tuple[float, float]:
        """The share of unreadable items in the survey, and its upper bound in all (95 %, Clopper and Pearson)."""
        share = len(self.failures) / self.num_sampled
        if self.num_sampled == num_items:
            return share, share
        return share, upper_bound(len(self.failures), self.num_sampled)


def upper_bound(count: int, total: int) -> float:
    """The largest share with which `count` or fewer of `total` still have a probability of 5 %."""
    if count == total:
        return 1.0
    low, high = count / total, 1.0
    for _ in range(40):  # bisection: the probability falls with the share
        share = (low + high) / 2
        terms, term = 0.0, (1 - share) ** total
        for number in range(count + 1):
            terms += term
            term *= (total - number) / (number + 1) * share / (1 - share)
        low, high = (share, high) if terms > 1 - CONFIDENCE else (low, share)
    return low


def survey_items(items: Items, video_backend: str, seconds_per_file: float, seed: int) -> Survey:
    """Opens a random part of the items, and reads a sample of each. Raises a BadFilesError if none can be read."""
    result, generator = Survey(), np.random.default_rng(seed)
    order = generator.permutation(len(items))[:MAX_SAMPLED].tolist()
    started, reading = time.perf_counter(), 0.0
    for index in order:
        if result.num_sampled >= MIN_SAMPLED and time.perf_counter() - started > MAX_SECONDS:
            break
        item = items[index]
        result.num_sampled += 1
        try:
            duration, num_frames = measure_item(item, video_backend, seconds_per_file)
            before = time.perf_counter()
            sample = read_elsewhere(item.name, partial(items.read, item, generator))
        except MediaDecodingError as error:
            result.failures.append({"path": item.name, "error": str(error)})
            continue
        reading += time.perf_counter() - before
        if duration > 0 and num_frames != 1:
            result.num_videos += 1
            result.video_seconds += duration
        result.readable.append(item)
        result.samples.append(sample)
    if not result.readable:
        failure = result.failures[0]
        raise BadFilesError(f"None of {result.num_sampled} files could be read, the first: {failure['error']}")
    result.read_seconds = reading / len(result.readable)
    return result


def measure_item(item: MediaItem, video_backend: str, seconds_per_file: float) -> tuple[float, int | None]:
    """Returns seconds and frames of an item; None frames where counting them takes long."""

    def read() -> tuple[float, int | None]:
        with item.open(video_backend) as reader:
            return reader.duration, None if reader.is_long else reader.num_frames

    return call_within(seconds_per_file if isinstance(item, EncodedItem) else 0, read, item.name)


@dataclass(frozen=True)
class StoreTrial:
    """
    What a frame store of some of the items is like.

    Args:
        bytes_per_second, pack_seconds_per_second: of a second of video; 0 without videos.
        bytes_per_image, pack_seconds_per_image: of an image; 0 without images.
        read_seconds: mean time to read a sample from it, by one process.
    """

    bytes_per_second: float
    pack_seconds_per_second: float
    bytes_per_image: float
    pack_seconds_per_image: float
    read_seconds: float


def try_store(survey: Survey, read: ReadSample, settings: PackingSettings, seed: int) -> StoreTrial | None:
    """Packs some of the items of a survey in memory, and reads samples from there. None if all are stored already."""
    items = [item for item in survey.readable if not isinstance(item, StoredItem)][:PACKED_ITEMS]
    if not items:
        return None
    rows = []
    totals = np.zeros((2, 3))  # of images and videos: bytes, seconds that it took, seconds of video or images
    for item in items:
        item = cut(item, settings.video_backend)
        before = time.perf_counter()
        try:
            row = pack_item(item, settings)
        except MediaDecodingError:  # damaged in parts: this one was found readable at another place
            continue
        seconds = time.perf_counter() - before
        is_video = len(row["frames"]) > 1
        size = sum(len(frame["bytes"]) for frame in row["frames"])
        totals[int(is_video)] += size, seconds, row["duration"] if is_video else 1
        rows.append({"name": item.name, **row})
    if not rows:
        return None
    features = PackingInput("", [], [], [], None, None).features()
    store = FrameStoreSource("store", datasets.Dataset.from_list(rows, features=features), None, None)
    (image_bytes, image_seconds, images), (video_bytes, video_seconds, length) = totals.tolist()
    return StoreTrial(
        bytes_per_second=video_bytes / length if length else 0.0,
        pack_seconds_per_second=video_seconds / length if length else 0.0,
        bytes_per_image=image_bytes / images if images else 0.0,
        pack_seconds_per_image=image_seconds / images if images else 0.0,
        read_seconds=time_reads(store, read, seed),
    )


def cut(item: EncodedItem, video_backend: str) -> EncodedItem:
    """Takes the first seconds of a long video."""
    if not item.is_video:
        return item
    duration, _ = measure_item(item, video_backend, 0)
    start = item.start or 0.0
    return item if duration <= PACKED_SECONDS else replace(item, start=start, end=start + PACKED_SECONDS)


def time_reads(source: Sequence[MediaItem], read: ReadSample, seed: int) -> float:
    """Returns the mean time to read a sample of a source."""
    generator = np.random.default_rng(seed)
    read(source[0], generator)  # the first one imports and allocates
    started = time.perf_counter()
    for index in range(STORE_READS):
        read(source[index % len(source)], generator)
    return (time.perf_counter() - started) / STORE_READS


def batches_of(samples: Sequence[dict[str, torch.Tensor]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields one batch after the other, of samples that repeat themselves."""
    place = 0
    while True:
        chosen = [samples[(place + index) % len(samples)] for index in range(size)]
        place += size
        yield torch.utils.data.default_collate(chosen)
