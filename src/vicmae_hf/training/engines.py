"""Which engines of accelerate's configuration a run may have, and with which settings."""

import os

from accelerate.utils import is_torch_xla_available

from ..settings import ArgumentsError
from .arguments import TrainingArguments
from .devices.sharding import is_on


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
        f"accelerate's configuration chooses {engine} ({cause}), which is not supported. Supported: one process, "
        "and several processes with the whole model in each, on CPUs or GPUs, in float32, bf16 or fp16, and FSDP2 for "
        "pretraining. Run `accelerate config` again without it, or name another file: accelerate launch --config_file "
        "FILE."
    )


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
        reasons.append("the gradient scaler of fp16 cannot handle sharded gradients; use bf16")
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
