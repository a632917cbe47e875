"""Makes test views: clips of a video and crops of its frames, preprocessed as the model expects them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from transformers import BaseVideoProcessor

from ...errors import InputError, MediaDecodingError
from ...image_processing_vicmae import ViCMAEImageProcessor
from ...video_processing_vicmae import ViCMAEVideoProcessor, spatial_crop_offsets
from ..media.reading import MediaLoader, MediaReader, TimeLimitError
from ..sources.labelled import LabelledSource
from ..sources.sources import MediaSource
from .frame_choice import choose_view_clips, warn_of_repetitions


@dataclass(frozen=True)
class ViewProtocol:
    """
    How many views of a video are averaged: `num_clips` clips (temporal), and of each `num_crops` crops (spatial).

    Raises:
        InputError: if there is less than one of either.
    """

    num_clips: int = 1
    num_crops: int = 1

    def __post_init__(self):
        if self.num_clips < 1 or self.num_crops < 1:
            raise InputError(f"Expected at least one clip and one crop, got {self.num_clips} and {self.num_crops}.")

    @property
    def num_views(self) -> int:
        return self.num_clips * self.num_crops

    @property
    def name(self) -> str:
        """Spatial x temporal, as the paper counts them: "3x7" has three crops of each of seven clips."""
        return f"{self.num_crops}x{self.num_clips}"


class ViewDataset(torch.utils.data.Dataset):
    """
    The views of every item of a source, for one or several protocols.

    The frames of an item are decoded once. Views that protocols share (the same frames and the same crop) are made
    once and seen by the model once. So are equal clips of a video that is too short for different ones.

    Item `i` is `{"index": i, "pixel_values", "weights"}`:
        pixel_values: the V distinct views, `(V, T, 3, H, W)` for `task="video"`, `(V, 3, H, W)` for "image". They are
            still to be normalised (see `normalize_views`).
        weights: `(P, V)`, float32. Row p averages the views of protocol p; rows sum to 1.

    An item that cannot be read is `{"index": i, "error": str, "is_transient": whether it took too long}`.

    Args:
        source: what is seen.
        preprocess: makes the crops of a clip, see `choose_preprocessing`.
        loader: reads the frames.
        task: "video": clips of `num_frames` frames; "image": single frames (T clips of a video are T frames of it).
        num_frames: frames of a clip.
        frames_per_second: of a clip; None spreads a clip over the whole video (see `choose_view_clips`).
        protocols: views that are averaged.
    """

    def __init__(
        self,
        source: LabelledSource | MediaSource,
        preprocess: "CropsOfProcessor | SquaresBeforeProcessor",
        loader: MediaLoader,
        *,
        task: Literal["image", "video"],
        num_frames: int,
        frames_per_second: float | None,
        protocols: Sequence[ViewProtocol],
    ):
        self.source = source
        self.labels = source.labels
        self.preprocess = preprocess
        self.loader = loader
        self.task = task
        # An image model sees single frames: a "clip" is one frame, and a rate means nothing.
        self.num_frames = num_frames if task == "video" else 1
        self.frames_per_second = frames_per_second if task == "video" else None
        self.protocols = list(protocols)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clips = {}  # number of clips -> their frame indices (num_clips, T); filled while the video is open

        def choose_frames(reader: MediaReader) -> np.ndarray:
            warn_of_repetitions(self.source[index].name, reader.timestamps, self.frames_per_second)
            clips.update({num_clips: self.choose_clips(reader, num_clips) for num_clips in self.clip_counts})
            return distinct_frames(clips)

        return self.read(index, choose_frames, lambda frames: self.make_views(frames, clips))

    def read(
        self,
        index: int,
        choose_frames: Callable[[MediaReader], np.ndarray],
        make_views: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> dict[str, Any]:
        """Reads the frames of an item that `choose_frames` names, of which `make_views` makes views and weights."""
        item = self.source[index]
        # No replacement, as training has it: another item in its place would change what is measured.
        try:
            frames = self.loader.read_frames(item, choose_frames)
        except MediaDecodingError as error:
            message, is_transient = str(error), isinstance(error, TimeLimitError)
            message = message if item.name in message else f"{item.name}: {message}"
            return {"index": index, "error": message, "is_transient": is_transient}
        views, weights = make_views(frames)
        views = views if self.task == "video" else views[:, 0]
        return {"index": index, "pixel_values": views, "weights": weights}

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Views of any items -> float32, on the device that they are on."""
        return normalize_views(pixel_values, self.preprocess.processor)

    @property
    def clip_counts(self) -> set[int]:
        return {protocol.num_clips for protocol in self.protocols}

    @property
    def max_views(self) -> int:
        """The largest number of views that an item can have."""
        return sum(protocol.num_views for protocol in self.protocols)

    def choose_clips(self, reader: MediaReader, num_clips: int) -> np.ndarray:
        """Chooses frame indices of the clips of an open video or image, `(num_clips, num_frames)`."""
        return choose_view_clips(
            reader.timestamps, reader.duration, self.num_frames, self.frames_per_second, num_clips
        )

    def make_views(self, frames: torch.Tensor, clips: dict[int, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Distinct frames `(F, 3, H, W)` and, by their number, clips of frame indices -> views `(V, T, 3, H, W)` and
        weights `(P, V)`.
        """
        decoded = distinct_frames(clips)
        views: dict[Hashable, torch.Tensor] = {}
        members = {protocol: [] for protocol in self.protocols}
        # Most crops first: they often include the crops of protocols with fewer (the middle of three).
        for protocol in sorted(members, key=lambda protocol: -protocol.num_crops):
            positions = self.preprocess.positions(protocol.num_crops)
            for clip in clips[protocol.num_clips]:
                keys = [(tuple(clip), position) for position in positions]  # equal keys are equal views
                if not views.keys() >= set(keys):
                    # searchsorted: from the index in the video to the row among the decoded frames.
                    crops = self.preprocess(frames[np.searchsorted(decoded, clip)], protocol.num_crops)
                    for key, crop in zip(keys, crops, strict=True):
                        views.setdefault(key, crop)
                members[protocol] += keys
        rows = {key: row for row, key in enumerate(views)}
        weights = torch.zeros(len(self.protocols), len(views))
        for row, protocol in enumerate(self.protocols):
            for key in members[protocol]:
                weights[row, rows[key]] += 1 / protocol.num_views  # a view that occurs twice counts twice
        return torch.stack(list(views.values())), weights  # (V, T, 3, H, W), (P, V)


def distinct_frames(clips: dict[int, np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([indices.ravel() for indices in clips.values()]))


# Views travel as bytes: a quarter of the memory and of the way to the device, where they are normalised.
AS_BYTES = {"do_rescale": False, "do_normalize": False}


def is_own(processor: Any) -> bool:
    return isinstance(processor, ViCMAEImageProcessor | ViCMAEVideoProcessor)


def normalize_views(pixel_values: torch.Tensor, processor: Any) -> torch.Tensor:
    """
    Does what a processor of this package does last, on the device that views are on: bytes become float32. The result
    equals the processor's to the bit. Views of other processors are normalised already.
    """
    if not is_own(processor):
        return pixel_values
    # Not as lists, because Transformers keeps what it makes of them on the device, and a list is no key.
    mean, std = (
        tuple(values) if isinstance(values, list) else values for values in (processor.image_mean, processor.image_std)
    )
    return processor.rescale_and_normalize(
        pixel_values, processor.do_rescale, processor.rescale_factor, processor.do_normalize, mean, std
    )


@dataclass(frozen=True)
class CropsOfProcessor:
    """
    Makes crops with `ViCMAEVideoProcessor`, which cuts several crops itself: after resizing, from edge to edge of the
    longer side.
    """

    processor: ViCMAEVideoProcessor

    def positions(self, num_crops: int) -> list[Hashable]:
        """Names the crops by their places. Equal crops have equal places: a single crop is the middle one of three."""
        return evenly_spaced(num_crops)

    def __call__(self, frames: torch.Tensor, num_crops: int) -> torch.Tensor:
        """Frames `(T, 3, H, W)`, uint8, -> `(num_crops, T, 3, h, w)`, uint8."""
        pixel_values = self.processor(
            frames, num_clips=1, num_crops=num_crops, do_sample_frames=False, return_tensors="pt", **AS_BYTES
        ).pixel_values
        return pixel_values.reshape(num_crops, *pixel_values.shape[-4:])


@dataclass(frozen=True)
class SquaresBeforeProcessor:
    """
    Makes crops with any image or video processor of Transformers. These know no several crops, so squares along the
    longer side are cut before the processor sees them. A single crop is the processor's own, of the whole frame.
    """

    processor: Any

    def positions(self, num_crops: int) -> list[Hashable]:
        """As above, but a single crop has a place of its own: the middle square is not the whole frame."""
        return ["whole frame"] if num_crops == 1 else evenly_spaced(num_crops)

    def __call__(self, frames: torch.Tensor, num_crops: int) -> torch.Tensor:
        """Frames `(T, 3, H, W)`, uint8, -> `(num_crops, T, 3, h, w)`; uint8 by the processor of this package."""
        crops = [frames] if num_crops == 1 else squares_along_longer_side(frames, num_crops)
        return torch.stack([self.process(crop) for crop in crops])

    def process(self, frames: torch.Tensor) -> torch.Tensor:
        options = {"do_sample_frames": False} if isinstance(self.processor, BaseVideoProcessor) else {}
        options |= AS_BYTES if is_own(self.processor) else {}
        # All processors, of images and of videos, take a list of arrays (H, W, 3) for a video.
        arrays = list(frames.permute(0, 2, 3, 1).contiguous().numpy())
        outputs = self.processor(arrays, return_tensors="pt", input_data_format="channels_last", **options)
        # Some call it `pixel_values_videos`.
        (pixel_values,) = (value for name, value in outputs.items() if name.startswith("pixel_values"))
        return pixel_values.flatten(0, -4)  # (T, 3, h, w), with or without a batch of one before


def evenly_spaced(num_crops: int) -> list[Fraction]:
    """Places of crops along the longer side, from 0 to 1. A single crop lies in the middle."""
    # Fractions, because they are dictionary keys: 1/2 of two protocols must be equal.
    return [Fraction(1, 2)] if num_crops == 1 else [Fraction(crop, num_crops - 1) for crop in range(num_crops)]


def squares_along_longer_side(frames: torch.Tensor, num_crops: int) -> list[torch.Tensor]:
    """Frames `(T, 3, H, W)` -> `num_crops` of `(T, 3, S, S)`, S being the shorter of H and W."""
    height, width = frames.shape[-2:]
    axis, length, side = (-2, height, width) if height > width else (-1, width, height)
    return [frames.narrow(axis, offset, side) for offset in spatial_crop_offsets(length, side, num_crops)]


def choose_preprocessing(processor: Any) -> CropsOfProcessor | SquaresBeforeProcessor:
    """Chooses how a model's image or video processor makes the crops of a view."""
    makes_crops = isinstance(processor, ViCMAEVideoProcessor)
    return CropsOfProcessor(processor) if makes_crops else SquaresBeforeProcessor(processor)


def build_test_views(
    source: LabelledSource | MediaSource,
    processor: Any,
    loader: MediaLoader,
    *,
    task: Literal["image", "video"],
    num_frames: int,
    frames_per_second: float | None,
    num_clips: int = 1,
    num_crops: int = 1,
) -> ViewDataset:
    """Makes the views of one protocol, for a model's image or video processor (see `ViewDataset`)."""
    return ViewDataset(
        source,
        choose_preprocessing(processor),
        loader,
        task=task,
        num_frames=num_frames,
        frames_per_second=frames_per_second,
        protocols=[ViewProtocol(num_clips, num_crops)],
    )
