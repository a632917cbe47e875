"""Converts state dicts: every tensor gets its name here, and must fit."""

import dataclasses
from collections.abc import Iterable

import torch

from ..configuration_vicmae import ViCMAEConfig
from ..errors import InputError
from ..modeling_vicmae import (
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEModel,
    ViCMAEPreTrainedModel,
)
from .inference import DECODER_HEADS, ENCODER_HEADS, infer_heads, infer_sizes, infer_structure, place_positions
from .key_tables import KEY_TABLES, POOLED_KEYS, KeyTable, fill, match_name, source_name, translate


MODEL_CLASSES: dict[str, type[ViCMAEPreTrainedModel]] = {
    model_class.__name__: model_class
    for model_class in (ViCMAEForPreTraining, ViCMAEForImageClassification, ViCMAEModel)
}


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
