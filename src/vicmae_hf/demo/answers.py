"""Reads a file that a visitor uploaded, within limits, and computes what the page shows of it."""

import contextlib
import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from ..configuration_vicmae import ViCMAEConfig
from ..data.media.images import IMAGE_EXTENSIONS, ImageOptions
from ..data.media.reading import EncodedItem, MediaLoader, MediaReader
from ..data.samples.augmentation import PixelNormalizer
from ..data.samples.views import build_test_views
from ..data.sources.segments import read_duration
from ..data.sources.sources import VIDEO_EXTENSIONS
from ..errors import InputError, MediaDecodingError
from ..evaluation.collecting import collect
from ..evaluation.prediction import check_finite, evaluating, predict_batch
from ..modeling_vicmae import ViCMAEForPreTraining
from ..reports.encoder_pictures import (
    BATCH_SIZE,
    FILM_FRAMES,
    FILM_FRAMES_PER_SECOND,
    WholeView,
    patch_features,
    principal_colours,
)
from ..reports.reconstructions import reconstruct_views
from ..video_processing_vicmae import nearest_frames
from .checkpoint import Checkpoint


# Of all frames that are in memory at once: 1.2 GB. A film of 24 frames in 4K has 199 million, a clip of 16 times a
# photograph of 24 megapixels 384 million. Small files may unpack to much more.
MAX_PIXELS = 400_000_000
MASK_STEP = 0.05  # of the slider


@dataclass(frozen=True)
class OneFile:
    """A source of one file (see `MediaSource`)."""

    item: EncodedItem
    labels = None

    @property
    def name(self) -> str:
        return self.item.name

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> EncodedItem:
        return self.item

    def list_names(self) -> list[str]:
        return [self.item.name]


@dataclass(frozen=True)
class Upload:
    """
    An uploaded file that could be read.

    Args:
        file: where it is read from again; of a long video, its first seconds.
        frames: the image, or a film of the middle of the video, cut as the model sees it: `(T, 3, H, W)`, uint8.
        note: what of it is not read or shown; empty if it is all.
    """

    file: OneFile
    frames: torch.Tensor
    note: str

    @property
    def middle(self) -> torch.Tensor:
        """The frame in the middle, `(3, H, W)`, uint8."""
        return self.frames[len(self.frames) // 2]


def read_upload(path: str, checkpoint: Checkpoint, loader: MediaLoader, max_seconds: float) -> Upload:
    """
    Reads an uploaded image or video.

    Args:
        max_seconds: of a longer video only so much is read, from its beginning.

    Raises:
        MediaDecodingError: if it is neither, is damaged, or unpacks to more than memory is given to. The message names
            it as the visitor does.
    """
    name, suffix = Path(path).name, Path(path).suffix.lower()
    if suffix not in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
        raise MediaDecodingError(f"{name}: expected an image or a video, such as .jpg, .png, .mp4 or .webm.")
    options = ImageOptions(checkpoint.processor.image_range)
    item = EncodedItem(path, name, suffix in VIDEO_EXTENSIONS, image_options=options)
    note, times = "", np.zeros(1)

    def choose(reader: MediaReader) -> np.ndarray:
        nonlocal times
        indices = choose_film(reader)
        times = reader.timestamps[indices]
        height, width = reader.get_frames(indices[:1]).shape[-2:]  # one frame tells the size of all
        check_pixels(name, height, width, max(len(indices), clip_length(checkpoint)))
        return indices

    try:
        if item.is_video:
            duration = read_duration(item, loader.video_backend, loader.seconds_per_file)
            if duration > max_seconds:
                item = EncodedItem(path, name, True, end=max_seconds, image_options=options)
                note = f"It lasts {duration:.1f} s; only its first {max_seconds:g} s are read. "
        frames = loader.read_frames(item, choose)
    except MediaDecodingError as error:
        # Where uploads lie is nothing to tell a visitor. FFmpeg's messages end with the path, or a part of it.
        message = re.sub(r"""\[Errno -?\d+\] |: ['"].*$""", "", str(error).replace(path, name))
        raise MediaDecodingError(message) from error
    if len(frames) > 1:
        note += f"Showing {len(frames)} frames from {times[0]:.1f} to {times[-1]:.1f} s."
    return Upload(OneFile(item), WholeView(checkpoint.encoder.config.image_height_and_width)(frames), note)


def choose_film(reader: MediaReader) -> np.ndarray:
    """Chooses frames of four seconds in the middle of a video; of a shorter one, and of an image, all that it has."""
    start = max((reader.duration - FILM_FRAMES / FILM_FRAMES_PER_SECOND) / 2, 0.0)
    times = reader.timestamps[0] + start + np.arange(FILM_FRAMES) / FILM_FRAMES_PER_SECOND
    return np.unique(nearest_frames(reader.timestamps, times))


def clip_length(checkpoint: Checkpoint) -> int:
    """Frames that the classifier sees at once."""
    return 1 if checkpoint.classifier is None else checkpoint.classifier.num_frames


def check_pixels(name: str, height: int, width: int, count: int) -> None:
    if height * width * count > MAX_PIXELS:
        raise MediaDecodingError(
            f"{name}: needs {count} frames of {width}x{height} pixels at once, but at most "
            f"{MAX_PIXELS // 10**6} million pixels are read."
        )


def list_mask_ratios(config: ViCMAEConfig) -> list[float]:
    """
    Lists the mask ratios that leave at least one patch visible and one hidden, in steps of `MASK_STEP`; none if an
    image is a single patch.
    """
    changed, ratios = copy.deepcopy(config), []
    for step in range(1, round(1 / MASK_STEP)):
        changed.mask_ratio = round(step * MASK_STEP, 2)
        with contextlib.suppress(ValueError):  # of a ratio that leaves none, or all of them
            changed.count_visible(math.prod(config.patch_grid))
            ratios.append(changed.mask_ratio)
    return ratios


def can_reconstruct(checkpoint: Checkpoint) -> bool:
    """Whether there is a decoder, and more than one patch, so that some can be hidden."""
    return checkpoint.reconstructor is not None and bool(list_mask_ratios(checkpoint.encoder.config))


def with_mask_ratio(model: ViCMAEForPreTraining, mask_ratio: float) -> ViCMAEForPreTraining:
    """Returns the model with the same weights, and another share of hidden patches."""
    changed = copy.copy(model)
    changed.config = copy.deepcopy(model.config)
    changed.config.mask_ratio = mask_ratio
    return changed


def reconstruct(checkpoint: Checkpoint, upload: Upload, mask_ratio: float) -> tuple[dict[str, torch.Tensor], str]:
    """
    Reconstructs the middle frame, by the function that makes the pictures of training: the frame, its visible patches,
    the reconstructions by the model and by random weights, each `(3, H, W)` in [0, 1] up to overshoot; and a text that
    says how good they are, and what they borrow from visible patches.

    Raises:
        InputError: if the mask ratio leaves no patch visible, or none hidden.
    """
    ratios = list_mask_ratios(checkpoint.reconstructor.config)
    if not ratios[0] <= mask_ratio <= ratios[-1]:  # a page has limits, a request need not keep them
        raise InputError(f"Expected a mask ratio between {ratios[0]} and {ratios[-1]}, got {mask_ratio}.")
    models = (checkpoint.reconstructor, checkpoint.untrained_reconstructor)
    model, untrained = (with_mask_ratio(each, mask_ratio) for each in models)
    views = torch.stack([upload.middle, upload.middle])[None]  # (1, 2, 3, H, W): the second one is not shown
    mean, std = checkpoint.processor.image_mean, checkpoint.processor.image_std
    columns, text = reconstruct_views(model, views, mean, std, untrained=untrained)
    return {title: images[0].cpu() for title, images in columns.items() if title != "second view"}, text


def colour_features(checkpoint: Checkpoint, upload: Upload) -> list[torch.Tensor]:
    """
    Colours the patches of all frames by the first three principal components of their features: `(T, h, w, 3)` in
    [0, 1], of the trained and of the untrained encoder.
    """
    encoder, processor = checkpoint.encoder, checkpoint.processor
    normalize = PixelNormalizer(processor.image_mean, processor.image_std).to(encoder.device)
    parts = [normalize(part.to(encoder.device)) for part in upload.frames.split(BATCH_SIZE)]
    features = [
        torch.cat([patch_features(each, part).float().cpu() for part in parts]) for each in checkpoint.encoders
    ]
    return [principal_colours(each).unflatten(1, encoder.config.patch_grid) for each in features]


def classify(
    accelerator: Accelerator, checkpoint: Checkpoint, upload: Upload, loader: MediaLoader
) -> dict[str, float]:
    """
    Gives the probability of each class, as `vicmae evaluate` computes it with a single view.

    Raises:
        InputError: if the model's outputs are not finite.
    """
    classifier = checkpoint.classifier
    dataset = build_test_views(
        upload.file,
        classifier.processor,
        loader,
        task=classifier.task,
        num_frames=classifier.num_frames,
        frames_per_second=classifier.frames_per_second,
    )
    with evaluating(classifier.model):
        collected = collect(
            accelerator,
            dataset,
            lambda batch: predict_batch(accelerator, classifier.model, batch, 1, None),
            batch_size=1,
            num_workers=0,
        )
    check_finite(dataset, collected)
    probabilities = collected.outputs["probabilities"][0, 0]  # of the only file and protocol
    return dict(zip(classifier.class_names, probabilities.tolist(), strict=True))
