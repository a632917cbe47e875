"""What a process computes with: compiled layers, precision of products, threads."""

import logging
import os
import sys
from pathlib import Path

import psutil
import torch
from torch import nn

from ...command_line import launching_command
from ...modeling_vicmae import ViCMAELayer


logger = logging.getLogger(__name__)


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


def set_threads(num_threads: int | None, num_workers: int, model: nn.Module) -> None:
    """
    Sets the number of threads with which this process computes on a CPU: `num_threads`, or what the user set
    (`OMP_NUM_THREADS`, `--num_cpu_threads_per_process`), or what fits beside the loading workers. Launchers by
    themselves set one, whatever the machine.
    """
    if num_threads is None and are_threads_chosen():
        return
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_cores = usable_cores()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    fitting = fitting_threads(num_cores // local_processes, num_workers, num_parameters)
    torch.set_num_threads(num_threads or fitting)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        chosen = "--num_threads" if num_threads else f"{num_cores} cores, --num_threads sets others"
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
            quota, period = map(int, " ".join(file.read_text(encoding="utf-8") for file in files).split())
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
