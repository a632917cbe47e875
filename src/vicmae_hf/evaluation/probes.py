"""Trains linear probes on frozen features (Table 3)."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from ..data.sources.label_fraction import take_share
from ..data.sources.labelled import LabelledSource
from ..modeling_vicmae import ViCMAEModel
from ..training.optimization import learning_rate_factor, scaled_learning_rate, set_learning_rate
from .features import Features, HeldViews, extract_embeddings, nearest_neighbour_scores
from .prediction import accuracy


# The recipe of Table 3, here and in linear evaluation with random views (`classification`).
LINEAR_EPOCHS = 90
LINEAR_WARMUP_EPOCHS = 10.0
LINEAR_BASE_LEARNING_RATE = 0.1
LINEAR_MOMENTUM = 0.9


@dataclass(frozen=True)
class LabelledFeatures:
    """
    Features of labelled files.

    Args:
        features: `(N, V, D)`, V views of each file.
        labels: `(N,)`.
        class_names: of the labels.
        failures: `{"path", "error"}` of each file that could not be read; it is left out.
    """

    features: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    failures: list[dict[str, str]]

    @classmethod
    def of(cls, features: Features, source: LabelledSource) -> "LabelledFeatures":
        """Adds labels to features that `embed_views` made of a source without averaging them."""
        labels = torch.as_tensor(source.labels)[features.indices]
        return cls(features.embeddings, labels, source.class_names, features.failures)


def start_linear_head(linear: nn.Linear, generator: torch.Generator | None = None) -> nn.BatchNorm1d:
    """
    Gives a linear classifier of frozen features its first weights, and returns the batch norm that comes before it.
    The batch norm has no parameters. Scales of features differ from encoder to encoder, and it only brings them to one
    scale, so that one learning rate suits all (supplement, section A).
    """
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    return nn.BatchNorm1d(linear.in_features, affine=False)


def build_linear_optimizer(parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> torch.optim.SGD:
    """Builds SGD with momentum (Table 3) for parameters or groups of them. Its learning rate is still 0."""
    # Whoever trains sets the learning rate before every update. The training loop needs a fused optimizer.
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=LINEAR_MOMENTUM, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # torch would make it at the first update, and leave it unset if a gradient scaler passes over that one.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    seed: int,
    num_epochs: int = LINEAR_EPOCHS,
    warmup_epochs: float = LINEAR_WARMUP_EPOCHS,
    base_learning_rate: float = LINEAR_BASE_LEARNING_RATE,
    batch_size: int = 256,
) -> nn.Module:
    """
    Trains a linear classifier on features `(N, D)` that are held in memory, by SGD with momentum, cosine decay and no
    weight decay (Table 3, at a smaller batch). Linear evaluation with random views is in `classification`.
    """
    # All random numbers of a probe come from its seed, so that encoders are compared with equal luck.
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(features.shape[1], num_classes)
    probe = nn.Sequential(start_linear_head(linear, generator), linear)
    batch_size = min(batch_size, len(features))  # full batches only, because batch norm needs them
    peak = scaled_learning_rate(base_learning_rate, batch_size)
    optimizer = build_linear_optimizer(probe.parameters())
    steps_per_epoch = len(features) // batch_size
    num_steps = num_epochs * steps_per_epoch
    probe.train()
    for step in range(num_steps):
        if step % steps_per_epoch == 0:  # a new epoch, another order
            order = torch.randperm(len(features), generator=generator)
        start = step % steps_per_epoch * batch_size
        batch = order[start : start + batch_size]
        set_learning_rate(optimizer, peak, learning_rate_factor(step, warmup_epochs * steps_per_epoch, num_steps))
        optimizer.zero_grad()
        F.cross_entropy(probe(features[batch]), labels[batch]).backward()
        optimizer.step()
    return probe.eval()


def balanced_subset(labels: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """
    Draws a random `fraction` of every class, at least one of each: indices. With the same seed, a smaller fraction is
    a part of a larger one.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffle(label: int, members: np.ndarray) -> np.ndarray:
        return members[torch.randperm(len(members), generator=generator).numpy()]

    return torch.from_numpy(take_share(labels.numpy(), fraction, shuffle))


def probe_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    eval_features: torch.Tensor,
    eval_labels: torch.Tensor,
    num_classes: int,
    seed: int,
) -> dict[str, float]:
    """
    Trains a probe and returns `top1` and `top5` in percent on held-out files, from features `(N, V, D)` of V views of
    each file. The classifier learns from single views; the probabilities of a file's views are averaged.
    """
    # Every view is a sample of its own, (N * V, D): more samples, and nothing has to be averaged in training.
    probe = train_linear_probe(
        train_features.flatten(0, 1), train_labels.repeat_interleave(train_features.shape[1]), num_classes, seed=seed
    )
    # Probabilities and not logits: every view has the same say, however large its logits are.
    with torch.no_grad():  # (N * V, D) -> (N * V, C) -> (N, C)
        probabilities = probe(eval_features.flatten(0, 1)).softmax(-1).unflatten(0, eval_features.shape[:2]).mean(1)
    return accuracy(probabilities, eval_labels)


def linear_probe(
    train: LabelledFeatures, evaluation: LabelledFeatures, seeds: Sequence[int]
) -> list[dict[str, float]]:
    """
    Returns for each seed the accuracies of `probe_accuracy`, and as `knn_top1` the accuracy of nearest neighbours, for
    which a file's views are averaged. Each seed learns from its own random 80 % of every class's training files. So
    the spread shows how much depends on which files were labelled.
    """
    results = []
    for seed in seeds:
        chosen = balanced_subset(train.labels, 0.8, seed)
        features, labels, num_classes = train.features[chosen], train.labels[chosen], len(train.class_names)
        accuracies = probe_accuracy(features, labels, evaluation.features, evaluation.labels, num_classes, seed)
        votes = nearest_neighbour_scores(features.mean(1), labels, evaluation.features.mean(1), num_classes)
        results.append(accuracies | {"knn_top1": accuracy(votes, evaluation.labels)["top1"]})
    return results


def embed_labelled(
    accelerator: Accelerator, encoder: ViCMAEModel, views: HeldViews, batch_size: int
) -> LabelledFeatures:
    """Computes features of every view by itself, with the labels of their files."""
    features = extract_embeddings(
        accelerator,
        encoder.to(accelerator.device),
        views,
        batch_size=batch_size,
        num_workers=0,  # what workers read would be lost with them: see `HeldViews`
        average=False,
    )
    return LabelledFeatures.of(features, views.source)


def probe_beside_untrained(
    accelerator: Accelerator,
    model: ViCMAEModel,
    train_views: HeldViews,
    eval_views: HeldViews,
    num_seeds: int,
    batch_size: int = 256,
) -> dict[str, Any]:
    """
    Runs `linear_probe` on an encoder with the seeds 0, 1, ..., and on as many encoders of its kind with random
    weights. Random weights already separate classes to some degree, so only the difference shows what was learned.

    Args:
        train_views, eval_views: single frames of labelled files.
        batch_size: frames in a forward pass.

    Returns:
        `eval_top1`, `eval_top5`, `eval_knn_top1`, means in percent, and `eval_top1_spread`, their standard deviation;
        the same for random weights, with `untrained_` before the names; numbers of classes and files; each probe under
        `runs`; `failures`, the files that could not be read.
    """
    train, evaluation = (embed_labelled(accelerator, model, views, batch_size) for views in (train_views, eval_views))
    runs = {"pretrained": linear_probe(train, evaluation, range(num_seeds)), "untrained": []}
    for seed in range(num_seeds):
        set_seed(seed)  # of the random weights
        encoder = ViCMAEModel(model.config)
        features = (embed_labelled(accelerator, encoder, views, batch_size) for views in (train_views, eval_views))
        runs["untrained"] += linear_probe(*features, [seed])
    results = {}
    for prefix, probes in zip(("", "untrained_"), runs.values(), strict=True):
        for name in ("top1", "top5", "knn_top1"):
            results[f"{prefix}eval_{name}"] = statistics.fmean(probe[name] for probe in probes)
        top1 = [probe["top1"] for probe in probes]
        results[f"{prefix}eval_top1_spread"] = statistics.stdev(top1) if num_seeds > 1 else 0.0  # undefined for one
    failures = train.failures + evaluation.failures
    return results | {
        "num_classes": len(train.class_names),
        "num_train_samples": len(train.labels),
        "num_eval_samples": len(evaluation.labels),
        "num_failed": len(failures),
        "runs": runs,
        "failures": failures,
    }
