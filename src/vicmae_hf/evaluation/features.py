"""Extracts features of frozen encoders, of every video or image, or of steps of time."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import AutoConfig, AutoImageProcessor, AutoVideoProcessor

from ..convert_checkpoint import own_checkpoint
from ..data.media.reading import MediaLoader
from ..data.samples.steps import FRAMES_IN_ONE_GO, StepDataset
from ..data.samples.views import ViewDataset, ViewProtocol, choose_preprocessing
from ..data.sources.labelled import LabelledSource
from ..data.sources.segments import cut_into_steps
from ..data.sources.sources import MediaSource
from ..errors import InputError
from ..modeling_vicmae import ViCMAEModel
from ..processors import processor_folder
from ..training.session.models import MODEL_ERRORS, NO_FOREIGN_CODE, explain
from .collecting import average_views, collect_rounds, split_items
from .feature_table import EmbeddingFile, Features
from .prediction import evaluating


logger = get_logger(__name__)


def load_encoder(name: str, pooling: Literal["frame", "clip", "patch"]) -> tuple[ViCMAEModel, Any]:
    """
    Loads the encoder of any ViC-MAE checkpoint (pretrained, finetuned, or an encoder alone), and its processor: the
    video processor for `pooling="clip"`, the image processor for the others. Checkpoints of MAE and ViTMAE are
    converted.

    Raises:
        InputError: if there is no such checkpoint, it is of another model, or lacks weights or the processor.
    """
    processor_class = AutoVideoProcessor if pooling == "clip" else AutoImageProcessor
    file = "video_preprocessor_config.json" if pooling == "clip" else "preprocessor_config.json"
    try:
        with own_checkpoint(name) as folder:
            config = AutoConfig.from_pretrained(folder, **NO_FOREIGN_CODE)
            if config.model_type != ViCMAEModel.config_class.model_type:
                raise InputError(f"{name}: expected a ViC-MAE checkpoint, got one of {config.model_type}.")
            model, loading = ViCMAEModel.from_pretrained(folder, output_loading_info=True)
            processor = processor_class.from_pretrained(processor_folder(folder, file), **NO_FOREIGN_CODE)
    except InputError:
        raise
    except MODEL_ERRORS as error:
        raise InputError(f"{name}: no encoder can be loaded from there: {explain(error)}") from error
    if not hasattr(processor, "image_range"):  # of another model, which lies in the folder around a checkpoint
        raise InputError(f"{name}: expected a processor of ViC-MAE, got {type(processor).__name__}.")
    # Transformers only warns, and features of random weights look like features.
    if loading["missing_keys"]:
        raise InputError(f"{name}: lacks weights of the encoder, the first: {min(loading['missing_keys'])}.")
    return model, processor


def build_feature_views(
    source: LabelledSource | MediaSource,
    processor: Any,
    loader: MediaLoader,
    *,
    pooling: Literal["frame", "clip", "patch"],
    num_frames: int,
    frames_per_second: float | None = None,
) -> ViewDataset:
    """
    Makes the views of each item that are embedded.

    Args:
        processor: the encoder's video processor for "clip", its image processor for the others.
        pooling: "frame": `num_frames` single frames, the middles of equal parts of the video, whose embeddings are
            averaged (an image is embedded once), and so "patch". "clip": one clip of `num_frames` frames, embedded as
            a whole.
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


def build_embed(
    accelerator: Accelerator, model: ViCMAEModel, pooling: Literal["frame", "clip", "patch"], layer: int | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    Returns a function: views `(V, ...)` -> their embeddings: pooled as the encoder pools, `(V, D)`, or for "patch"
    of each patch of a frame, `(V, h, w, D)`.

    Args:
        layer: 0 for the embeddings, K for the tokens after K layers, without the final norm; None for the encoder's
            output.

    Raises:
        InputError: if the encoder has no such layer.
    """
    num_layers = model.config.num_hidden_layers
    if layer is not None and not 0 <= layer <= num_layers:
        raise InputError(f"--layer must be between 0 and {num_layers}, the layers of the encoder, got {layer}.")

    def embed(views: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            views = views.to(model.dtype)
            if layer is None:
                outputs = model(views)
                tokens, pooled_tokens = outputs.last_hidden_state, outputs.pooler_output
            else:
                tokens = model.embeddings(views)  # (V, 1 + t * L, D)
                for block in model.layers[:layer]:
                    tokens = block(tokens)
                length = views.shape[1] // model.config.tubelet_size if views.ndim == 5 else 1
                pooled_tokens = model.pool(tokens, length)
        if pooling != "patch":
            return pooled_tokens.float()
        patch_size = model.config.patch_size
        return tokens[:, 1:].unflatten(1, (views.shape[-2] // patch_size, views.shape[-1] // patch_size)).float()

    return embed


def build_step_views(
    source: LabelledSource | MediaSource,
    processor: Any,
    loader: MediaLoader,
    *,
    seconds: float,
    pooling: Literal["frame", "clip", "patch"],
    num_frames: int,
) -> StepDataset:
    """
    Makes the views of each step of `seconds`: `num_frames` single frames, or one clip of them.

    Raises:
        InputError: if the source cannot be cut into steps.
    """
    if not isinstance(source, MediaSource):
        raise InputError(f"{source.name}: expected videos for --every_seconds, not a frame store.")
    steps_per_item = max(FRAMES_IN_ONE_GO // num_frames, 1)
    steps = cut_into_steps(source, seconds, steps_per_item, loader.seconds_per_file)
    task = "video" if pooling == "clip" else "image"
    return StepDataset(steps, choose_preprocessing(processor), loader, task=task, num_frames=num_frames)


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
        # Copies: a process sends another the whole storage of each tensor, which all parts of a batch would share.
        return {"embeddings": [part.clone() for part in split_items(values.cpu(), batch["weights"])], "rows": rows}

    file, parts, failures = EmbeddingFile(), [], []
    loading = {"batch_size": batch_size, "num_workers": num_workers, "what": "extracting features"}
    for collected in collect_rounds(accelerator, dataset, compute, **loading):
        failures += collected.failures
        if len(collected.indices) == 0:
            continue
        embeddings = collected.outputs["embeddings"]
        # The row of the file at which the views of each item begin.
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
