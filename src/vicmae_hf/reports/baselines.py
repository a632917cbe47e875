"""What there is without learning: values of the figures, the dashed lines of the plots, and random weights."""

import math
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from ..configuration_vicmae import ViCMAEConfig


Model = TypeVar("Model", bound=PreTrainedModel)

# Values of figures by their names, and what gives these values.
Baselines = dict[str, tuple[float, str]]


def pretraining_baselines(config: ViCMAEConfig, num_compared: int) -> Baselines:
    """
    Losses of pretraining without learning; none where they depend on the data.

    Args:
        num_compared: samples that are compared with one another, those of all processes.
    """
    baselines = {}
    if config.norm_pix_loss:  # a patch then has mean 0 and variance 1
        baselines["reconstruction_loss"] = (1.0, "mean of each patch")
    # With all similarities equal, a view's partner is one of the N views of the other kind, in the objective of
    # Algorithm 1, which has two cross entropies, each twice; or one of the 2 N - 1 other views.
    chance = {"info_nce": 4 * math.log(num_compared), "nt_xent": math.log(2 * num_compared - 1), "simsiam": 4.0}
    if config.contrastive_loss in chance:
        name = "orthogonal views" if config.contrastive_loss == "simsiam" else f"chance, {num_compared} samples"
        baselines["contrastive_loss"] = (chance[config.contrastive_loss], name)
    return baselines


def classification_baselines(labels: np.ndarray) -> Baselines:
    """
    Figures in percent of a classifier that says the same of every item, whatever it shows.

    Args:
        labels: of the items, `(N,)`, or targets `(N, C)` where an item may have several.
    """
    if labels.ndim == 2:
        shares = labels.mean(0)  # the precision of a class that is found everywhere
        return {"eval_map": (100 * float(shares[shares > 0].mean()), "chance: the same scores for all")}
    shares = np.sort(np.unique(labels, return_counts=True)[1])[::-1] / len(labels)
    return {
        "eval_top1": (100 * float(shares[0]), "chance: the most frequent class"),
        "eval_top5": (100 * float(shares[:5].sum()), "chance: the five most frequent classes"),
    }


def with_random_weights(model: Model, seed: int = 0, **options: Any) -> Model:
    """Builds the same model on the same device, with random weights, in eval mode. `options` go to its class."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which would seed the GPUs, too
        return type(model)(model.config, **options).to(model.device, model.dtype).eval()
