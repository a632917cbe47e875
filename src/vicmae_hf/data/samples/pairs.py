"""Makes pairs of views: of two frames of a video, or of two crops of an image."""

import operator
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import InputError
from ...settings import MAX_SEED, ArgumentsError, part_of, setting
from ..loading.loader import SampleKey, draw_items
from ..media.bad_files import BadFiles, BadFilesArguments
from ..media.reading import MediaItem, MediaLoader, ReadingArguments, part_at_random
from ..sources.sources import DataSourceError, MediaSource, SourceSettings, open_source
from .augmentation import RandomView
from .frame_sampling import FrameSampling


if TYPE_CHECKING:  # only for annotations: most people never load it
    from .streaming import FramePairStream


class FramePairDataset(torch.utils.data.Dataset):
    """
    Map-style dataset of `{"pixel_values": uint8 (2, 3, H, W)}`.

    A sample is addressed by its index or, in training, by a `SampleKey`. Epoch and position of the key give the sample
    other random numbers each time.

    A file that cannot be read is recorded in `bad_files`. Another one, drawn by the same numbers, takes its place.

    Args:
        num_patches: with it, a sample also has its `"name"` and `"noise"`, float32 `(2, num_patches)`, which decides
            the masks (see `ViCMAEForPreTraining`). So they are the sample's own, however batches are divided.
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
        num_patches: int | None = None,
    ):
        self.sources = list(sources)
        self.view = view
        self.num_patches = num_patches
        self.frame_sampling = frame_sampling
        self.bad_files = bad_files
        self.loader = loader
        self.seed = seed
        self.name = ", ".join(source.name for source in self.sources)
        self.lengths = [len(source) for source in self.sources]
        self.ends = list(accumulate(self.lengths))  # of the sources, laid end to end
        self.num_files = self.ends[-1]
        self.num_samples = self.num_files * samples_per_file

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: int | SampleKey) -> dict[str, torch.Tensor]:
        if not isinstance(key, tuple):
            key = operator.index(key)
            if not -len(self) <= key < len(self):
                raise IndexError(f"index {key} is out of range for {len(self)} samples.")
            # As in epoch 0, at the place of its index: the same index gives the same sample.
            key = (0, key % len(self), key % len(self))
        items = (
            (self.item(index % self.num_files), generator)  # sample n + num_files is of the same file again
            for index, generator in draw_items(key, self.num_files, self.seed)
        )
        return self.bad_files.read_first(
            self.name, ((item.name, partial(self.read_pair, item, generator)) for item, generator in items)
        )

    def examples(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yields at most `count` samples, of files spread over the dataset; always the same ones."""
        count = min(count, self.num_samples)
        step = max(self.num_files // count, 1)
        return (self[index * step] for index in range(count))

    def item(self, file_index: int) -> MediaItem:
        """Returns the file with this index, counted through all sources."""
        source = bisect_right(self.ends, file_index)
        start = self.ends[source] - len(self.sources[source])
        return self.sources[source][file_index - start]

    def read_pair(self, item: MediaItem, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """Makes two views of a file: `{"pixel_values": uint8 (2, 3, H, W)}`."""
        frames = self.loader.read_frames(  # (2, 3, H, W); an image twice
            item,
            lambda reader: self.frame_sampling.sample(reader.timestamps, reader.duration, generator),
            lambda reader: part_at_random(reader, self.frame_sampling.span, generator),
        )
        return make_sample(item.name, frames, self.view, self.num_patches, generator)

    def list_names(self) -> Iterator[str]:
        """Names the files of all sources, within each source."""
        for source in self.sources:
            yield from source.list_names()


def make_sample(
    name: str, frames: torch.Tensor, view: RandomView, num_patches: int | None, generator: np.random.Generator
) -> dict[str, torch.Tensor | str]:
    """Makes a sample of two frames `(2, 3, H, W)`; arguments as in `FramePairDataset`."""
    # The view has a generator of its own, seeded by this one: so it follows from the sample's key too.
    sample = {"pixel_values": view(frames, seed=int(generator.integers(2**63)))}
    if num_patches is not None:
        sample |= {"noise": torch.from_numpy(generator.random((2, num_patches), dtype=np.float32)), "name": name}
    return sample


@dataclass(kw_only=True)
class PairSettings(FrameSampling, ReadingArguments, BadFilesArguments, SourceSettings):
    """Settings of how pairs are drawn: options of `load_frame_pairs` and flags of `run_pretraining.py`."""

    crop_scale: list[float] = setting(
        [0.5, 1.0], "smallest and largest share of a frame's area in a random crop", above=0, maximum=1
    )
    horizontal_flip: bool = setting(True, "flip half of the views")
    color_augmentation: bool = setting(False, "colour jitter, grayscale, blur, solarisation, as in the released code")
    samples_per_file: int = setting(
        1, "pairs drawn from each file per epoch; more than 1 suits a few long recordings", minimum=1
    )
    streaming: bool = setting(
        False,
        "read a single frame store shard by shard, from the Hub without a copy on disk; no video is decoded, and "
        "--seconds_per_file has no effect",
    )
    seed: int = setting(0, "pairs are a function of it, of the epoch and of the sample", minimum=0, maximum=MAX_SEED)
    frames_per_second: float | None = setting(None, "another name for --source_frames_per_second", above=0)

    def __post_init__(self):
        if self.frames_per_second is not None:
            if self.source_frames_per_second not in (None, self.frames_per_second):
                raise ArgumentsError("--frames_per_second is another name for --source_frames_per_second: give one.")
            self.source_frames_per_second = self.frames_per_second
        super().__post_init__()


def load_frame_pairs(
    sources: str | os.PathLike | Sequence[str | os.PathLike],
    image_size: int | Sequence[int] = 224,
    *,
    bad_files_path: str | os.PathLike | None = None,
    num_patches: int | None = None,
    **options,
) -> "FramePairDataset | FramePairStream":
    """
    Opens folders of videos and images, frame stores, Parquet files and datasets as one dataset of pairs.

    Args:
        sources: a path or name, or several (see `open_source`).
        image_size: height and width of the views in pixels; one number for both.
        bad_files_path: JSON lines file for the record of unreadable files.
        num_patches: see `FramePairDataset`.
        options: fields of `PairSettings`, for example `frame_sampling="same"`.

    Returns:
        A map-style dataset of `{"pixel_values": uint8 tensor (2, 3, H, W)}`; an iterable one with `streaming=True`.

    Raises:
        InputError: `DataSourceError` if a source is missing or empty; or if an option is out of range.
        TypeError: if there is no such option.
    """
    settings = PairSettings(**options)
    names = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not names:
        raise DataSourceError("No data source was given: expected a path or a list of paths.")
    settings.reads_labels = False
    loader = MediaLoader(settings.video_backend, settings.seconds_per_file)
    view = RandomView(image_size, settings.crop_scale, settings.horizontal_flip, settings.color_augmentation)
    sampling = part_of(settings, FrameSampling)
    if settings.streaming:
        # Imported here, because few need it. You may leave it out when you read how pretraining works.
        from .streaming import open_pair_stream

        if len(names) > 1 or settings.samples_per_file > 1:
            raise InputError("--streaming reads one data source, and needs --samples_per_file 1.")
        return open_pair_stream(
            names[0], settings, view, sampling, bad_files_path, settings.max_bad_files, settings.seed, num_patches
        )
    opened = [open_source(name, settings) for name in names]
    bad_files = BadFiles(bad_files_path, sum(map(len, opened)), settings.max_bad_files)
    return FramePairDataset(
        opened, view, sampling, bad_files, loader, settings.samples_per_file, settings.seed, num_patches
    )
