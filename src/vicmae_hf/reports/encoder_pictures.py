"""Pictures of what an encoder has learned, each beside the same for random weights."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from ..data.media.reading import MediaReader, TimeLimitError, part_at_random
from ..data.samples.augmentation import PixelNormalizer
from ..data.samples.pairs import FramePairDataset
from ..errors import MediaDecodingError
from ..image_processing_vicmae import ViCMAEImageProcessor
from ..modeling_vicmae import ViCMAEModel
from ..video_processing_vicmae import nearest_frames
from .baselines import with_random_weights
from .film import write_film
from .plots import plot_attention, plot_neighbours


if TYPE_CHECKING:  # only for annotations: most people never load it
    from ..data.samples.streaming import FramePairStream


logger = logging.getLogger(__name__)

PICTURES = ("neighbours.png", "attention.png", "features.webp")

MAX_FRAMES = 128  # among which neighbours are looked for
NUM_SHOWN = 8
NUM_NEIGHBOURS = 4
FILM_FRAMES, FILM_FRAMES_PER_SECOND = 24, 6
MAX_FILM_FILES = 16  # that are opened to find a video
BATCH_SIZE = 32

# Encoder, normalised frames (N, 3, H, W) -> a tensor of N rows.
Compute = Callable[[ViCMAEModel, torch.Tensor], torch.Tensor]


def write_encoder_pictures(
    encoder: ViCMAEModel, dataset: "FramePairDataset | FramePairStream", processor: ViCMAEImageProcessor, folder: Path
) -> None:
    """
    Writes `PICTURES` into a folder, in which none of an older run is left. Without a video there is no film, and with
    a single frame there are no neighbours; the log says so.

    Args:
        dataset: has the files that the frames are of.
        processor: has the mean and standard deviation by which pixels are normalised.

    Raises:
        BadFilesError: if too many files cannot be read.
    """
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    size = encoder.config.image_height_and_width
    normalize = PixelNormalizer(processor.image_mean, processor.image_std).to(encoder.device)
    is_video = encoder.embeddings.temporal_position_embeddings is not None
    encoders = [encoder, with_random_weights(encoder, video=is_video)]

    def by_each(compute: Compute, frames: torch.Tensor) -> list[torch.Tensor]:
        parts = [normalize(part.to(encoder.device)) for part in frames.split(BATCH_SIZE)]
        return [torch.cat([compute(each, part).float().cpu() for part in parts]) for each in encoders]

    frames, names = read_frames(dataset, size)
    film = read_film(dataset, size)
    was_training = encoder.training
    encoder.eval()
    num_shown = min(NUM_SHOWN, len(frames))
    shown = torch.arange(num_shown) * (len(frames) // num_shown)
    neighbours = [nearest(features, names, shown) for features in by_each(pool, frames)]
    if neighbours[0][0].shape[1]:
        plot_neighbours(frames, shown, neighbours, folder / "neighbours.png")
    else:
        logger.info("No picture of neighbours: there is a single frame.")
    grid = encoder.config.patch_grid
    plot_attention(frames[shown], by_each(class_attention, frames[shown]), grid, folder / "attention.png")
    if film is None:
        logger.info("No film of features: no video was found; a stream is not searched.")
    else:
        colours = [principal_colours(features) for features in by_each(patch_features, film)]
        write_film(film, colours, grid, FILM_FRAMES_PER_SECOND, folder / "features.webp")
    encoder.train(was_training)


class WholeView:
    """Frames as they are, in place of random crops: scaled to cover `size` (height, width), and its centre cut out."""

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, frames: Sequence[torch.Tensor], seed: int = 0) -> torch.Tensor:
        """Frames `(3, H, W)` of any sizes, uint8 -> `(len(frames), 3, height, width)`, uint8."""
        return torch.stack([self.fit(frame) for frame in frames])

    def fit(self, frame: torch.Tensor) -> torch.Tensor:
        scale = max(wanted / length for wanted, length in zip(self.size, frame.shape[-2:], strict=True))
        scaled = transforms.resize(frame, [round(length * scale) for length in frame.shape[-2:]], antialias=True)
        return transforms.center_crop(scaled, list(self.size))


def read_frames(
    dataset: "FramePairDataset | FramePairStream", size: tuple[int, int]
) -> tuple[torch.Tensor, list[str]]:
    """
    Reads frames of files spread over the dataset, several of each if there are few: `(N, 3, H, W)`, uint8, no two the
    same; and the names of their files.
    """
    if isinstance(dataset, FramePairDataset):
        whole = copy.copy(dataset)
        whole.view, whole.num_samples = WholeView(size), max(16, 4 * dataset.num_files)
    else:
        whole = replace(dataset, view=WholeView(size))
    names: dict[bytes, str] = {}
    frames = []
    for sample in whole.examples(MAX_FRAMES):
        frame = sample["pixel_values"][0]
        # An image that was read again is the same; another frame of a video is not.
        if (content := frame.numpy().tobytes()) not in names:
            names[content] = sample["name"]
            frames.append(frame)
    return torch.stack(frames), list(names.values())


def read_film(dataset: "FramePairDataset | FramePairStream", size: tuple[int, int]) -> torch.Tensor | None:
    """Reads four seconds of the first video found, of files spread over the dataset: `(T, 3, H, W)`, uint8."""
    if not isinstance(dataset, FramePairDataset):  # a stream has samples, and no files to open
        return None

    def choose(reader: MediaReader) -> np.ndarray:
        times = reader.timestamps[0] + np.arange(FILM_FRAMES) / FILM_FRAMES_PER_SECOND
        return np.unique(nearest_frames(reader.timestamps, times))

    def choose_part(reader: MediaReader) -> MediaReader:
        return part_at_random(reader, FILM_FRAMES / FILM_FRAMES_PER_SECOND, np.random.default_rng(0))

    count = min(MAX_FILM_FILES, dataset.num_files)
    for index in range(count):
        item = dataset.item(index * (dataset.num_files // count))
        try:
            frames = dataset.loader.read_frames(item, choose, choose_part)
        except MediaDecodingError as error:
            dataset.bad_files.add(item.name, str(error), isinstance(error, TimeLimitError))
            continue
        if len(frames) > 1:
            return WholeView(size)(frames)
    return None


@torch.no_grad()
def pool(encoder: ViCMAEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Pooled features `(N, D)`."""
    return encoder(pixel_values.to(encoder.dtype)).pooler_output


@torch.no_grad()
def patch_features(encoder: ViCMAEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Features of patches `(N, L, D)`."""
    return encoder(pixel_values.to(encoder.dtype)).last_hidden_state[:, 1:]


@torch.no_grad()
def class_attention(encoder: ViCMAEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Attention of the class token to each patch in the last layer, mean over the heads, `(N, L)`, as multiples of an
    even share among the patches.
    """
    hidden_states = encoder.embeddings(pixel_values.to(encoder.dtype))
    for layer in encoder.layers[:-1]:
        hidden_states = layer(hidden_states)
    last = encoder.layers[-1]
    # Computed here, because fast attention kernels keep no weights.
    queries, keys, _ = last.attention.project(last.layernorm_before(hidden_states))
    queries, keys = (each.unflatten(-1, (-1, last.attention.head_dim)).transpose(1, 2) for each in (queries, keys))
    scores = queries[:, :, :1] @ keys.transpose(2, 3) * last.attention.scaling  # (N, heads, 1, 1 + L)
    shares = scores.float().softmax(-1)[:, :, 0, 1:].mean(1)
    return shares / shares.mean(-1, keepdim=True)


def nearest(features: torch.Tensor, names: Sequence[str], queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the nearest by cosine similarity of each query, in other files if there are several.

    Args:
        features: `(N, D)`; names: of the N files; queries: indices `(Q,)`.

    Returns:
        Indices `(Q, K)`, the nearest first, and their similarities. K is `NUM_NEIGHBOURS`, or less among few.
    """
    features = F.normalize(features, dim=-1)
    files = torch.tensor([names.index(name) for name in names])
    if len(set(names)) == 1:
        files = torch.arange(len(names))
    is_other = files[queries, None] != files  # (Q, N)
    similarities = (features[queries] @ features.T).masked_fill(~is_other, -torch.inf)
    found = similarities.topk(min(NUM_NEIGHBOURS, int(is_other.sum(1).min())))
    return found.indices, found.values


def principal_colours(features: torch.Tensor) -> torch.Tensor:
    """
    Turns features of patches `(T, L, D)` into colours `(T, L, 3)` in [0, 1]: their first three principal components
    over all frames, each spread from its 1st to its 99th percentile.
    """
    flat = features.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)  # ascending
    vectors = vectors[:, -3:].flip(1)
    # A component has no sign of its own. This one makes the same picture each time.
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    values = flat @ (vectors * largest.sign())
    low, high = (values.quantile(share, dim=0) for share in (0.01, 0.99))
    return ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).unflatten(0, features.shape[:2]).float()
