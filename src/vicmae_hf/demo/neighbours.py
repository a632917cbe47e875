"""Encodes the files of a folder once, and finds those that are nearest to an uploaded one."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from ..data.media.bad_files import check_bad_files
from ..data.media.reading import MediaLoader
from ..data.sources.sources import MediaSource, SourceSettings, open_source
from ..errors import InputError, MediaDecodingError
from ..evaluation.features import build_feature_views, embed_views, pooled
from ..evaluation.prediction import evaluating
from ..reports.encoder_pictures import BATCH_SIZE, NUM_NEIGHBOURS, WholeView
from .answers import OneFile, Upload
from .checkpoint import Checkpoint


NUM_FRAMES = 8  # of a video, as `vicmae features` takes by default


@dataclass(frozen=True)
class Neighbour:
    """A file of the folder: its path below it, its cosine similarity, and its middle frame `(3, H, W)`, uint8."""

    name: str
    similarity: float
    frame: torch.Tensor | None  # None if the file cannot be read any more


@dataclass(frozen=True)
class EncodedFolder:
    """
    A folder of videos and images, encoded by the trained and by the untrained encoder.

    Args:
        source: its files.
        names: their paths below the folder.
        indices: which of them could be read, `(N,)`.
        embeddings: of these, by each encoder, `(N, D)`, of unit length.
        failures: `{"path", "error"}` of the others.
    """

    source: MediaSource
    names: list[str]
    indices: torch.Tensor
    embeddings: list[torch.Tensor]
    failures: list[dict[str, str]]


def encode_folder(
    accelerator: Accelerator,
    checkpoint: Checkpoint,
    folder: str,
    loader: MediaLoader,
    *,
    max_bad_files: float,
    num_workers: int,
) -> EncodedFolder:
    """
    Encodes every video and image of a folder.

    Raises:
        InputError: if there is no such folder, it holds no videos or images, or more than `max_bad_files` of them, a
            share, cannot be read.
    """
    if not Path(folder).is_dir():  # else it would be looked for on the Hub
        raise InputError(f"--folder {folder}: there is no such folder.")
    source = open_source(folder, SourceSettings(image_range=checkpoint.processor.image_range))
    indices, embeddings, failures = embed(accelerator, checkpoint, source, loader, num_workers)
    remedy = "Repair or remove them, or allow more."
    check_bad_files([failure["error"] for failure in failures], len(source), max_bad_files, remedy)
    return EncodedFolder(source, source.list_names(), indices, embeddings, failures)


def embed(
    accelerator: Accelerator,
    checkpoint: Checkpoint,
    source: MediaSource | OneFile,
    loader: MediaLoader,
    num_workers: int = 0,
) -> tuple[torch.Tensor, list[torch.Tensor], list[dict[str, str]]]:
    """Embeds the files of a source: those that could be read, by each encoder, and the others (see EncodedFolder)."""
    views = build_feature_views(source, checkpoint.processor, loader, pooling="frame", num_frames=NUM_FRAMES)
    with evaluating(checkpoint.encoder):
        features = embed_views(
            accelerator,
            pooled(accelerator, checkpoint.encoders),
            views,
            batch_size=BATCH_SIZE,
            num_workers=num_workers,
        )
    values = features.embeddings[features.rows[:, 0]]  # (N, D of both): views are averaged, so there is one
    return features.indices, [F.normalize(part, dim=-1) for part in values.chunk(2, dim=1)], features.failures


def find_neighbours(
    accelerator: Accelerator, checkpoint: Checkpoint, folder: EncodedFolder, upload: Upload, loader: MediaLoader
) -> list[list[Neighbour]]:
    """Finds the files that are nearest to an uploaded one by cosine similarity, for each encoder, nearest first."""
    _, queries, _ = embed(accelerator, checkpoint, upload.file, loader)
    view = WholeView(checkpoint.encoder.config.image_height_and_width)
    found = []
    for query, known in zip(queries, folder.embeddings, strict=True):
        similarities, places = (known @ query[0]).topk(min(NUM_NEIGHBOURS, len(known)))
        indices = folder.indices[places].tolist()
        found.append(
            [
                Neighbour(folder.names[index], similarity, read_middle(folder.source, index, loader, view))
                for index, similarity in zip(indices, similarities.tolist(), strict=True)
            ]
        )
    return found


def read_middle(source: MediaSource, index: int, loader: MediaLoader, view: WholeView) -> torch.Tensor | None:
    try:
        frames = loader.read_frames(source[index], lambda reader: [reader.num_frames // 2])
    except MediaDecodingError:  # it could be read when the page was opened, and was changed or removed since
        return None
    return view(frames)[0]
