"""Trains linear probes on frozen features (Table 3)."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from ..data.samples.label_fraction import take_share
from ..data.samples.views import ViewDataset
from ..modeling_vicmae import ViCMAEModel
from ..training.optimization import learning_rate_factor, scaled_learning_rate, set_learning_rate
from .feature_table import LabelledFeatures, nearest_neighbour_scores, predict_blocks
from .features import embed_views, pooled
from .prediction import accuracy, likeliest_classes, top_k_accuracies


# The recipe of Table 3, here and in linear evaluation with random views (`classification`).
LINEAR_EPOCHS = 90
LINEAR_WARMUP_EPOCHS = 10.0
LINEAR_BASE_LEARNING_RATE = 0.1
LINEAR_MOMENTUM = 0.9


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
    samples: LabelledFeatures,
    *,
    seed: int,
    num_epochs: int = LINEAR_EPOCHS,
    warmup_epochs: float = LINEAR_WARMUP_EPOCHS,
    base_learning_rate: float = LINEAR_BASE_LEARNING_RATE,
    batch_size: int = 256,
) -> nn.Module:
    """
    Trains a linear classifier on the views of labelled items, by SGD with momentum, cosine decay and no weight decay
    (Table 3, at a smaller batch). Every view is a sample of its own. Linear evaluation with random views is in
    `classification`.
    """
    # All random numbers of a probe come from its seed, so that encoders are compared with equal luck.
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(samples.features.embeddings.shape[1], len(samples.class_names))
    probe = nn.Sequential(start_linear_head(linear, generator), linear)
    batch_size = min(batch_size, len(samples))  # full batches only, because batch norm needs them
    peak = scaled_learning_rate(base_learning_rate, batch_size)
    optimizer = build_linear_optimizer(probe.parameters())
    steps_per_epoch = len(samples) // batch_size
    num_steps = num_epochs * steps_per_epoch
    probe.train()
    for step in range(num_steps):
        if step % steps_per_epoch == 0:  # a new epoch, another order
            order = torch.randperm(len(samples), generator=generator)
        start = step % steps_per_epoch * batch_size
        features, labels = samples.take(order[start : start + batch_size])
        set_learning_rate(optimizer, peak, learning_rate_factor(step, warmup_epochs * steps_per_epoch, num_steps))
        optimizer.zero_grad()
        F.cross_entropy(probe(features), labels).backward()
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


def probe_accuracy(train: LabelledFeatures, evaluation: LabelledFeatures, seed: int) -> dict[str, float]:
    """
    Trains a probe and returns `top1` and `top5` in percent on held-out files. The classifier learns from single views;
    the probabilities of a file's views are averaged.
    """
    probe = train_linear_probe(train, seed=seed)
    with torch.no_grad():
        blocks = predict_blocks(lambda views: probe(views).softmax(-1), evaluation.features)
        classes = [likeliest_classes(block) for block in blocks]  # (n, 5) each
    return top_k_accuracies(torch.cat(classes), evaluation.labels)


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
        known = train.select(balanced_subset(train.labels, 0.8, seed))
        votes = nearest_neighbour_scores(known, evaluation.features)
        top1 = accuracy(votes, evaluation.labels)["top1"]
        results.append(probe_accuracy(known, evaluation, seed) | {"knn_top1": top1})
    return results


def embed_labelled(
    accelerator: Accelerator,
    encoders: Sequence[ViCMAEModel],
    views: ViewDataset,
    *,
    batch_size: int,
    num_workers: int,
) -> list[LabelledFeatures]:
    """
    Computes features of every view by itself, with the labels of their files, by each of several encoders in eval
    mode. Every file is read once for all of them.
    """
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    with torch.no_grad():
        features = embed_views(accelerator, pooled(accelerator, encoders), views, average=False, **loading)
    return LabelledFeatures.of(features, views.source).chunk(len(encoders))


def probe_beside_untrained(
    accelerator: Accelerator,
    model: ViCMAEModel,
    train_views: ViewDataset,
    eval_views: ViewDataset,
    num_seeds: int,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
) -> dict[str, Any]:
    """
    Runs `linear_probe` on an encoder with the seeds 0, 1, ..., and on as many encoders of its kind with random
    weights. Random weights already separate classes to some degree, so only the difference shows what was learned.

    Args:
        train_views, eval_views: single frames of labelled files.
        batch_size: frames in a forward pass.
        num_workers: processes that read files.

    Returns:
        `eval_top1`, `eval_top5`, `eval_knn_top1`, means in percent, and `eval_top1_spread`, their standard deviation;
        the same for random weights, with `untrained_` before the names; numbers of classes and files; each probe under
        `runs`; `failures`, the files that could not be read.
    """
    encoders = [model]
    for seed in range(num_seeds):
        set_seed(seed)  # of the random weights
        encoders.append(ViCMAEModel(model.config))
    encoders = [encoder.to(accelerator.device).eval() for encoder in encoders]
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    (train, *untrained_train), (evaluation, *untrained_evaluation) = (
        embed_labelled(accelerator, encoders, views, **loading) for views in (train_views, eval_views)
    )
    untrained = enumerate(zip(untrained_train, untrained_evaluation, strict=True))
    runs = {
        "pretrained": linear_probe(train, evaluation, range(num_seeds)),
        "untrained": [run for seed, features in untrained for run in linear_probe(*features, [seed])],
    }
    results = {}
    for prefix, probes in zip(("", "untrained_"), runs.values(), strict=True):
        for name in ("top1", "top5", "knn_top1"):
            results[f"{prefix}eval_{name}"] = statistics.fmean(probe[name] for probe in probes)
        top1 = [probe["top1"] for probe in probes]
        results[f"{prefix}eval_top1_spread"] = statistics.stdev(top1) if num_seeds > 1 else 0.0  # undefined for one
    failures = train.features.failures + evaluation.features.failures
    return results | {
        "num_classes": len(train.class_names),
        "num_train_samples": len(train.labels),
        "num_eval_samples": len(evaluation.labels),
        "num_failed": len(failures),
        "runs": runs,
        "failures": failures,
    }
