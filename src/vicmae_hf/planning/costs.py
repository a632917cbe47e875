"""What a run costs, computed from its settings: operations, memory, checkpoints, time on GPUs that are not here."""

import math
from dataclasses import dataclass

from torch import nn

from ..configuration_vicmae import ViCMAEConfig
from ..pretraining.flops import layer_flops, update_flops
from ..training.devices.peaks import PEAK_FLOPS


# What ViT-B/16 reaches on an H100 in bf16, eager, with 512 pairs. With 128 or 512, eager or compiled, it is 17 to
# 30 %, and of ViT-L 27 to 38 % (docs/performance.md).
DEFAULT_MFU = 0.25
# Small batches wait for the program, not for the GPU: ViT-B's 20 layers take 56 ms or more (docs/performance.md).
LAYER_SECONDS = 0.056 / 20


@dataclass(frozen=True)
class GPU:
    """A GPU by its data sheet: peak (see `PEAK_FLOPS`) and memory."""

    name: str
    flops: float
    gib: float


GPUS = (
    GPU("H100 80 GB", PEAK_FLOPS["NVIDIA H100"], 80),
    GPU("A100 80 GB", PEAK_FLOPS["NVIDIA A100"], 80),
    GPU("L4 24 GB", PEAK_FLOPS["NVIDIA L4"], 24),
    GPU("RTX 4090 24 GB", PEAK_FLOPS["NVIDIA GeForce RTX 4090"], 24),
    GPU("RTX 3060 12 GB", PEAK_FLOPS["NVIDIA GeForce RTX 3060"], 12),
    GPU("RTX 4060 8 GB", 30.2e12, 8),
    GPU("RTX 3050 Laptop 4 GB", 8.7e12, 4),  # 2,048 cores at the lowest of the boost clocks that it is sold with
)
CUDA_GIB = 0.6  # what CUDA and its libraries take before a model is there


def pretraining_flops(
    config: ViCMAEConfig, num_pairs: int, num_frozen: int = 0, is_encoded_twice: bool = False
) -> int:
    """
    Counts the operations of an update (see `update_flops`).

    Args:
        num_frozen: first layers without a backward pass.
        is_encoded_twice: as with `--contrast_across_accumulation`.
    """
    num_visible = config.count_visible(math.prod(config.patch_grid))
    layer = layer_flops(num_visible + 1, config.hidden_size, config.intermediate_size)
    flops = update_flops(config, num_pairs, num_frozen)
    return flops + (2 * num_pairs * config.num_hidden_layers * layer if is_encoded_twice else 0)


def classification_flops(config: ViCMAEConfig, num_samples: int, num_frames: int, is_frozen: bool) -> int:
    """Counts the operations of an update of a classifier, of clips of `num_frames` or (1) images."""
    num_tokens = math.prod(config.patch_grid) * max(num_frames // config.tubelet_size, 1)
    layer = layer_flops(num_tokens + 1, config.hidden_size, config.intermediate_size)
    num_pixels = config.num_channels * config.patch_size**2 * (config.tubelet_size if num_frames > 1 else 1)
    embeddings = 2 * num_tokens * num_pixels * config.hidden_size
    forward = config.num_hidden_layers * layer + embeddings
    return num_samples * (forward if is_frozen else 3 * forward - embeddings)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All, and those that are trained."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)


def state_bytes(num_parameters: int, num_trained: int) -> int:
    """Bytes of weights, gradients and AdamW's two moments, all float32."""
    return 4 * num_parameters + 12 * num_trained


def checkpoint_bytes(num_parameters: int, num_trained: int) -> int:
    """Bytes of a checkpoint: weights and two moments."""
    return 4 * num_parameters + 8 * num_trained


def checkpoint_steps(num_steps: int, interval: int) -> list[int]:
    """The updates after which a run writes a checkpoint (see `is_due`)."""
    if not interval:
        return []
    steps = list(range(interval, num_steps + 1, interval))
    return steps if steps and steps[-1] == num_steps else [*steps, num_steps]
