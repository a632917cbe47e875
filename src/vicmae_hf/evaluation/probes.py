"""Probes of a frozen encoder: features of labelled files, and a linear classifier on them (Table 3)."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import set_seed

from ..data.media.reading import MediaLoader
from ..data.sources.labelled import LabelledSource, spread_frames
from ..errors import InputError, MediaDecodingError
from ..image_processing_vicmae import ViCMAEImageProcessor
from ..modeling_vicmae import ViCMAEModel
from ..training.optimization import learning_rate_factor, scaled_learning_rate, set_learning_rate
from .features import nearest_neighbour_scores


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledFrames:
    """
    Preprocessed frames of labelled files.

    Args:
        pixel_values: `(N, F, 3, H, W)`, F frames of each file (an image is repeated).
        labels: `(N,)`.
        class_names: of the labels.
        num_failed: files that could not be read and are left out.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    class_names: list[str]
    num_failed: int


def read_labelled_frames(
    source: LabelledSource, processor: ViCMAEImageProcessor, num_frames: int, loader: MediaLoader
) -> LabelledFrames:
    """
    Reads `num_frames` frames of every item, evenly spread over a video. For sets that fit into memory.

    Raises:
        InputError: if no item can be read.
    """
    pixel_values, labels = [], []
    for index in tqdm(range(len(source)), desc="reading frames"):
        try:
            frames = loader.read_frames(source[index], spread_frames(num_frames))
        except MediaDecodingError as error:
            logger.warning("Left out: %s", error)
            continue
        pixel_values.append(processor(list(frames), return_tensors="pt").pixel_values)
        labels.append(source.labels[index])
    if not labels:
        raise InputError(f"None of {len(source)} files could be read; the first: {source[0].name}")
    return LabelledFrames(
        torch.stack(pixel_values), torch.tensor(labels), source.class_names, len(source) - len(labels)
    )


@torch.no_grad()
def extract_features(model: ViCMAEModel, pixel_values: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """Frames `(N, F, 3, H, W)` -> `pooler_output` of each, `(N, F, D)`, on the CPU."""
    model.eval()
    frames = pixel_values.flatten(0, 1).split(batch_size)
    features = [model(batch.to(model.device)).pooler_output.float().cpu() for batch in frames]
    return torch.cat(features).unflatten(0, pixel_values.shape[:2])


def train_linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    *,
    seed: int,
    num_epochs: int = 90,
    warmup_epochs: int = 10,
    base_learning_rate: float = 0.1,
    batch_size: int = 256,
) -> nn.Module:
    """
    A linear classifier on features `(N, D)`, after a batch norm without affine parameters; SGD with momentum 0.9,
    cosine decay, no weight decay (Table 3, at a smaller batch).
    """
    generator = torch.Generator().manual_seed(seed)
    probe = nn.Sequential(nn.BatchNorm1d(features.shape[1], affine=False), nn.Linear(features.shape[1], num_classes))
    nn.init.normal_(probe[1].weight, std=0.01, generator=generator)
    nn.init.zeros_(probe[1].bias)
    batch_size = min(batch_size, len(features))
    peak = scaled_learning_rate(base_learning_rate, batch_size)
    optimizer = torch.optim.SGD(probe.parameters(), lr=peak, momentum=0.9)
    steps_per_epoch = len(features) // batch_size
    num_steps = num_epochs * steps_per_epoch
    probe.train()
    for step in range(num_steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(features), generator=generator)
        start = step % steps_per_epoch * batch_size
        batch = order[start : start + batch_size]
        set_learning_rate(optimizer, peak, learning_rate_factor(step, warmup_epochs * steps_per_epoch, num_steps))
        optimizer.zero_grad()
        F.cross_entropy(probe(features[batch]), labels[batch]).backward()
        optimizer.step()
    return probe.eval()


@torch.no_grad()
def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Percentage of samples whose label is among the `k` largest of `scores` `(N, classes)`."""
    hits = scores.topk(min(k, scores.shape[1])).indices == labels[:, None]
    return 100 * hits.any(1).float().mean().item()


def balanced_subset(labels: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """
    Indices of a random `fraction` of every class, at least one of each. Nested: with the same seed a smaller fraction
    is a part of a larger one.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        count = max(round(fraction * len(members)), 1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen)


def probe_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    eval_features: torch.Tensor,
    eval_labels: torch.Tensor,
    num_classes: int,
    seed: int,
) -> dict[str, float]:
    """
    `top1` and `top5` in percent on held-out files, from features `(N, F, D)` of F frames of each file. The classifier
    learns from single frames; the probabilities of a file's frames are averaged.
    """
    probe = train_linear_probe(
        train_features.flatten(0, 1), train_labels.repeat_interleave(train_features.shape[1]), num_classes, seed=seed
    )
    with torch.no_grad():
        probabilities = probe(eval_features.flatten(0, 1)).softmax(-1).unflatten(0, eval_features.shape[:2]).mean(1)
    return {f"top{k}": top_k_accuracy(probabilities, eval_labels, k) for k in (1, 5)}


def linear_probe(
    model: ViCMAEModel, train: LabelledFrames, evaluation: LabelledFrames, seeds: Sequence[int]
) -> list[dict[str, float]]:
    """
    The accuracies of `probe_accuracy`, and as `knn_top1` that of the nearest neighbours of the mean over a file's
    frames, once a seed. Each seed learns from its own random 80 % of every class's training files, so that the spread
    tells how much depends on which files were labelled.
    """
    train_features = extract_features(model, train.pixel_values)
    eval_features = extract_features(model, evaluation.pixel_values)
    results = []
    for seed in seeds:
        chosen = balanced_subset(train.labels, 0.8, seed)
        features, labels, num_classes = train_features[chosen], train.labels[chosen], len(train.class_names)
        accuracies = probe_accuracy(features, labels, eval_features, evaluation.labels, num_classes, seed)
        votes = nearest_neighbour_scores(features.mean(1), labels, eval_features.mean(1), num_classes)
        results.append(accuracies | {"knn_top1": top_k_accuracy(votes, evaluation.labels, 1)})
    return results


def probe_beside_untrained(
    model: ViCMAEModel, train: LabelledFrames, evaluation: LabelledFrames, num_seeds: int
) -> dict[str, Any]:
    """
    `linear_probe` of an encoder with the seeds 0, 1, ..., and of as many encoders of its kind with random weights.

    Returns:
        `eval_top1`, `eval_top5`, `eval_knn_top1`, means in percent, and `eval_top1_spread`, standard deviation; the
        same with `untrained_` before them; numbers of classes and files; each probe under `runs`.
    """
    untrained = []
    for seed in range(num_seeds):
        set_seed(seed)
        untrained += linear_probe(ViCMAEModel(model.config), train, evaluation, [seed])
    runs = {"pretrained": linear_probe(model, train, evaluation, range(num_seeds)), "untrained": untrained}
    results = {}
    for prefix, probes in zip(("", "untrained_"), runs.values(), strict=True):
        for name in ("top1", "top5", "knn_top1"):
            results[f"{prefix}eval_{name}"] = statistics.fmean(probe[name] for probe in probes)
        top1 = [probe["top1"] for probe in probes]
        results[f"{prefix}eval_top1_spread"] = statistics.stdev(top1) if num_seeds > 1 else 0.0
    return results | {
        "num_classes": len(train.class_names),
        "num_train_samples": len(train.labels),
        "num_eval_samples": len(evaluation.labels),
        "num_failed": train.num_failed + evaluation.num_failed,
        "runs": runs,
    }
