"""Builds the models of runs, from checkpoints or with random weights."""

import logging
import re
from collections.abc import Iterable, Sequence
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ...command_line import one_line, parse_config_overrides
from ...configuration_vicmae import ViCMAEConfig
from ...convert_checkpoint import own_checkpoint
from ...modeling_vicmae import ViCMAEForPreTraining
from ...settings import ArgumentsError
from ..arguments import TrainingArguments
from ..devices.hardware import compile_layers, set_threads
from .scripts import is_main_process


Model = TypeVar("Model", bound=PreTrainedModel)

# Loading a model raises these, where a file is damaged, does not fit, or asks for code or packages.
MODEL_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError),
    *(StrictDataclassError, SafetensorError, UnpicklingError),
)
# For everything that opens a checkpoint: Transformers would ask the user, and might take a script's input for a yes.
NO_FOREIGN_CODE = {"trust_remote_code": False}


def build_model(
    model_class: type[Model], arguments: TrainingArguments, replaced: str | None = None, **settings
) -> Model:
    """
    Builds a model with random weights, or from `--model_name_or_path`, and applies `--image_size` and
    `--config_overrides`.

    Args:
        replaced: beginning of the names of parameters that need not fit the checkpoint's (a new classifier).
        settings: more fields of the config.

    Raises:
        ArgumentsError: if there is no such checkpoint, the settings do not fit together, or its weights do not fit
            them; if `--config_overrides` has another value of a field that `settings` or `--image_size` decide.
    """
    overrides = parse_config_overrides(model_class.config_class, arguments.config_overrides)
    if arguments.image_size is not None:
        settings["image_size"] = arguments.image_size if len(arguments.image_size) == 2 else arguments.image_size[0]
    # Else the override would be lost without a word.
    if twice := [name for name in overrides.keys() & settings.keys() if overrides[name] != settings[name]]:
        given = ", ".join(f"{name}={overrides[name]}" for name in sorted(twice))
        raise ArgumentsError(f"--config_overrides {given}: other settings or the data decide that; leave it out.")
    changes = overrides | settings
    try:
        if arguments.model_name_or_path is None:
            model = model_class(model_class.config_class(**changes))
        else:
            model, loaded = load_model(model_class, arguments.model_name_or_path, changes)
            check_shapes(loaded["mismatched_keys"], replaced)
            check_encoder(loaded["missing_keys"])
    except MODEL_ERRORS as error:
        source = arguments.model_name_or_path or "--image_size and --config_overrides"
        raise ArgumentsError(f"The model cannot be built from {source}: {explain(error)}") from error
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if arguments.torch_compile:
        compile_layers(model)
    if not torch.cuda.is_available():
        set_threads(arguments.num_threads, arguments.dataloader_num_workers, model)
    return model


def explain(error: Exception) -> str:
    """Says in one line why a model could not be loaded."""
    text = one_line(error)
    if isinstance(error, UnpicklingError):
        # PyTorch would advise to load the file nevertheless.
        wanted = re.search(r"GLOBAL (\S+)", text)
        reason = f"want to use {wanted[1]}, which may run code" if wanted else "hold things other than tensors"
        return f"its weights (.bin) are refused, because they {reason}. Nothing in them was run."
    if "trust_remote_code" in text:
        return "it needs code that comes with it, and such code is never run here. Nothing of it was run."
    if "Repo id must" in text:  # the Hub's rule for names, which says nothing to those who meant a folder
        return "there is no such file or folder, and a name on the Hub is OWNER/MODEL."
    if "Should have a `model_type` key" in text:  # of a folder without config.json, too
        return "it has no config.json that names a model. A run that ended early leaves such a folder."
    if "couldn't connect to" in text:  # what a mistyped folder of two parts comes to without a network
        return "there is no such file or folder, and the Hub, where a model of this name may be, cannot be reached."
    return text


def load_model(model_class: type[Model], name: str, changes: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """
    Returns the model and Transformers' report on loading it. Checkpoints of MAE, ViTMAE and ViC-MAE's authors are
    converted. Raises a ValueError if it is of another kind.
    """
    with own_checkpoint(name, changes) as folder:
        config = AutoConfig.from_pretrained(folder, **NO_FOREIGN_CODE)
        if config.model_type != model_class.config_class.model_type:
            raise ValueError(
                f"expected a checkpoint of {model_class.config_class.model_type}, MAE or ViTMAE, got one of "
                f"{config.model_type}."
            )
        if folder != name and issubclass(model_class, ViCMAEForPreTraining) and "contrastive_loss" not in changes:
            changes = choose_objective(name, config) | changes
        # A checkpoint may be stored in half precision. Trained so, weights would lose small updates by rounding.
        # Mismatched sizes are let through, because `check_shapes` names them better.
        model, loaded = model_class.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **changes
        )
    model.config.name_or_path = name  # and not a folder that is gone
    return model, loaded


def choose_objective(name: str, converted: PreTrainedConfig) -> dict[str, Any]:
    """Of a converted checkpoint that says MAE's own objective: ViC-MAE's, because that is what is pretrained here."""
    if converted.contrastive_loss != "none":
        return {}
    objective = {field: getattr(ViCMAEConfig(), field) for field in ("contrastive_loss", "reconstruct")}
    chosen = ",".join(f"{field}={value}" for field, value in objective.items())
    if is_main_process():  # Accelerate's logger works only once there is an `Accelerator`
        logging.getLogger(__name__).warning(
            "%s: weights of MAE, now trained with the objective of ViC-MAE (%s). For plain MAE, give "
            '--config_overrides "contrastive_loss=none".',
            name,
            chosen,
        )
    return objective


def check_encoder(missing: Iterable[str]) -> None:
    """Raises a ValueError if weights of the encoder are missing, except temporal positions, which start from zero."""
    # Transformers would only warn, and the run would train an encoder that is random in parts.
    lacking = [name for name in missing if name.startswith("vicmae.") and "temporal_position" not in name]
    if lacking:
        raise ValueError(f"it lacks {len(lacking)} weights of the encoder, the first: {min(lacking)}.")


def check_shapes(mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], replaced: str | None) -> None:
    """Raises a ValueError that names the first parameter whose shape differs between checkpoint and model."""
    for name, found, expected in sorted(mismatched):
        if replaced is None or not name.startswith(replaced):
            raise ValueError(f"{name} has shape {list(found)} there, but {list(expected)} by these settings.")
