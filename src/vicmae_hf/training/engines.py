"""What a run computes with: engines (FSDP2 divides a model), compiled layers, threads, precision of products."""

import logging
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, is_torch_xla_available, load
from accelerate.utils.operations import convert_outputs_to_fp32
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

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


def check_engine(mixed_precision: str | None = None, can_shard: bool = False) -> None:
    """
    Raises an ArgumentsError if accelerate's configuration has an engine or a precision that is not supported. Call it
    before an `Accelerator` is made: that would ask for packages which would not help.

    Args:
        mixed_precision: as the script was told; None leaves it to the launcher.
        can_shard: whether the script trains with FSDP2.
    """
    for variable, engine in ENGINES.items():
        if is_on(variable) and not (can_shard and engine == "FSDP"):
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
        "and several processes with the whole model in each, on CPUs or GPUs, in float32, bf16 or fp16, and FSDP2 for "
        "pretraining. Run "
        "`accelerate config` again without it, or name another file: accelerate launch --config_file FILE."
    )


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "on")


# Settings of FSDP that are refused, by the launcher's variable -> what to do.
REFUSED_SHARDING = {
    "FSDP_OFFLOAD_PARAMS": "offloading to the CPU is not supported; set fsdp_offload_params: false",
    "FSDP_ACTIVATION_CHECKPOINTING": "set fsdp_activation_checkpointing: false, and give --gradient_checkpointing",
}


def check_sharding(arguments: TrainingArguments) -> None:
    """Raises an ArgumentsError if accelerate's configuration chooses FSDP, and the settings do not go with it."""
    if not is_on("ACCELERATE_USE_FSDP"):
        return
    reasons = [reason for variable, reason in REFUSED_SHARDING.items() if is_on(variable)]
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        reasons.append(f"fsdp_version is {version}; set fsdp_version: 2")
    if (arguments.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) == "fp16":
        reasons.append("the gradient scaler of fp16 knows no divided gradients; take bf16")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        reasons.append("leave out dynamo_backend")
    if getattr(arguments, "contrast_across_accumulation", False):
        reasons.append(
            "--contrast_across_accumulation encodes past FSDP's forward pass; leave it out, or train with the whole "
            "model in each process (without FSDP)"
        )
    if getattr(arguments, "probe_data", None) is not None:
        reasons.append("--probe_data needs the whole encoder; leave it out, and probe checkpoints afterwards")
    if reasons:
        raise ArgumentsError(f"accelerate's configuration chooses FSDP: {'; '.join(reasons)}.")


def set_up_sharding(accelerator: Accelerator) -> None:
    """Makes FSDP2 compute as other runs do, and work on CPUs too, where accelerate would silently leave it out."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and is_on("ACCELERATE_USE_FSDP"):
        # In both states, as accelerate does on GPUs: it copies the one into the other time and again.
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
            "accelerate's configuration chooses FSDP, which cannot divide a single number: learnable_temperature=true."
            ' Say --config_overrides "learnable_temperature=false", or train without FSDP.'
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
    num_cores = usable_cores()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    fitting = fitting_threads(num_cores // local_processes, arguments.dataloader_num_workers, num_parameters)
    torch.set_num_threads(arguments.num_threads or fitting)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        chosen = "--num_threads" if arguments.num_threads else f"{num_cores} cores, --num_threads sets others"
        logger.info("Threads of a process: %d (%s).", torch.get_num_threads(), chosen)


CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may use: those that it may run on, or fewer by the quota of its container."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = read_cpu_quota(CGROUPS)
    return num_cores if quota is None else min(num_cores, max(int(quota), 1))


def read_cpu_quota(folder: Path) -> float | None:
    """
    Reads how many cores a container may keep busy (`docker run --cpus 2`, limits of Kubernetes); None without a limit.

    Args:
        folder: of control groups, in which a container finds its own. `cpu.max` is of version 2, "QUOTA PERIOD" in
            microseconds or "max PERIOD"; version 1 has two files, and -1 for no limit.
    """
    version_1 = [folder / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    for files in ([folder / "cpu.max"], version_1):
        try:
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
        except (OSError, ValueError):  # there is no such file, or no limit
            continue
        return quota / period if quota > 0 < period else None
    return None


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
