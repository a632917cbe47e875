"""Reads checkpoints of other code bases from files and the Hub, and writes them as folders of ours."""

import argparse
import logging
import pickle
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, ViTMAEConfig
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..configuration_vicmae import ViCMAEConfig
from ..errors import InputError
from ..files import check_writable, read_json, writing
from ..modeling_vicmae import ViCMAEPreTrainedModel
from ..processors import build_processors
from .state_dicts import convert_state_dict, list_names, model_without_weights


logger = logging.getLogger(__name__)


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
    config_file = path.parent / "config.json"
    is_of_transformers = path.name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME) and config_file.is_file()
    if is_of_transformers and read_json(config_file).get("model_type") == ViCMAEConfig.model_type:
        raise InputError(
            f"{path}: is of this package, so there is nothing to convert; give its folder, {path.parent}, whose "
            "config.json says what it holds."
        )
    return read_file(path), {}


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"{folder}: expected a folder with config.json, as written by save_pretrained.")
    fields = read_json(config_file)
    if fields.get("model_type") == ViCMAEConfig.model_type:
        raise InputError(f"{folder}: is a checkpoint of this package; there is nothing to convert.")
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
