"""Extracts features of frozen encoders, of every video or image, and writes them to files."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoVideoProcessor

from ..convert_checkpoint import own_checkpoint
from ..data.media.reading import MediaLoader
from ..data.samples.views import ViewDataset, ViewProtocol, choose_preprocessing
from ..data.sources.label_lists import name_labels
from ..data.sources.labelled import LabelledSource, number_classes
from ..data.sources.sources import MediaSource
from ..errors import InputError
from ..files import partial_file, writing
from ..modeling_vicmae import ViCMAEModel
from ..training.session import MODEL_ERRORS, NO_FOREIGN_CODE, explain
from .feature_table import EmbeddingFile, Features
from .prediction import average_views, collect_rounds, evaluating, split_items, write_failures


logger = get_logger(__name__)


def load_encoder(name: str, pooling: Literal["frame", "clip"]) -> tuple[ViCMAEModel, Any]:
    """
    Loads the encoder of any ViC-MAE checkpoint (pretrained, finetuned, or an encoder alone), and its processor: the
    image processor for `pooling="frame"`, the video processor for "clip". Checkpoints of MAE and ViTMAE are converted.

    Raises:
        InputError: if there is no such checkpoint, it is of another model, or lacks weights or the processor.
    """
    processor_class = AutoVideoProcessor if pooling == "clip" else AutoImageProcessor
    try:
        with own_checkpoint(name) as folder:
            config = AutoConfig.from_pretrained(folder, **NO_FOREIGN_CODE)
            if config.model_type != ViCMAEModel.config_class.model_type:
                raise InputError(f"{name}: expected a ViC-MAE checkpoint, got one of {config.model_type}.")
            model, loading = ViCMAEModel.from_pretrained(folder, output_loading_info=True)
            processor = processor_class.from_pretrained(folder, **NO_FOREIGN_CODE)
    except InputError:
        raise
    except MODEL_ERRORS as error:
        raise InputError(f"{name}: no encoder can be loaded from there: {explain(error)}") from error
    # Transformers only warns, and features of random weights look like features.
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
    Makes the views of each item that are embedded.

    Args:
        processor: the encoder's image processor for "frame", its video processor for "clip".
        pooling: "frame": `num_frames` single frames, the middles of equal parts of the video, whose embeddings are
            averaged (an image is embedded once). "clip": one clip of `num_frames` frames, embedded as a whole.
        frames_per_second: rate of a clip; None spreads it over the whole video.
    """
    # "frame": as many clips of one frame as frames are wanted, so that the mean over views is the mean over frames.
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


def warn_if_blind_to_order(encoder: ViCMAEModel, num_frames: int) -> None:
    """Warns if a frozen encoder gives clips of `num_frames` frames the same features in any order of tubelets."""
    positions = encoder.embeddings.temporal_position_embeddings  # (1, t, D)
    is_clip = positions is not None and num_frames > encoder.config.tubelet_size
    if is_clip and encoder.config.pooling != "tubelets" and (positions == positions[:, :1]).all():
        logger.warning(
            "The encoder is frozen, and its temporal positions are all the same, as before training on clips: it "
            "does not see in which order the %d tubelets of a clip come. Where that matters, finetune, or pool each "
            "tubelet by itself (--config_overrides pooling=tubelets in run_classification.py; docs/finetuning.md).",
            num_frames // encoder.config.tubelet_size,
        )


def extract_embeddings(
    accelerator: Accelerator,
    model: ViCMAEModel,
    dataset: ViewDataset,
    *,
    batch_size: int,
    num_workers: int,
) -> Features:
    """
    Computes the encoder's `pooler_output` of every item, averaged over its views (see `embed_views`). The encoder's
    training mode stays as it was.
    """
    with evaluating(model):
        return embed_views(
            accelerator, pooled(accelerator, [model]), dataset, batch_size=batch_size, num_workers=num_workers
        )


def pooled(accelerator: Accelerator, models: Sequence[ViCMAEModel]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function: views `(V, ...)` -> the `pooler_output`s of several encoders, side by side."""

    def embed(views: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return torch.cat([model(views.to(model.dtype)).pooler_output.float() for model in models], dim=-1)

    return embed


def embed_views(
    accelerator: Accelerator,
    embed: Callable[[torch.Tensor], torch.Tensor],
    dataset: ViewDataset,
    *,
    batch_size: int,
    num_workers: int,
    average: bool = True,
) -> Features:
    """
    Embeds the views of every item once. The processes share the work, and all get the whole result, in a file of their
    own (see `EmbeddingFile`): memory holds a few batches.

    Args:
        embed: views `(V, ...)` -> embeddings `(V, D)`.
        batch_size: views that are embedded together.
        average: whether the embeddings of an item's views are averaged, or kept one by one.

    Raises:
        InputError: if no item can be read, or there is no room for the file.
    """
    num_views = 1 if average else dataset.protocols[0].num_views

    def compute(batch: dict[str, Any]) -> dict[str, Sequence[torch.Tensor]]:
        # An item may have more views than fit into memory at once.
        values = torch.cat([embed(part) for part in batch["pixel_values"].split(batch_size)]).float()
        if average:
            values = average_views(values, batch["weights"])  # (B, 1, D), of the only protocol
            return {"embeddings": values.cpu(), "rows": torch.zeros(len(values), 1, dtype=torch.int64)}
        rows = torch.stack([view_rows(weights, num_views) for weights in batch["weights"]])  # (B, num_views)
        return {"embeddings": split_items(values.cpu(), batch["weights"]), "rows": rows}

    file, parts, failures = EmbeddingFile(), [], []
    for collected in collect_rounds(accelerator, dataset, compute, batch_size=batch_size, num_workers=num_workers):
        failures += collected.failures
        if len(collected.indices) == 0:
            continue
        embeddings = collected.outputs["embeddings"]
        starts = torch.tensor([file.shape[0], *(len(views) for views in embeddings)][:-1]).cumsum(0)
        file.append(torch.cat(list(embeddings)))
        parts.append((starts[:, None] + torch.stack(list(collected.outputs["rows"])), collected.indices))
    rows, indices = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Features(file.read(), rows, indices, failures)


def view_rows(weights: torch.Tensor, num_views: int) -> torch.Tensor:
    """
    Which of an item's distinct views each of the `num_views` views of the first protocol is, `(num_views,)`, from
    their weights `(P, V)`: a view that stands for several, such as a frame of a very short video, is named as often.
    """
    counts = (weights[0] * num_views).round().long()
    return torch.arange(len(counts)).repeat_interleave(counts)


def matrix_column(matrix: torch.Tensor) -> pa.FixedSizeListArray:
    """Makes a column of N lists of a matrix `(N, D)`."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.flatten().numpy()), matrix.shape[1])


def write_features(path: str | os.PathLike, source: MediaSource, features: Features, settings: dict[str, Any]) -> None:
    """
    Writes embeddings with the names of their files, and their class names if the source has labels.

    A Parquet file has the columns `file`, `embedding` (list of D float32) and `class` (a list of names where items may
    have several), and the settings as JSON in the metadata of its schema, key `settings`. A safetensors file has the
    tensors `embeddings` `(N, D)` and `labels`, `(N,)` or targets `(N, C)`, and in its metadata, as JSON, `files`,
    `class_names` and `settings`. Unreadable items go to `PATH.bad_files.jsonl`.

    Raises:
        InputError: if `path` ends otherwise or cannot be written. A file of that name is whole, or as it was.
    """
    path = check_feature_file(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    indices = features.indices.tolist()
    files = [source[index].name for index in indices]
    labels = None if source.labels is None else torch.as_tensor(source.labels)[features.indices]
    class_names = source.class_names
    if class_names is None and labels is not None:
        class_names = number_classes(source.labels)
    if path.suffix == ".parquet":
        columns = {"file": files, "embedding": matrix_column(features.embeddings)}
        if labels is not None:
            # Names and not indices: a Parquet file is read without this package.
            columns["class"] = name_labels(labels.numpy(), class_names)
        table = pa.table(columns)
        table = table.replace_schema_metadata({"settings": json.dumps(settings)})
        with partial_file(path) as partial:
            pyarrow.parquet.write_table(table, partial)
    else:
        tensors = {"embeddings": features.embeddings.contiguous()}
        metadata = {"files": files, "settings": settings}  # safetensors holds tensors and texts, hence JSON below
        if labels is not None:
            tensors["labels"], metadata["class_names"] = labels.contiguous(), class_names
        with partial_file(path) as partial:
            save_file(tensors, partial, metadata={name: json.dumps(value) for name, value in metadata.items()})
    write_failures(path.with_name(f"{path.name}.bad_files.jsonl"), features.failures)


def check_feature_file(path: str | os.PathLike) -> Path:
    """Raises an InputError if a file of features would be of no known format, or a folder has its name."""
    # A function of its own: scripts call it before they compute for hours.
    path = Path(path)
    if path.suffix not in (".parquet", ".safetensors"):
        raise InputError(f"{path}: expected a name that ends in .parquet or .safetensors.")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file.")
    return path
