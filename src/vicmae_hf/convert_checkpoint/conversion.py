"""
Converts checkpoints of other code bases: ViC-MAE's authors (pretraining and finetuned), MAE, Transformers' ViTMAE.

Examples:

    vicmae convert mae_pretrain_vit_base.pth -o models/mae
    vicmae convert vicmae_pretrain_vit_base.pth --image_size 256 -o models/vicmae

Every tensor must be known, or the conversion stops: nothing is left at random values. docs/checkpoints.md explains.
"""

import argparse
import dataclasses
import logging
import math
import os
import pickle
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, ViTMAEConfig
from transformers.utils.logging import disable_progress_bar

from ..command_line import one_line, parse_arguments, parse_config_overrides
from ..configuration_vicmae import ViCMAEConfig
from ..errors import InputError
from ..files import check_writable, read_json, writing
from ..modeling_vicmae import (
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEModel,
    ViCMAEPreTrainedModel,
    resample_positions,
)
from ..processors import build_processors
from ..settings import REQUIRED, ArgumentsError, Settings, setting


logger = logging.getLogger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Key tables: (name there, name here), of modules or tensors. They are data and not code, so that they are read in both
# directions: to convert, to revert, and to name a tensor in an error as the user knows it. `{}` is the number of a
# layer; what follows a module's name (".weight") stays. A tensor with several names here is split: three are queries,
# keys and values, two the positions of the class token and of the patches.
# ---------------------------------------------------------------------------------------------------------------------

KeyTable = list[tuple[str, str]]

TIMM_LAYER = [
    ("norm1", "layernorm_before"),
    ("attn.qkv", "attention.q_proj attention.k_proj attention.v_proj"),
    ("attn.proj", "attention.o_proj"),
    ("norm2", "layernorm_after"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
]

# Names of Transformers before version 5. Version 5 still writes them to files.
VIT_MAE_LAYER = [
    ("layernorm_before", "layernorm_before"),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("layernorm_after", "layernorm_after"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
]

VICMAE_LAYER = [
    ("layernorm_before", "layernorm_before"),
    ("attention.q_proj", "attention.q_proj"),
    ("attention.k_proj", "attention.k_proj"),
    ("attention.v_proj", "attention.v_proj"),
    ("attention.o_proj", "attention.o_proj"),
    ("layernorm_after", "layernorm_after"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
]


def layers(source: str, target: str, table: KeyTable) -> KeyTable:
    """Puts every name of `table` inside a layer: names there into `source`, names here into `target`."""
    return [
        (f"{source}.{name}", " ".join(f"{target}.{target_name}" for target_name in target_names.split()))
        for name, target_names in table
    ]


TIMM_KEYS = [
    ("cls_token", "vicmae.embeddings.cls_token"),
    ("pos_embed", "vicmae.embeddings.cls_position_embedding vicmae.embeddings.position_embeddings"),
    ("patch_embed.proj", "vicmae.embeddings.patch_embeddings.projection"),
    *layers("blocks.{}", "vicmae.layers.{}", TIMM_LAYER),
]

RELEASED_KEYS = [
    *TIMM_KEYS,
    ("norm", "vicmae.layernorm"),
    ("decoder_embed", "decoder.embed"),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.cls_position_embedding decoder.position_embeddings"),
    *layers("decoder_blocks.{}", "decoder.decoder_layers.{}", TIMM_LAYER),
    ("decoder_norm", "decoder.layernorm"),
    ("decoder_pred", "decoder.prediction"),
    ("projector", "projector"),
    ("head", "classifier"),
]

POOLED_KEYS = [*TIMM_KEYS, ("fc_norm", "vicmae.layernorm"), ("head", "classifier")]

VIT_MAE_KEYS = [
    ("vit.embeddings.cls_token", "vicmae.embeddings.cls_token"),
    (
        "vit.embeddings.position_embeddings",
        "vicmae.embeddings.cls_position_embedding vicmae.embeddings.position_embeddings",
    ),
    ("vit.embeddings.patch_embeddings.projection", "vicmae.embeddings.patch_embeddings.projection"),
    ("vit.layernorm", "vicmae.layernorm"),
    ("decoder.decoder_embed", "decoder.embed"),
    ("decoder.mask_token", "decoder.mask_token"),
    ("decoder.decoder_pos_embed", "decoder.cls_position_embedding decoder.position_embeddings"),
    ("decoder.decoder_norm", "decoder.layernorm"),
    ("decoder.decoder_pred", "decoder.prediction"),
]

KEY_TABLES: dict[str, KeyTable] = {
    # ViC-MAE and MAE, and ViTs finetuned on the class token: one table, because each file has a part of these names.
    "released": RELEASED_KEYS,
    # ViTs finetuned on the mean of the patch tokens. It is normalised after pooling, so `fc_norm` is the final norm.
    "pooled": POOLED_KEYS,
    # `facebook/vit-mae-base` on the Hub.
    "vit_mae": [
        *VIT_MAE_KEYS,
        *layers("vit.encoder.layer.{}", "vicmae.layers.{}", VIT_MAE_LAYER),
        *layers("decoder.decoder_layers.{}", "decoder.decoder_layers.{}", VIT_MAE_LAYER),
    ],
    # `save_pretrained` of Transformers 5.23.
    "vit_mae_saved": [
        *VIT_MAE_KEYS,
        *layers("vit.encoder.layer.{}", "vicmae.layers.{}", VIT_MAE_LAYER),
        *layers("decoder.decoder_encoder.layer.{}", "decoder.decoder_layers.{}", VIT_MAE_LAYER),
    ],
    # `state_dict()` of Transformers 5.23.
    "vit_mae_in_memory": [
        *VIT_MAE_KEYS,
        *layers("vit.layers.{}", "vicmae.layers.{}", VICMAE_LAYER),
        *layers("decoder.decoder_layers.{}", "decoder.decoder_layers.{}", VICMAE_LAYER),
    ],
}

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

# Fields that a ViTMAE configuration has and its weights don't tell.
VIT_MAE_FIELDS = [
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "mask_ratio",
    "norm_pix_loss",
]

MODEL_CLASSES: dict[str, type[ViCMAEPreTrainedModel]] = {
    model_class.__name__: model_class
    for model_class in (ViCMAEForPreTraining, ViCMAEForImageClassification, ViCMAEModel)
}


# ---------------------------------------------------------------------------------------------------------------------
# State dicts
# ---------------------------------------------------------------------------------------------------------------------


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], image_size: int | tuple[int, int] | None = None, **config_overrides
) -> tuple[ViCMAEConfig, dict[str, torch.Tensor]]:
    """
    Renames a checkpoint's tensors and reads the model's sizes off their shapes. Values stay as they are, bit by bit,
    unless positions are resampled.

    Args:
        state_dict: a checkpoint's tensors by name, or the dict that holds them under "model", as released files do.
        image_size: pixels, one number or (height, width). Positions of another grid are resampled in two dimensions,
            with a warning. Needed where the number of positions is not a square.
        config_overrides: fields of `ViCMAEConfig` that the weights don't show, such as `num_attention_heads`.

    Returns:
        The configuration, whose `architectures` names the class, and the state dict, which this class loads strictly
        (`ViCMAEModel`, for files that hold only an encoder, with `video=False`).

    Raises:
        InputError: if keys are missing or unexpected (all are listed), shapes don't fit each other, or the image size
            or number of heads can't be inferred.
    """
    state_dict = state_dict["model"] if isinstance(state_dict.get("model"), dict) else state_dict
    # Names are checked before shapes: of a file that lacks half its tensors, one long list of names says more.
    check_arguments(state_dict, config_overrides)
    table = KEY_TABLES[recognize_keys(state_dict)]
    tensors, unknown_keys = rename_tensors(state_dict, table)
    structure = infer_structure(tensors, is_pooled=table is POOLED_KEYS)
    structure.update({name: value for name, value in config_overrides.items() if name in structure})
    check_names(tensors, unknown_keys, structure, table)

    settings = {**structure, **infer_sizes(tensors), **config_overrides}
    for prefix, table_of_heads, head_dim in [("", ENCODER_HEADS, 64), ("decoder_", DECODER_HEADS, 32)]:
        if f"{prefix}hidden_size" in settings and f"{prefix}num_attention_heads" not in settings:
            settings[f"{prefix}num_attention_heads"] = infer_heads(settings, prefix, table_of_heads, head_dim)
    settings["image_size"] = place_positions(tensors, settings["patch_size"], image_size)
    config = ViCMAEConfig(**settings)
    check_shapes(tensors, config, table)
    # An encoder alone has no part called "vicmae"; it is itself that part.
    if config.architectures == ["ViCMAEModel"]:
        tensors = {name.removeprefix("vicmae."): tensor for name, tensor in tensors.items()}
    return config, tensors


def revert_state_dict(state_dict: dict[str, torch.Tensor], keys: str = "released") -> dict[str, torch.Tensor]:
    """
    Reverts `convert_state_dict`, bit by bit: gives tensors of a model of ours the names of `KEY_TABLES[keys]`.

    Raises:
        InputError: if a tensor has no name there, or a part of a fused tensor is missing.
    """
    if not any(name.startswith("vicmae.") for name in state_dict):  # an encoder alone
        state_dict = {f"vicmae.{name}": tensor for name, tensor in state_dict.items()}
    remaining = dict(state_dict)
    reverted = {}
    for source, targets in KEY_TABLES[keys]:
        first_target = targets.split()[0]
        for name in state_dict:
            match = match_name(name, first_target)
            if match is None:
                continue
            names = [fill(target, match) for target in targets.split()]
            missing = [part for part in names if part not in remaining]
            if missing:
                raise InputError(f"{fill(source, match)} can't be put together: missing {list_names(missing)}.")
            reverted[fill(source, match)] = join_tensors([remaining.pop(part) for part in names])
    if remaining:
        raise InputError(f"Tensors without a name in the key table {keys!r}: {list_names(remaining)}.")
    return reverted


def recognize_keys(state_dict: dict[str, torch.Tensor]) -> str:
    """Finds the key table that knows most of the checkpoint's keys: a name in `KEY_TABLES`."""
    # Most and not all: with a key too many, the errors below should still name the others rightly.
    found = {name: sum(translate(key, table) is not None for key in state_dict) for name, table in KEY_TABLES.items()}
    best = max(found, key=found.get)
    if found[best] == 0:
        raise InputError(
            "Not a checkpoint of ViC-MAE, MAE, a timm-style ViT or ViTMAE: no key is known among "
            f"{list_names(state_dict)}."
        )
    return best


def check_arguments(state_dict: dict, config_overrides: dict) -> None:
    not_tensors = [str(key) for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if not_tensors:
        raise InputError(f"Expected a tensor under every key, got something else under {list_names(not_tensors)}.")
    known_fields = {field.name for field in dataclasses.fields(ViCMAEConfig)}
    unknown_fields = sorted(set(config_overrides) - known_fields)
    if unknown_fields:
        raise InputError(f"ViCMAEConfig has no field {list_names(unknown_fields)}.")


def rename_tensors(state_dict: dict[str, torch.Tensor], table: KeyTable) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Gives tensors their names here and splits them where the table does. Also returns the keys that it lacks. Raises an
    InputError that lists single numbers under names of weights.
    """
    tensors, unknown_keys, numbers = {}, [], []
    for key, tensor in state_dict.items():
        names = translate(key, table)
        if names is None:
            unknown_keys.append(key)
        elif tensor.ndim == 0 and not key.endswith(".num_batches_tracked"):  # the one number, of batch norm
            numbers.append(key)
        else:
            tensors.update(zip(names, split_tensor(tensor, len(names)), strict=True))
    if numbers:
        raise InputError(f"Expected weights of one dimension or more, got a number under {list_names(numbers)}.")
    return tensors, unknown_keys


def check_names(tensors: dict[str, torch.Tensor], unknown_keys: list[str], structure: dict, table: KeyTable) -> None:
    """Raises an InputError that lists missing and unexpected tensors of a model of this structure, by names there."""
    expected = expected_shapes(ViCMAEConfig(**structure))  # only names matter here: the widths are not known yet
    missing = dict.fromkeys(source_name(name, table) for name in expected if name not in tensors)
    unexpected = unknown_keys + list(
        dict.fromkeys(source_name(name, table) for name in tensors if name not in expected)
    )
    if missing or unexpected:
        raise InputError(
            f"The checkpoint does not hold a whole {structure['architectures'][0]}. "
            f"Missing keys: {list_names(missing)}. Unexpected keys: {list_names(unexpected)}."
        )


def check_shapes(tensors: dict[str, torch.Tensor], config: ViCMAEConfig, table: KeyTable) -> None:
    """Raises an InputError that lists tensors whose shapes do not fit the configuration."""
    wrong_shapes = [
        f"{source_name(name, table)} (as {name}: expected {tuple(shape)}, got {tuple(tensors[name].shape)})"
        for name, shape in expected_shapes(config).items()
        if tensors[name].shape != shape
    ]
    if wrong_shapes:
        raise InputError(f"Shapes that don't fit the configuration: {list_names(wrong_shapes)}.")


def match_name(name: str, pattern: str) -> re.Match | None:
    """Matches a module's tensor, or the tensor itself. Groups: the layer (for a pattern with `{}`) and the rest."""
    layer_pattern = re.escape(pattern).replace(r"\{\}", r"(?P<layer>\d+)")
    return re.fullmatch(layer_pattern + r"(?P<rest>(\..+)?)", name)


def fill(pattern: str, match: re.Match) -> str:
    """Puts the layer and the rest of a name that `match_name` found into the pattern of its other name."""
    groups = match.groupdict()
    return pattern.replace("{}", groups.get("layer", "")) + groups["rest"]


def translate(name: str, table: KeyTable) -> list[str] | None:
    """Returns all names of a tensor on the other side of a table, or None."""
    for source, targets in table:
        match = match_name(name, source)
        if match:
            return [fill(target, match) for target in targets.split()]
    return None


def source_name(name: str, table: KeyTable) -> str:
    """Returns the name there of a tensor of ours. A name that the table lacks stays."""
    back = [(target, source) for source, targets in table for target in targets.split()]
    return (translate(name, back) or [name])[0]


def split_tensor(tensor: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    """Splits fused queries, keys and values `(3 * D, ...)`, or positions `(1, 1 + L, D)`: class token, patches."""
    if number == 1:
        return (tensor,)
    # Copies, because safetensors refuses to write tensors that share memory.
    if number == 3:
        return tuple(part.clone() for part in tensor.tensor_split(3))
    if tensor.ndim != 3:
        raise InputError(f"Expected positions of shape (1, 1 + patches, width), got {tuple(tensor.shape)}.")
    return tensor[:, :1].clone(), tensor[:, 1:].clone()  # (1, 1, D), (1, L, D)


def join_tensors(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Reverts `split_tensor`; positions of patches come as a grid `(1, h, w, D)`."""
    if len(tensors) == 2:
        return torch.cat([tensors[0], tensors[1].flatten(1, 2)], dim=1)
    return torch.cat(tensors) if len(tensors) == 3 else tensors[0]


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


def model_without_weights(config: ViCMAEConfig) -> ViCMAEPreTrainedModel:
    """Builds the model of a converted checkpoint, without memory for its weights."""
    # On "meta" a ViT-H takes no time and no memory; the checkpoint's own tensors become its weights.
    model_class = MODEL_CLASSES[config.architectures[0]]
    with torch.device("meta"):
        return model_class(config, video=False) if model_class is ViCMAEModel else model_class(config)


def expected_shapes(config: ViCMAEConfig) -> dict[str, torch.Size]:
    """Lists the shapes of all tensors of the model. The encoder's names start with "vicmae." in every class."""
    model = model_without_weights(config)
    prefix = "vicmae." if isinstance(model, ViCMAEModel) else ""
    return {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}


def list_names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read_checkpoint(checkpoint: str | Path) -> tuple[dict, dict]:
    """
    Reads a .pth or .safetensors file, or a folder of Transformers' ViTMAE.

    Returns:
        The content of the file, and, of a folder, the configuration's fields that are ours too.

    Raises:
        InputError: if there is nothing to read, or a file is damaged or holds more than tensors and plain settings.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return read_folder(path)
    return read_file(path), {}


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"{folder}: expected a folder with config.json, as written by save_pretrained.")
    fields = read_json(config_file)
    if fields.get("model_type") != "vit_mae":
        raise InputError(f"{config_file}: expected model_type 'vit_mae', got {fields.get('model_type')!r}.")
    config = ViTMAEConfig.from_dict(fields)
    settings = {name: getattr(config, name) for name in VIT_MAE_FIELDS}

    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        shards = read_json(index_file).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(shard, str) and Path(shard).name == shard for shard in shards.values()
        ):
            raise InputError(f"{index_file}: expected weight_map, from names of tensors to names of files beside it.")
        state_dict = {}
        for shard in sorted(set(shards.values())):
            state_dict.update(read_file(folder / shard))
        lost = [name for name in shards if name not in state_dict]
        if lost:
            raise InputError(f"{index_file}: its files lack {list_names(lost)}.")
        return state_dict, settings
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_file(folder / name), settings
    raise InputError(
        f"{folder}: expected model.safetensors, model.safetensors.index.json or pytorch_model.bin, found none of them."
    )


def read_file(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}).") from error
    try:
        # A .pth file is a pickle, which may run any code when it is read. weights_only allows tensors and plain
        # values. Namespace is allowed too, because the released files keep their training arguments in one.
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the kind of error depends on the damage
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            reason = f"refused, because it wants to use {wanted[1]}, which may run code"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "refused, because it is damaged or holds things other than tensors and plain settings"
        else:
            reason = f"not a whole PyTorch file ({type(error).__name__})"
        raise InputError(f"{path}: {reason}. Nothing in it was run.") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path}: expected a dict of tensors, got {type(contents).__name__}.")
    return contents


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    image_size: int | tuple[int, int] | None = None,
    **config_overrides,
) -> ViCMAEPreTrainedModel:
    """
    Converts a file or folder (see `read_checkpoint`, `convert_state_dict`) and writes a folder for `from_pretrained`:
    config.json, model.safetensors, and the processors for the model's image size.

    Raises:
        InputError: if the checkpoint can't be read or converted, or the folder can't be written; its message starts
            with the path.
    """
    # A folder of ViTMAE has a model.safetensors, too.
    source, target = Path(checkpoint).resolve(), (Path(output_dir) / "model.safetensors").resolve()
    if target in (source, source / target.name):
        raise InputError(f"{checkpoint}: the conversion would overwrite it; choose another output folder.")
    check_writable(target)
    contents, settings = read_checkpoint(checkpoint)
    settings.update(config_overrides)
    if image_size is not None:
        settings["image_size"] = image_size
    try:
        config, state_dict = convert_state_dict(contents, **settings)
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}") from error
    model = model_without_weights(config)
    model.load_state_dict(state_dict, strict=True, assign=True)  # assign: nothing could be copied into "meta"
    with writing(output_dir):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        model.save_pretrained(output_dir)
        for processor in build_processors(config):
            processor.save_pretrained(output_dir)
    return model


@contextmanager
def own_checkpoint(name: str, changes: dict[str, Any] | None = None) -> Iterator[str]:
    """
    Converts what `--model_name_or_path` may name beside a checkpoint of this package: a .pth or .safetensors file (see
    `convert_state_dict`), and a ViTMAE model, in a folder or on the Hub. The block gets a folder that lasts as long as
    it does; of any other checkpoint, its name as it is. Of `changes`, fields of the config, only the numbers of heads
    matter here: weights do not always tell them.

    Raises:
        InputError: if such a checkpoint can't be read or converted.
        OSError: if there is no checkpoint of that name.
    """
    checkpoint = Path(name).expanduser()
    if not checkpoint.is_file():
        if PreTrainedConfig.get_config_dict(name)[0].get("model_type") != "vit_mae":
            yield name
            return
        if not checkpoint.is_dir():
            checkpoint = download_checkpoint(name)
    heads = {field: value for field, value in (changes or {}).items() if field.endswith("num_attention_heads")}
    with tempfile.TemporaryDirectory(prefix="vicmae-converted-") as folder:
        model = convert_checkpoint(checkpoint, folder, **heads)
        logger.info("%s: converted, a %s.", name, type(model).__name__)
        yield folder


def download_checkpoint(name: str) -> Path:
    """Downloads configuration and weights of a model on the Hub: the safetensors files if there are any."""
    folder = snapshot_download(name, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"])
    if not any(Path(folder).glob("*.safetensors")):
        folder = snapshot_download(name, allow_patterns=["config.json", "pytorch_model.bin"])
    return Path(folder)


@dataclasses.dataclass(kw_only=True)
class ConversionArguments(Settings):
    checkpoint: str = setting(REQUIRED, ".pth or .safetensors file, or folder of a ViTMAE model")
    output_dir: str = setting(REQUIRED, "folder to write, which from_pretrained opens")
    image_size: list[int] | None = setting(
        None, "pixels: one number, or height and width; default: the checkpoint's", minimum=1
    )
    config_overrides: str | None = setting(
        None, 'fields of ViCMAEConfig, as "name=value,name=value"', may_be_empty=True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size is not None and len(self.image_size) > 2:
            raise ArgumentsError(f"--image_size: expected one number, or height and width, got {self.image_size}.")


def run(arguments: ConversionArguments) -> None:
    overrides = parse_config_overrides(ViCMAEConfig, arguments.config_overrides)
    if size := arguments.image_size:
        overrides["image_size"] = size[0] if len(size) == 1 else size
    model = convert_checkpoint(arguments.checkpoint, arguments.output_dir, **overrides)
    print(describe(model))
    print(f"Written to {arguments.output_dir}: {', '.join(sorted(os.listdir(arguments.output_dir)))}")


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()  # of Transformers, one for every file that it writes
    try:
        run(parse_arguments(ConversionArguments, argv))
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SystemExit(f"error: {one_line(error)}") from error


def describe(model: ViCMAEPreTrainedModel) -> str:
    """Says in words what was recognised, and shows the configuration."""
    config = model.config
    kinds = {
        "ViCMAEForPreTraining": "MAE pretraining" if config.contrastive_loss == "none" else "ViC-MAE pretraining",
        "ViCMAEForImageClassification": f"finetuned ViT, pooling {config.pooling!r}",
        "ViCMAEModel": "encoder alone",
    }
    tensors = model.state_dict().values()
    name = type(model).__name__
    return (
        f"{config}\nRecognised: {kinds[name]}. Converted: {len(tensors)} tensors, "
        f"{sum(tensor.numel() for tensor in tensors):,} values, all that {name} has."
    )
