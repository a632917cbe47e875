"""Pairs of views: two frames of a video, or two crops of an image."""

import operator
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, count

import numpy as np
import torch

from ...errors import InputError, MediaDecodingError
from ..media.bad_files import BadFiles
from ..media.reading import MediaItem, MediaLoader, MediaReader, TimeLimitError
from ..sources.sources import DataSourceError, MediaSource, open_source
from .augmentation import RandomView
from .frame_choice import FrameSampling
from .streaming import FramePairStream, open_stream


# (epoch, position in the epoch's order, index of the sample): the first two decide its random numbers.
SampleKey = tuple[int, int, int]


class FramePairDataset(torch.utils.data.Dataset):
    """
    Map-style dataset of `{"pixel_values": uint8 (2, 3, H, W)}`.

    A sample is addressed by its index, or by a `SampleKey` in training, whose epoch and position give it other random
    numbers each time. They come from (seed, epoch, position) alone: the same for any number of workers and processes,
    and after resuming.

    A file that cannot be read is recorded in `bad_files`; another one, drawn from the same numbers, takes its place.
    The record does not decide what is read: of a file damaged in parts, one worker may know while another does not.
    Only a file that exceeded the time limit is not opened again.
    """

    def __init__(
        self,
        sources: Sequence[MediaSource],
        view: RandomView,
        frame_sampling: FrameSampling,
        bad_files: BadFiles,
        loader: MediaLoader,
        samples_per_file: int = 1,
        seed: int = 0,
    ):
        self.sources = list(sources)
        self.view = view
        self.frame_sampling = frame_sampling
        self.bad_files = bad_files
        self.loader = loader
        self.samples_per_file = samples_per_file
        self.seed = seed
        self.lengths = [len(source) for source in self.sources]
        self.ends = list(accumulate(self.lengths))
        self.num_files = self.ends[-1]
        self.num_samples = self.num_files * samples_per_file

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: int | SampleKey) -> dict[str, torch.Tensor]:
        if not isinstance(key, tuple):
            key = operator.index(key)
            if not -len(self) <= key < len(self):
                raise IndexError(f"index {key} is out of range for {len(self)} samples.")
            key = (0, key % len(self), key % len(self))
        epoch, position, index = key
        for attempt in count():
            # 1 + attempt: numpy takes [seed, epoch] and [seed, epoch, 0, 0] for the same seed.
            generator = np.random.default_rng([self.seed, epoch, position, 1 + attempt])
            if attempt > 0:
                index = int(generator.integers(self.num_files))
            item = self.item(index % self.num_files)
            if self.bad_files.has_timed_out(item.name):
                continue
            try:
                return {"pixel_values": self.read_pair(item, generator)}
            except MediaDecodingError as error:
                self.bad_files.add(item.name, str(error), isinstance(error, TimeLimitError))

    def item(self, file_index: int) -> MediaItem:
        """The file with this index, counted through all sources."""
        source = bisect_right(self.ends, file_index)
        start = self.ends[source] - len(self.sources[source])
        return self.sources[source][file_index - start]

    def read_pair(self, item: MediaItem, generator: np.random.Generator) -> torch.Tensor:
        """Two views `(2, 3, H, W)` of a file, uint8."""

        def choose_frames(reader: MediaReader) -> tuple[int, int]:
            return self.frame_sampling.sample(reader.timestamps, reader.duration, generator)

        frames = self.loader.read_frames(item, choose_frames)
        return self.view(frames, seed=int(generator.integers(2**63)))


def load_frame_pairs(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    image_size: int | Sequence[int] = 224,
    *,
    frame_sampling: str = "distant",
    window_seconds: float = FrameSampling.window_seconds,
    num_segments: int = FrameSampling.num_segments,
    gap_seconds: float = FrameSampling.gap_seconds,
    crop_scale: tuple[float, float] = (0.5, 1.0),
    horizontal_flip: bool = True,
    color_augmentation: bool = False,
    samples_per_file: int = 1,
    video_backend: str = MediaLoader.video_backend,
    seconds_per_file: float = MediaLoader.seconds_per_file,
    seed: int = 0,
    max_bad_files: float = 0.05,
    bad_files_path: str | os.PathLike | None = None,
    streaming: bool = False,
) -> FramePairDataset | FramePairStream:
    """
    Opens folders of videos and images, frame stores, Parquet files and datasets as one dataset of pairs.

    Args:
        sources: a path or name, or several (see `open_source`).
        image_size: height and width of the views in pixels; one number for both.
        frame_sampling, window_seconds, num_segments, gap_seconds: which frames of a video (see `FrameSampling`).
        crop_scale, horizontal_flip, color_augmentation: how a view is made from a frame (see `RandomView`).
        samples_per_file: pairs drawn from each file in an epoch; more than 1 suits a few long recordings.
        video_backend, seconds_per_file: how files are read (see `MediaLoader`); nothing to stores.
        seed: pairs are a function of it, of the epoch and of the sample.
        max_bad_files: share of files that may be unreadable before a `BadFilesError` stops the run.
        bad_files_path: JSON lines file for the record of unreadable ones.
        streaming: read one frame store shard by shard (see `FramePairStream`), from the Hub without a copy.

    Returns:
        A map-style dataset of `{"pixel_values": uint8 tensor (2, 3, H, W)}`; an iterable one if `streaming`.

    Raises:
        InputError: `DataSourceError` if a source is missing or empty; or if an option is out of range.
    """
    names = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not names:
        raise DataSourceError("No data source was given: expected a path or a list of paths.")
    if samples_per_file < 1:
        raise InputError(f"samples_per_file must be at least 1, got {samples_per_file}.")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}.")
    loader = MediaLoader(video_backend, seconds_per_file)
    view = RandomView(image_size, crop_scale, horizontal_flip, color_augmentation)
    sampling = FrameSampling(frame_sampling, window_seconds, num_segments, gap_seconds)
    if streaming:
        if len(names) > 1 or samples_per_file > 1:
            raise InputError("A stream has one data source, and gives one sample of each row in an epoch.")
        stream = open_stream(names[0])
        num_files = stream.count_all_rows()
        bad_files = BadFiles(bad_files_path, num_files, max_bad_files)
        return FramePairStream(stream, num_files, view, sampling, bad_files, seed)
    opened = [open_source(name) for name in names]
    return FramePairDataset(
        opened,
        view=view,
        frame_sampling=sampling,
        bad_files=BadFiles(bad_files_path, sum(map(len, opened)), max_bad_files),
        loader=loader,
        samples_per_file=samples_per_file,
        seed=seed,
    )
