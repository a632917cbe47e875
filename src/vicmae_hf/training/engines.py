"""Refuses the engines that `accelerate config` can choose and that this package does not train with."""

import os

import torch
from accelerate.utils import is_torch_xla_available
from torch import nn

from ..modeling_vicmae import ViCMAELayer
from ..settings import ArgumentsError


# The variables by which `accelerate launch` tells a script of its engine.
ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}


def check_engine(mixed_precision: str | None = None) -> None:
    """
    Raises an ArgumentsError if accelerate's configuration has an engine or a precision that is not supported. Call it
    before an `Accelerator` is made: that would ask for packages which would not help.

    Args:
        mixed_precision: as the script was told; None leaves it to the launcher.
    """
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes", "on"):
            raise unsupported(engine, variable)
    if os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO") != "NO":
        raise unsupported("SageMaker's own parallelism", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE")
    if is_torch_xla_available():
        raise unsupported("PyTorch/XLA, TPUs", "torch_xla is installed; USE_TORCH_XLA=0 leaves it out")
    if mixed_precision is None and os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower() == "fp8":
        raise unsupported("8-bit precision", "ACCELERATE_MIXED_PRECISION=fp8")


def unsupported(engine: str, cause: str) -> ArgumentsError:
    return ArgumentsError(
        f"accelerate's configuration chooses {engine} ({cause}), which is not supported. Supported are one process, "
        "and several processes with the whole model in each, on CPUs or GPUs, in float32, bf16 or fp16. Run "
        "`accelerate config` again without it, or name another file: accelerate launch --config_file FILE."
    )


def compile_layers(model: nn.Module) -> None:
    """
    Lets `torch.compile` make programs of the Transformer layers of a model; the rest stays as it is. All layers of one
    size share a program, so that compiling takes seconds and not minutes, and what changes outside (the contrastive
    weight, masks, losses) compiles nothing again.
    """
    # With stochastic depth every layer has a rate, and a program, of its own; torch would stop at 8.
    torch._dynamo.config.recompile_limit = 64
    for module in model.modules():
        if isinstance(module, ViCMAELayer):
            # Static, because a layer of the decoder would else make the shapes of all layers dynamic.
            module.compile(dynamic=False)
