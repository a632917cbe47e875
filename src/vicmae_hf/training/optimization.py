"""Optimizers and learning-rate schedules of the recipes."""

import math
import re
from collections.abc import Callable

import torch
from torch import nn


def parameter_groups(
    model: nn.Module, weight_decay: float, learning_rate_scale: Callable[[str], float] = lambda name: 1.0
) -> list[dict]:
    """
    Groups of trainable parameters: matrices with weight decay; vectors, tokens, positions and
    scalars without.

    Args:
        learning_rate_scale: name of a parameter -> its share of the learning rate; parameters of different shares are
            in different groups, whose `learning_rate_scale` `set_learning_rate` multiplies by.
    """
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Tokens (1, 1, D) and learned positions (1, t, D) are vectors.
            is_matrix = parameter.ndim > 1 and 1 not in (parameter.shape[0], parameter[0].numel())
            scale = learning_rate_scale(name)
            group = {
                "params": [],
                "weight_decay": weight_decay if is_matrix else 0.0,
                "learning_rate_scale": scale,
            }
            groups.setdefault((scale, not is_matrix), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def layer_decay_scale(name: str, num_layers: int, layer_decay: float) -> float:
    """
    Share of the learning rate of an encoder's parameter, by depth as in BEiT (layer-wise decay; Table 2 cites it): 1
    for what follows the layers (final norm, classifier), `layer_decay` for the last layer, one factor more for each
    layer below, and `layer_decay ** (num_layers + 1)` for the embeddings.
    """
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if layer:
        return layer_decay ** (num_layers - int(layer.group(1)))
    return layer_decay ** (num_layers + 1) if "embeddings." in name else 1.0


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
    """Gives every group `peak * factor`, times its `learning_rate_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = peak * factor * group.get("learning_rate_scale", 1.0)
