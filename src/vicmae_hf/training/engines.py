"""What a run computes with: engines that are refused, compiled layers, threads, the precision of products."""

import logging
import os
import sys

import psutil
import torch
from accelerate.utils import is_torch_xla_available
from torch import nn

from ..command_line import launching_command
from ..modeling_vicmae import ViCMAELayer
from ..settings import ArgumentsError
from .arguments import TrainingArguments


logger = logging.getLogger(__name__)


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


def choose_precision_of_products(mixed_precision: str) -> None:
    """
    Lets float32 matrix products on GPUs round their inputs to TF32 (10 bits of mantissa) where a run is in float32: a
    multiple of the speed, and finer than bf16. In bf16 and fp16, what is left in float32 stays exact.
    """
    torch.set_float32_matmul_precision("high" if mixed_precision == "no" else "highest")


# Below, a model is so small that loading a sample costs as much as training on it (B/16 has 112 million).
SMALL_MODEL_PARAMETERS = 20_000_000


def set_threads(arguments: TrainingArguments, model: nn.Module) -> None:
    """
    Sets the number of threads with which this process computes on a CPU: `--num_threads`, or what the user set
    (`OMP_NUM_THREADS`, `--num_cpu_threads_per_process`), or a number that fits. Launchers by themselves set one,
    whatever the machine.
    """
    if arguments.num_threads is None and are_threads_chosen():
        return
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    fitting = fitting_threads(num_cores // local_processes, arguments.dataloader_num_workers, num_parameters)
    torch.set_num_threads(arguments.num_threads or fitting)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        chosen = "--num_threads" if arguments.num_threads else f"{num_cores} cores, --num_threads sets others"
        logger.info("A process computes with %d threads (%s).", torch.get_num_threads(), chosen)


def fitting_threads(num_cores: int, num_workers: int, num_parameters: int) -> int:
    """All cores of a process for a large model; for a small one, those that loading leaves."""
    return max(num_cores - (num_workers if num_parameters < SMALL_MODEL_PARAMETERS else 0), 1)


def are_threads_chosen() -> bool:
    """Whether the user has set the number of threads, and not the launcher by itself."""
    launcher = launching_command(sys.argv[0])
    if launcher is None:
        return "OMP_NUM_THREADS" in os.environ
    try:  # what the launcher was started with; this process has what the launcher added
        environment = psutil.Process().parent().environ()
    except (psutil.Error, AttributeError):
        environment = {}
    return "OMP_NUM_THREADS" in environment or any("num_cpu_threads_per_process" in word for word in launcher)
