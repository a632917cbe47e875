"""Features of a frozen encoder: one embedding of every video or image, and the nearest neighbours among them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoVideoProcessor

from ..data.media.reading import MediaLoader
from ..data.samples.views import ViewDataset, ViewProtocol, choose_preprocessing
from ..data.sources.labelled import LabelledSource
from ..data.sources.sources import MediaSource
from ..errors import InputError
from ..modeling_vicmae import ViCMAEModel
from .prediction import average_views, collect
from .results import matrix_column, write_failures


@dataclass(frozen=True)
class Features:
    """
    Embeddings of the items that could be read, in the order of the source.

    Args:
        embeddings: `(N, D)`, float32.
        indices: `(N,)`, which items of the source they are.
        failures: `{"path", "error"}` of each item that could not be read.
    """

    embeddings: torch.Tensor
    indices: torch.Tensor
    failures: list[dict[str, str]]


def load_encoder(name: str, pooling: Literal["frame", "clip"]) -> tuple[ViCMAEModel, Any]:
    """
    The encoder of any ViC-MAE checkpoint (pretrained, finetuned, or an encoder alone), and its processor: of images
    for `pooling="frame"`, of videos for "clip".

    Raises:
        InputError: if there is no such checkpoint, it is of another model, or lacks weights or the processor.
    """
    processor_class = AutoVideoProcessor if pooling == "clip" else AutoImageProcessor
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != ViCMAEModel.config_class.model_type:
            raise InputError(f"{name}: expected a ViC-MAE checkpoint, got one of {config.model_type}.")
        model, loading = ViCMAEModel.from_pretrained(name, output_loading_info=True)
        processor = processor_class.from_pretrained(name)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no encoder can be loaded from there: {error}") from error
    if loading["missing_keys"]:
        raise InputError(f"{name}: lacks weights of the encoder, the first: {min(loading['missing_keys'])}.")
    return model, processor


def build_feature_views(
    source: LabelledSource | MediaSource,
    processor: Any,
    loader: MediaLoader,
    *,
    pooling: Literal["frame", "clip"],
    num_frames: int,
    frames_per_second: float | None = None,
) -> ViewDataset:
    """
    What is embedded of each item.

    Args:
        processor: the encoder's image processor for "frame", its video processor for "clip".
        pooling: "frame": `num_frames` single frames, the middles of equal parts of the video, whose embeddings are
            averaged (an image is embedded once). "clip": one clip of `num_frames` frames, embedded as a whole.
        frames_per_second: of a clip; None spreads it over the whole video.
    """
    is_clip = pooling == "clip"
    return ViewDataset(
        source,
        choose_preprocessing(processor),
        loader,
        task="video" if is_clip else "image",
        num_frames=num_frames,
        frames_per_second=frames_per_second,
        protocols=[ViewProtocol(1 if is_clip else num_frames)],
    )


def extract_embeddings(
    accelerator: Accelerator, model: ViCMAEModel, dataset: ViewDataset, *, batch_size: int, num_workers: int
) -> Features:
    """
    The encoder's `pooler_output`, averaged over the views of each item; every item once, divided between the
    processes, all of which get everything. The model's training mode is left as it was.

    Raises:
        InputError: if no item can be read.
    """

    def compute(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        with accelerator.autocast():
            parts = [model(part).pooler_output for part in batch["pixel_values"].to(model.dtype).split(batch_size)]
        return {"embeddings": average_views(torch.cat(parts).float(), batch["weights"])[:, 0]}

    was_training = model.training
    model.eval()
    collected = collect(accelerator, dataset, compute, batch_size=batch_size, num_workers=num_workers)
    model.train(was_training)
    return Features(collected.outputs["embeddings"], collected.indices, collected.failures)


def write_features(path: str | os.PathLike, source: MediaSource, features: Features, settings: dict[str, Any]) -> None:
    """
    Writes embeddings with the names of their files, and their class names if the source has labels.

    A Parquet file has the columns `file`, `embedding` (list of D float32) and `class`, and the settings as JSON in the
    metadata of its schema, key `settings`. A safetensors file has the tensors `embeddings` `(N, D)` and `labels`
    `(N,)`, and in its metadata, as JSON, `files`, `class_names` and `settings`. Unreadable items go to
    `PATH.bad_files.jsonl`.

    Raises:
        InputError: if `path` ends otherwise.
    """
    path = check_feature_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    indices = features.indices.tolist()
    files = [source[index].name for index in indices]
    labels = None if source.labels is None else torch.as_tensor(source.labels)[features.indices]
    if path.suffix == ".parquet":
        columns = {"file": files, "embedding": matrix_column(features.embeddings)}
        if labels is not None:
            columns["class"] = [source.class_names[label] if label >= 0 else None for label in labels.tolist()]
        table = pa.table(columns)
        table = table.replace_schema_metadata({"settings": json.dumps(settings)})
        pyarrow.parquet.write_table(table, path)
    else:
        tensors = {"embeddings": features.embeddings.contiguous()}
        metadata = {"files": files, "settings": settings}
        if labels is not None:
            tensors["labels"], metadata["class_names"] = labels.contiguous(), source.class_names
        save_file(tensors, path, metadata={name: json.dumps(value) for name, value in metadata.items()})
    write_failures(path.with_name(f"{path.name}.bad_files.jsonl"), features.failures)


def check_feature_file(path: str | os.PathLike) -> Path:
    """Raises an InputError if a file of features would be of no known format."""
    path = Path(path)
    if path.suffix not in (".parquet", ".safetensors"):
        raise InputError(f"{path}: expected a name that ends in .parquet or .safetensors.")
    return path


def nearest_neighbour_scores(
    features: torch.Tensor,
    labels: torch.Tensor,
    queries: torch.Tensor,
    num_classes: int,
    num_neighbours: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """
    Votes of the nearest labelled features, weighted by exp(cosine similarity / temperature), `(Q, num_classes)`.

    The classifier of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018),
    section 3.4, with their temperature, and the 20 neighbours of DINO (Caron et al., 2021).

    Args:
        features: `(N, D)`; labels: `(N,)`.
        queries: `(Q, D)`.
        num_neighbours: all of them where there are fewer.
    """
    features, queries = F.normalize(features, dim=-1), F.normalize(queries, dim=-1)
    scores = []
    for chunk in queries.split(1024):
        similarities, neighbours = (chunk @ features.T).topk(min(num_neighbours, len(features)))
        votes = torch.zeros(len(chunk), num_classes, device=features.device)
        scores.append(votes.scatter_add(1, labels[neighbours], (similarities / temperature).exp()))
    return torch.cat(scores)
