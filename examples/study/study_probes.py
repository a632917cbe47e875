"""Probes of the study: three readings of an encoder's tokens, with all labels and with parts of them."""

import json
import os
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.nn import functional as F

from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.probes import LabelledFrames, balanced_subset, probe_accuracy, read_labelled_frames
from vicmae_hf.files import write_json
from vicmae_hf.image_processing_vicmae import ViCMAEImageProcessor
from vicmae_hf.modeling_vicmae import ViCMAEModel


NUM_FOLDS = 4
# Frames as raw pixels are averaged to this many rows and columns: about as many numbers as an encoder's features.
PIXEL_GRID = 16


class StudyProbes:
    """
    Linear probes of frozen features, by the same frames and the same parts of the labels for every encoder.

    The frames are read once, when they are first needed, and held in memory.

    Args:
        train_data, eval_data: labelled folders or datasets.
        processor: what prepares frames for the encoders.
        loader: reads the files.
        num_frames: frames of a video.
        label_fractions: shares of every class's training files.
        num_subsets: draws of each share below 1.
    """

    def __init__(
        self,
        train_data: str,
        eval_data: str,
        processor: ViCMAEImageProcessor,
        loader: MediaLoader,
        *,
        num_frames: int,
        label_fractions: Sequence[float],
        num_subsets: int,
    ):
        self.train_data = train_data
        self.eval_data = eval_data
        self.processor = processor
        self.loader = loader
        self.num_frames = num_frames
        self.label_fractions = list(label_fractions)
        self.num_subsets = num_subsets

    @cached_property
    def train(self) -> LabelledFrames:
        source = open_labelled(self.train_data)
        return read_labelled_frames(source, self.processor, self.num_frames, self.loader)

    @cached_property
    def evaluation(self) -> LabelledFrames:
        source = open_labelled(self.eval_data, self.train.class_names)
        return read_labelled_frames(source, self.processor, self.num_frames, self.loader)

    def cached(self, path: str | os.PathLike, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """
        What `compute` returns, from the file of an earlier call with the same settings if there is one. Of several
        processes the first computes.
        """
        path = Path(path)
        settings = {
            "train_data": self.train_data,
            "eval_data": self.eval_data,
            "num_frames": self.num_frames,
            "label_fractions": self.label_fractions,
            "num_subsets": self.num_subsets,
        }
        if PartialState().is_main_process:
            record = json.loads(path.read_text()) if path.exists() else {}
            if record.get("settings") != settings:
                record = {"settings": settings, "result": compute()}
                write_json(path, record)
        PartialState().wait_for_everyone()
        return json.loads(path.read_text())["result"]

    def describe(self) -> dict[str, Any]:
        """The data, in figures."""
        train, evaluation = self.train, self.evaluation
        return {
            "num_classes": len(train.class_names),
            "num_train_samples": len(train.labels),
            "num_eval_samples": len(evaluation.labels),
            "num_failed": train.num_failed + evaluation.num_failed,
            "num_labels_by_fraction": [
                len(balanced_subset(train.labels, fraction, seed=0)) for fraction in self.label_fractions
            ],
        }

    def probe(self, model: ViCMAEModel) -> dict[str, dict[str, Any]]:
        """Accuracies on the held-out files (see `probe_features`), by pooling (see `pooled_features`)."""
        train, evaluation = (pooled_features(model, frames.pixel_values) for frames in (self.train, self.evaluation))
        return {pooling: self.probe_features(train[pooling], evaluation[pooling]) for pooling in train}

    def probe_pixels(self) -> dict[str, Any]:
        """The same of the frames themselves, `PIXEL_GRID` x `PIXEL_GRID` pixels."""
        return self.probe_features(shrink(self.train.pixel_values), shrink(self.evaluation.pixel_values))

    def probe_features(self, train_features: torch.Tensor, eval_features: torch.Tensor) -> dict[str, Any]:
        """
        Features `(N, F, D)` -> `top1` and `top5` in percent with all labels, and `top1_by_fraction`, one figure for
        each of `label_fractions`, the mean over draws.
        """
        by_fraction = {
            fraction: [
                self._accuracy(train_features, eval_features, fraction, seed)
                for seed in range(1 if fraction == 1 else self.num_subsets)
            ]
            for fraction in self.label_fractions
        }
        return {
            **by_fraction[1.0][0],
            "top1_by_fraction": [statistics.fmean(draw["top1"] for draw in draws) for draws in by_fraction.values()],
        }

    def _accuracy(
        self, train_features: torch.Tensor, eval_features: torch.Tensor, fraction: float, seed: int
    ) -> dict[str, float]:
        chosen = balanced_subset(self.train.labels, fraction, seed)
        return probe_accuracy(
            train_features[chosen],
            self.train.labels[chosen],
            eval_features,
            self.evaluation.labels,
            len(self.train.class_names),
            seed,
        )

    def cross_validate(self, model: ViCMAEModel) -> dict[str, dict[str, float]]:
        """
        `top1` in percent on held-out quarters of the training files, or halves or thirds where no class has more, by
        pooling; no held-out file is read.

        Raises:
            InputError: if no class has two training files.
        """
        labels = self.train.labels
        num_folds = min(NUM_FOLDS, int(labels.bincount().max()))
        if num_folds < 2:
            raise InputError(
                f"{self.train_data}: tuning needs two files of a class. Add some, or give one value for each setting."
            )
        folds = balanced_folds(labels, num_folds)
        return {
            pooling: {
                "top1": statistics.fmean(
                    probe_accuracy(
                        features[folds != fold],
                        labels[folds != fold],
                        features[folds == fold],
                        labels[folds == fold],
                        len(self.train.class_names),
                        seed=fold,
                    )["top1"]
                    for fold in range(num_folds)
                )
            }
            for pooling, features in pooled_features(model, self.train.pixel_values).items()
        }


@torch.no_grad()
def pooled_features(model: ViCMAEModel, pixel_values: torch.Tensor, batch_size: int = 256) -> dict[str, torch.Tensor]:
    """
    Frames `(N, F, 3, H, W)` -> features of each, `(N, F, D)`, on the CPU, by pooling: "cls", the class token; "mean"
    and "std", mean and standard deviation of the patch tokens. What tokens say with both signs cancels in their mean,
    not in their deviation.
    """
    model = model.to(PartialState().device).eval()
    pooled = {"cls": [], "mean": [], "std": []}
    for frames in pixel_values.flatten(0, 1).split(batch_size):
        tokens = model(frames.to(model.device)).last_hidden_state.float()
        pooled["cls"].append(tokens[:, 0].cpu())
        pooled["mean"].append(tokens[:, 1:].mean(1).cpu())
        pooled["std"].append(tokens[:, 1:].std(1).cpu())
    return {pooling: torch.cat(parts).unflatten(0, pixel_values.shape[:2]) for pooling, parts in pooled.items()}


def shrink(pixel_values: torch.Tensor) -> torch.Tensor:
    """Frames `(N, F, 3, H, W)` -> `(N, F, 3 * PIXEL_GRID ** 2)`, averages of their parts."""
    pixels = F.adaptive_avg_pool2d(pixel_values.flatten(0, 1), PIXEL_GRID)
    return pixels.flatten(1).unflatten(0, pixel_values.shape[:2])


def balanced_folds(labels: torch.Tensor, num_folds: int) -> torch.Tensor:
    """The fold of each sample, `(N,)`: every class is spread evenly over the folds."""
    folds = torch.empty_like(labels)
    generator = torch.Generator().manual_seed(0)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        folds[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % num_folds
    return folds
