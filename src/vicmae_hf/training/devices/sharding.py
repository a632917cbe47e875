"""FSDP2: how it is set up, and how a model and an optimizer that it shards are gathered and loaded."""

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, load
from accelerate.utils.operations import convert_outputs_to_fp32
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ...modeling_vicmae import ViCMAELayer
from ...settings import ArgumentsError


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "on")


def set_up_sharding(accelerator: Accelerator) -> None:
    """Makes FSDP2 compute as other runs do, and work on CPUs too, where accelerate would silently leave it out."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and is_on("ACCELERATE_USE_FSDP"):
        # In both states, as accelerate does on GPUs: it copies the one into the other again and again.
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.is_fsdp2:
        # Whatever the configuration says: parts that are not called by themselves, or lie in each other, would fail.
        state.fsdp_plugin.auto_wrap_policy = transformer_auto_wrap_policy
        state.fsdp_plugin.transformer_cls_names_to_wrap = [ViCMAELayer.__name__]
        # Weights and inputs stay in float32, and autocast rounds where it does without FSDP. Accelerate would round
        # all inputs to bf16: pixels, and the noise whose order decides which patches are masked.
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        # Accelerate sends buffers with the weights then, and fails on them: they are not divided.
        state.fsdp_plugin.cpu_ram_efficient_loading = False


def prepare_sharding(accelerator: Accelerator, model: nn.Module) -> None:
    """
    Lets a model that FSDP2 is about to divide compute under autocast, as Accelerate lets other models. Raises an
    ArgumentsError if FSDP2 cannot divide a parameter of it.
    """
    if not accelerator.is_fsdp2:
        return
    if any(parameter.ndim == 0 for parameter in model.parameters()):
        raise ArgumentsError(
            "accelerate's configuration chooses FSDP, which cannot shard a single number: learnable_temperature=true."
            ' Give --config_overrides "learnable_temperature=false", or train without FSDP.'
        )
    model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))


def gather_model(accelerator: Accelerator, model: PreTrainedModel) -> PreTrainedModel | None:
    """
    Returns the model itself, or of one that FSDP2 divides a whole copy on the CPU in the main process, and None in the
    others. All processes call it.
    """
    if not accelerator.is_fsdp2:
        return model
    weights = gather_tensors(accelerator, model.state_dict())
    if not accelerator.is_main_process:
        return None
    with torch.device("meta"):
        whole = type(model).__bases__[-1](model.config)  # FSDP2 has put a class of its own before the model's
    whole.load_state_dict(weights, assign=True)
    return whole


def gather_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns `optimizer.state_dict()` as it would be without FSDP2, in the main process. All processes call it."""
    state = optimizer.state_dict()
    return state | {"state": {key: gather_tensors(accelerator, value) for key, value in state["state"].items()}}


def gather_tensors(accelerator: Accelerator, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gathers one after the other, so that no device holds more than one whole. Only the main process keeps them."""
    whole = {}
    for name, tensor in tensors.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if accelerator.is_main_process:
            whole[name] = tensor.cpu()
    return whole


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Loads the whole weights of a file into a model that FSDP2 divides. Raises a KeyError if one is missing."""
    weights = load_file(path)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(divide_as(tensor, weights[name]))


def load_optimizer(optimizer: torch.optim.Optimizer, path: str | os.PathLike) -> None:
    """Loads the whole state of an optimizer whose parameters FSDP2 divides."""
    state = load(path, map_location="cpu")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        state["state"][number] = {
            name: divide_as(parameter, value) if value.shape == parameter.shape else value
            for name, value in values.items()
        }
    optimizer.load_state_dict(state)


def divide_as(example: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Divides a tensor that all processes have between them, as `example` is divided, if it is."""
    if not isinstance(example, DTensor):
        return whole
    whole = whole.to(example.device)
    return distribute_tensor(whole, example.device_mesh, example.placements, src_data_rank=None)
