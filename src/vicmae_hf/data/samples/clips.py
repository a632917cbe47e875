"""Labelled clips and images as training samples."""

from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from ...errors import InputError, MediaDecodingError
from ..media.bad_files import BadFiles, BadFilesError
from ..media.reading import MediaItem, MediaLoader, MediaReader, TimeLimitError
from ..sources.labelled import LabelledSource
from .clip_augmentation import RandomClip
from .pairs import SampleKey


@dataclass(frozen=True)
class ClipSampling:
    """
    Draws the frames of a training clip from the times at which a video's frames start.

    Args:
        num_frames: frames of a clip.
        frames_per_second: of the clip, which starts at a random frame (the paper: 16 frames, every 4th at 30 frames/s,
            that is 7.5); a clip that is longer than the video repeats the last frame. 0 spreads the frames over the
            whole video instead, one at a random time in each of `num_frames` equal segments, as on
            Something-Something.

    Raises:
        InputError: if a setting is out of range.
    """

    num_frames: int
    frames_per_second: float = 7.5

    def __post_init__(self):
        if self.num_frames < 1:
            raise InputError(f"num_frames must be at least 1, got {self.num_frames}.")
        if not self.frames_per_second >= 0:
            raise InputError(
                f"frames_per_second must be at least 0 (0: the whole video), got {self.frames_per_second}."
            )

    def sample(self, timestamps: np.ndarray, duration: float, generator: np.random.Generator) -> np.ndarray:
        """
        Args:
            timestamps: start of every frame in seconds, ascending from 0, of shape `(T,)`.
            duration: end of the last frame in seconds.
            generator: source of randomness.

        Returns:
            Frame indices `(num_frames,)`, ascending.
        """
        steps = np.arange(self.num_frames)
        if self.frames_per_second == 0:
            times = (steps + generator.uniform(size=self.num_frames)) * duration / self.num_frames
            return np.searchsorted(timestamps, times, side="right") - 1
        offsets = steps / self.frames_per_second
        # Containers round times to the millisecond.
        num_starts = np.searchsorted(timestamps, timestamps[-1] - offsets[-1] + 1e-3, side="right")
        start = generator.integers(max(num_starts, 1))
        return nearest(timestamps, timestamps[start] + offsets)


def nearest(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Indices of the frames that start nearest to `times`; halfway the later one, as in the video processor."""
    borders = (timestamps[1:] + timestamps[:-1]) / 2
    return np.searchsorted(borders, times + 1e-6, side="right")


class ClipDataset(torch.utils.data.Dataset):
    """
    Map-style dataset of `{"pixel_values": uint8 (T, 3, H, W), "labels": class index}`, of images `(3, H, W)`.

    Samples are addressed by `SampleKey`s, and what is drawn for one comes from (seed, epoch, position) alone: the same
    for any number of workers and processes, and after resuming.

    A file that cannot be read is recorded in `bad_files`; another one, drawn from the same numbers, takes its place
    and brings its own label.

    Args:
        source: what is drawn from.
        clip_sampling: which frames of a video; None for images.
        view: how a sample is made from the frames.
    """

    def __init__(
        self,
        source: LabelledSource,
        clip_sampling: ClipSampling | None,
        view: RandomClip,
        bad_files: BadFiles,
        loader: MediaLoader,
        seed: int = 0,
    ):
        self.source = source
        self.clip_sampling = clip_sampling
        self.view = view
        self.bad_files = bad_files
        self.loader = loader
        self.seed = seed
        self.labels = source.labels
        self.failed: set[int] = set()  # in this worker

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor | int]:
        epoch, position, index = key
        for attempt in count():
            # 1 + attempt: numpy takes [seed, epoch] and [seed, epoch, 0, 0] for the same seed.
            generator = np.random.default_rng([self.seed, epoch, position, 1 + attempt])
            if attempt > 0:
                index = int(generator.integers(len(self)))
            item = self.source[index]
            if len(self.failed) == len(self):
                raise BadFilesError(
                    f"{self.source.name}: none of {len(self)} files could be read, among them {item.name}."
                )
            if self.bad_files.has_timed_out(item.name):
                self.failed.add(index)
                continue
            try:
                return {"pixel_values": self.read_sample(item, generator), "labels": int(self.labels[index])}
            except MediaDecodingError as error:
                self.failed.add(index)
                self.bad_files.add(item.name, str(error), isinstance(error, TimeLimitError))

    def read_sample(self, item: MediaItem, generator: np.random.Generator) -> torch.Tensor:
        """A random clip `(T, 3, H, W)` or image `(3, H, W)` of a file, uint8."""

        def choose_frames(reader: MediaReader) -> list[int]:
            if self.clip_sampling is None:
                return [0]
            return self.clip_sampling.sample(reader.timestamps, reader.duration, generator).tolist()

        frames = self.loader.read_frames(item, choose_frames)
        views = self.view(frames, seed=int(generator.integers(2**63)))
        return views if self.clip_sampling is not None else views[0]
