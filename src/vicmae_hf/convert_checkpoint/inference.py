"""Infers a model's settings from names and shapes of its weights."""

import logging
import math

import torch

from ..errors import InputError
from ..modeling_vicmae import resample_positions
from .key_tables import match_name


logger = logging.getLogger(__name__)


# Shapes of weights don't depend on the number of heads, so it is known only by width: ViT-S, B, L, H; and the decoders
# of S and of all others (supplement, section A).
ENCODER_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16}


DECODER_HEADS = {256: 8, 512: 16}


# The released code minimises 0.97 * pixel + 0.03 * contrastive, ours minimises pixel + weight * contrastive. With the
# weight 0.03 / 0.97 both have the same minimum.
RELEASED_OBJECTIVE = {
    "contrastive_loss": "nt_xent",
    "contrastive_weight": 0.03 / 0.97,
    "temperature": 0.1,
    "mask_ratio": 0.5,
    "reconstruct": "both",
}


MAE_OBJECTIVE = {"contrastive_loss": "none", "reconstruct": "both"}


def infer_structure(tensors: dict[str, torch.Tensor], is_pooled: bool) -> dict:
    """Infers from the tensors' names the settings that decide which tensors a model has, and the objective."""
    settings = {
        "num_hidden_layers": count_layers(tensors, "vicmae.layers.{}"),
        "qkv_bias": "vicmae.layers.0.attention.q_proj.bias" in tensors,
    }
    if any(name.startswith(("decoder.", "projector.")) for name in tensors):
        settings["architectures"] = ["ViCMAEForPreTraining"]
        settings["learnable_temperature"] = False
        settings["decoder_num_hidden_layers"] = count_layers(tensors, "decoder.decoder_layers.{}")
        # Of the authors' code bases only ViC-MAE has a projector.
        has_projector = any(name.startswith("projector.") for name in tensors)
        settings.update(RELEASED_OBJECTIVE if has_projector else MAE_OBJECTIVE)
    else:
        has_classifier = any(name.startswith("classifier.") for name in tensors)
        settings["architectures"] = ["ViCMAEForImageClassification" if has_classifier else "ViCMAEModel"]
        settings.update(pooling="mean" if is_pooled else "cls", norm_after_pooling=is_pooled)
    return settings


def count_layers(tensors: dict[str, torch.Tensor], pattern: str) -> int:
    matches = [match_name(name, pattern) for name in tensors]
    # At least one, so that the keys of a file without layers are listed as missing.
    return max((int(match["layer"]) + 1 for match in matches if match), default=1)


def infer_sizes(tensors: dict[str, torch.Tensor]) -> dict:
    """Infers widths and patch size from the shapes of the tensors."""
    patch_weight = tensors["vicmae.embeddings.patch_embeddings.projection.weight"]
    if patch_weight.ndim != 4:
        raise InputError(
            "Expected a patch embedding of single frames, with weights (width, channels, height, width), got shape "
            f"{tuple(patch_weight.shape)}."
        )
    sizes = {
        "hidden_size": patch_weight.shape[0],
        "num_channels": patch_weight.shape[1],
        "patch_size": patch_weight.shape[3],
        "intermediate_size": tensors["vicmae.layers.0.mlp.fc1.weight"].shape[0],
    }
    if "decoder.embed.weight" in tensors:
        sizes["decoder_hidden_size"] = tensors["decoder.embed.weight"].shape[0]
        sizes["decoder_intermediate_size"] = tensors["decoder.decoder_layers.0.mlp.fc1.weight"].shape[0]
    if "projector.0.weight" in tensors:
        sizes["projector_hidden_size"] = tensors["projector.0.weight"].shape[0]
        sizes["projector_output_size"] = tensors["projector.6.weight"].shape[0]  # the last of its linear layers
    if "classifier.weight" in tensors:
        sizes["num_labels"] = tensors["classifier.weight"].shape[0]
    return sizes


def infer_heads(settings: dict, prefix: str, table_of_heads: dict[int, int], head_dim: int) -> int:
    """Returns the number of attention heads of a known width. For other widths guesses, with a warning."""
    width = settings[f"{prefix}hidden_size"]
    if width in table_of_heads:
        return table_of_heads[width]
    name = f"{prefix}num_attention_heads"
    if width % head_dim:
        raise InputError(
            f"{name} can't be read off the weights, and {width} channels are no known width (known are "
            f"{sorted(table_of_heads)}, or multiples of {head_dim}). Give it, with --config_overrides {name}=NUMBER."
        )
    logger.warning(
        f"{name} can't be read off the weights: taking {width // head_dim} heads of {head_dim} channels. If the model "
        f"was trained with another number, give it with --config_overrides {name}=NUMBER."
    )
    return width // head_dim


def place_positions(
    tensors: dict[str, torch.Tensor], patch_size: int, image_size: int | tuple[int, int] | None
) -> int | tuple[int, int]:
    """
    Gives the positions of patches `(1, L, D)` in `tensors` their grid `(1, h, w, D)`, resampled to `image_size`, and
    returns the image size. A square number of positions is a square grid, as in all the code bases we read.
    """
    names = [name for name in tensors if name.endswith(".position_embeddings")]
    counts = {name: tensors[name].shape[1] for name in names}
    count = counts[names[0]]
    if set(counts.values()) != {count}:
        raise InputError(f"Expected as many positions of patches in the decoder as in the encoder, got {counts}.")
    side = math.isqrt(count)
    source_grid = (side, side) if side * side == count else None
    grid = source_grid
    if image_size is not None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < patch_size or height % patch_size or width % patch_size:
            raise InputError(f"image_size must be a multiple of the patch size {patch_size}, got {image_size}.")
        grid = (height // patch_size, width // patch_size)
        if source_grid is None and math.prod(grid) == count:  # not square, but just as many as asked for
            source_grid = grid
    if source_grid is None:
        raise InputError(
            f"{count} positions of patches are no square grid: image_size must be the (height, width) of {count} "
            f"patches of {patch_size} x {patch_size} pixels, got {image_size} (on the command line: --image_size)."
        )
    if grid != source_grid:
        logger.warning(
            f"Positions resampled in two dimensions from {source_grid[0]} x {source_grid[1]} to {grid[0]} x {grid[1]} "
            "patches."
        )
    for name in names:
        tensors[name] = resample_positions(tensors[name].unflatten(1, source_grid), *grid).contiguous()
    height, width = grid[0] * patch_size, grid[1] * patch_size
    return height if height == width else (height, width)
