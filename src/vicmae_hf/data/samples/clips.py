"""Makes training samples of labelled clips and images."""

from functools import partial

import numpy as np
import torch

from ..loading.loader import SampleKey, draw_items
from ..media.bad_files import BadFiles
from ..media.reading import MediaLoader, MediaReader, part_at_random
from ..media.video import warn_once
from ..sources.labelled import LabelledSource
from .clip_augmentation import RandomClip
from .frame_choice import ClipSampling, warn_of_repetitions


class ClipDataset(torch.utils.data.Dataset):
    """
    Map-style dataset of `{"pixel_values": uint8 (T, 3, H, W), "labels": class index, "name"}`, of images
    `(3, H, W)`. Where items may have several labels, "labels" are targets `(C,)`.

    Samples are addressed by `SampleKey`s. Random numbers of a sample come from (seed, epoch, position) alone, so they
    are the same for any number of workers and processes, and after resuming.

    A file that cannot be read is recorded in `bad_files`. Another one, drawn by the same numbers, takes its place and
    brings its own label.

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

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor | int]:
        return self.bad_files.read_first(
            self.source.name,
            (
                (self.source[index].name, partial(self.read_sample, index, generator))
                for index, generator in draw_items(key, len(self), self.seed)
            ),
        )

    def read_sample(self, index: int, generator: np.random.Generator) -> dict[str, torch.Tensor | int]:
        """Makes a random clip `(T, 3, H, W)` or image `(3, H, W)` of a file, uint8, with its label."""

        def choose_frames(reader: MediaReader) -> list[int]:
            if self.clip_sampling is None:
                if reader.duration > 0 and reader.num_frames > 1:
                    warn_once(
                        "first frame",
                        "%s has %d frames, and an image model is trained on the first. --task video uses clips. Not "
                        "said again for further files.",
                        *(self.source[index].name, reader.num_frames),
                    )
                return [0]
            warn_of_repetitions(self.source[index].name, reader.timestamps, self.clip_sampling.frames_per_second)
            return self.clip_sampling.sample(reader.timestamps, reader.duration, generator).tolist()

        def choose_part(reader: MediaReader) -> MediaReader:
            span = None if self.clip_sampling is None else self.clip_sampling.span
            return part_at_random(reader, span, generator)

        frames = self.loader.read_frames(self.source[index], choose_frames, choose_part)  # (T, 3, H, W); an image: T=1
        # The view is seeded by the sample's generator, so it follows from the sample's key too.
        views = self.view(frames, seed=int(generator.integers(2**63)))
        label = int(self.labels[index]) if self.labels.ndim == 1 else torch.from_numpy(self.labels[index])
        pixel_values = views if self.clip_sampling is not None else views[0]
        return {"pixel_values": pixel_values, "labels": label, "name": self.source[index].name}
