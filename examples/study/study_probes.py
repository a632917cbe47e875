"""Probes of the study: three readings of an encoder's tokens, with all labels and with parts of them."""

import os
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from study_results import POOLINGS
from torch.nn import functional as F

from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.samples.views import ViewDataset
from vicmae_hf.data.sources.labelled import LabelledSource, open_labelled
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.feature_table import LabelledFeatures, nearest_neighbour_scores
from vicmae_hf.evaluation.features import build_feature_views, embed_views
from vicmae_hf.evaluation.metrics.accuracy import accuracy
from vicmae_hf.evaluation.probes import balanced_subset, probe_accuracy
from vicmae_hf.files import read_json, write_json
from vicmae_hf.image_processing_vicmae import ViCMAEImageProcessor
from vicmae_hf.modeling_vicmae import ViCMAEModel


NUM_FOLDS = 4
# Frames in a forward pass.
BATCH_SIZE = 256
# Frames as raw pixels are averaged to this many rows and columns: about as many numbers as an encoder's features.
PIXEL_GRID = 16


class HeldViews(torch.utils.data.Dataset):
    """
    Keeps the views of a small dataset in memory once they were read, because encoders that come one after the other
    look at the same files. Load it in the process itself (`num_workers=0`): the memory of a worker is lost with the
    worker.
    """

    def __init__(self, dataset: ViewDataset):
        self.dataset = dataset
        self.source = dataset.source
        self.protocols = dataset.protocols
        self.max_views = dataset.max_views
        self.normalize = dataset.normalize
        self.items: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self.items:  # unreadable items are kept as well: the decoder would fail again
            self.items[index] = self.dataset[index]
        return self.items[index]


class StudyProbes:
    """
    Linear probes of frozen features, by the same frames and the same parts of the labels for every encoder.

    The frames are read once, when they are first needed, and held in memory. All processes call the methods: they
    share the work of the encoders.

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
        self.accelerator = Accelerator()
        self.train_data = train_data
        self.eval_data = eval_data
        self.processor = processor
        self.loader = loader
        self.num_frames = num_frames
        self.label_fractions = list(label_fractions)
        self.num_subsets = num_subsets

    @cached_property
    def train(self) -> HeldViews:
        return self._open(open_labelled(self.train_data))

    @cached_property
    def evaluation(self) -> HeldViews:
        return self._open(open_labelled(self.eval_data, self.train.source.class_names))

    def _open(self, source: LabelledSource) -> HeldViews:
        return HeldViews(
            build_feature_views(source, self.processor, self.loader, pooling="frame", num_frames=self.num_frames)
        )

    def embed(self, views: HeldViews, embed: Callable[[torch.Tensor], torch.Tensor]) -> LabelledFeatures:
        """What `embed` makes of every frame."""
        with torch.no_grad():
            features = embed_views(self.accelerator, embed, views, batch_size=BATCH_SIZE, num_workers=0, average=False)
        return LabelledFeatures.of(features, views.source)

    def pooled(self, model: ViCMAEModel, views: HeldViews) -> dict[str, LabelledFeatures]:
        """Features of an encoder, by pooling (see `pool_tokens`)."""
        model = model.to(self.accelerator.device).eval()
        found = self.embed(views, lambda frames: pool_tokens(model(frames).last_hidden_state.float()))
        return dict(zip(POOLINGS, found.chunk(len(POOLINGS)), strict=True))

    def cached(self, path: str | os.PathLike, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """
        What `compute` returns, from the file of an earlier call with the same settings if there is one. All processes
        compute, the first one writes.
        """
        path = Path(path)
        settings = {
            "train_data": self.train_data,
            "eval_data": self.eval_data,
            "num_frames": self.num_frames,
            "label_fractions": self.label_fractions,
            "num_subsets": self.num_subsets,
        }
        record = read_json(path) if path.exists() else {}
        # No process may write before all have looked, or some would compute and others not.
        PartialState().wait_for_everyone()
        if record.get("settings") != settings:
            record = {"settings": settings, "result": compute()}
            if PartialState().is_main_process:
                write_json(path, record)
        PartialState().wait_for_everyone()
        return read_json(path)["result"]

    def describe(self) -> dict[str, Any]:
        """The data, in figures."""
        train, evaluation = self.embed(self.train, shrink), self.embed(self.evaluation, shrink)
        return {
            "num_classes": len(train.class_names),
            "num_train_samples": len(train.labels),
            "num_eval_samples": len(evaluation.labels),
            "num_failed": len(train.features.failures) + len(evaluation.features.failures),
            "num_labels_by_fraction": [
                len(balanced_subset(train.labels, fraction, seed=0)) for fraction in self.label_fractions
            ],
        }

    def probe(self, model: ViCMAEModel) -> dict[str, dict[str, Any]]:
        """Accuracies on the held-out files (see `probe_features`), by pooling (see `pool_tokens`)."""
        train, evaluation = self.pooled(model, self.train), self.pooled(model, self.evaluation)
        return {pooling: self.probe_features(train[pooling], evaluation[pooling]) for pooling in train}

    def probe_pixels(self) -> dict[str, Any]:
        """The same of the frames themselves, `PIXEL_GRID` x `PIXEL_GRID` pixels."""
        return self.probe_features(self.embed(self.train, shrink), self.embed(self.evaluation, shrink))

    def probe_features(self, train: LabelledFeatures, evaluation: LabelledFeatures) -> dict[str, Any]:
        """
        `top1` and `top5` in percent with all labels, `knn_top1` of the nearest neighbours, and `top1_by_fraction`, one
        figure for each of `label_fractions`, the mean over draws.
        """
        by_fraction = {
            fraction: [
                self._accuracy(train, evaluation, fraction, seed)
                for seed in range(1 if fraction == 1 else self.num_subsets)
            ]
            for fraction in self.label_fractions
        }
        votes = nearest_neighbour_scores(train, evaluation.features)
        return {
            **by_fraction[1.0][0],
            "knn_top1": accuracy(votes, evaluation.labels)["top1"],
            "top1_by_fraction": [statistics.fmean(draw["top1"] for draw in draws) for draws in by_fraction.values()],
        }

    def _accuracy(
        self, train: LabelledFeatures, evaluation: LabelledFeatures, fraction: float, seed: int
    ) -> dict[str, float]:
        return probe_accuracy(train.select(balanced_subset(train.labels, fraction, seed)), evaluation, seed)

    def cross_validate(self, model: ViCMAEModel) -> dict[str, dict[str, float]]:
        """
        `top1` in percent on held-out quarters of the training files, or halves or thirds where no class has more, by
        pooling; no held-out file is read.

        Raises:
            InputError: if no class has two training files.
        """
        return {
            pooling: {"top1": self._cross_validate(features)}
            for pooling, features in self.pooled(model, self.train).items()
        }

    def _cross_validate(self, train: LabelledFeatures) -> float:
        num_folds = min(NUM_FOLDS, int(train.labels.bincount().max()))
        if num_folds < 2:
            raise InputError(
                f"{self.train_data}: tuning needs two files of a class. Add some, or give one value for each setting."
            )
        folds = balanced_folds(train.labels, num_folds)
        return statistics.fmean(
            probe_accuracy(train.select(folds != fold), train.select(folds == fold), seed=fold)["top1"]
            for fold in range(num_folds)
        )


def pool_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """
    Tokens of frames `(F, 1 + L, D)` -> `(F, 3 * D)`, one third for each of `POOLINGS`: the class token; mean and
    standard deviation of the patch tokens. What tokens say with both signs cancels in their mean, not in their
    deviation.
    """
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1), tokens[:, 1:].std(1)], dim=-1)


def shrink(frames: torch.Tensor) -> torch.Tensor:
    """Frames `(F, 3, H, W)` -> `(F, 3 * PIXEL_GRID ** 2)`, averages of their parts."""
    return F.adaptive_avg_pool2d(frames, PIXEL_GRID).flatten(1)


def balanced_folds(labels: torch.Tensor, num_folds: int) -> torch.Tensor:
    """The fold of each sample, `(N,)`: every class is spread evenly over the folds."""
    folds = torch.empty_like(labels)
    generator = torch.Generator().manual_seed(0)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        folds[members[torch.randperm(len(members), generator=generator)]] = torch.arange(len(members)) % num_folds
    return folds
