"""Optimizers and learning-rate schedules of the recipes."""

import math

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of trainable parameters: matrices with weight decay; vectors, tokens and scalars without."""
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # A token (1, 1, D) is a vector.
            is_matrix = sum(size > 1 for size in parameter.shape) > 1
            (decayed if is_matrix else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def scaled_learning_rate(base_learning_rate: float, total_batch_size: int) -> float:
    """Linear scaling: base learning rate x total batch / 256 (supplement, section A)."""
    return base_learning_rate * total_batch_size / 256


def learning_rate_factor(step: int, num_warmup_steps: float, num_steps: int) -> float:
    """
    Share of the peak learning rate at an update, counted from 0: linear warmup from 0, then half a cosine to 0 at
    `num_steps` (Table 1). A function of the step alone, so that a resumed run needs no state of it.
    """
    if step < num_warmup_steps:
        return step / num_warmup_steps
    progress = (step - num_warmup_steps) / max(num_steps - num_warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, factor: float) -> None:
    """Gives every group `peak * factor`."""
    for group in optimizer.param_groups:
        group["lr"] = peak * factor
