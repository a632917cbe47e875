"""Probes the encoder's features during pretraining."""

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..data.media.reading import MediaLoader
from ..data.sources.labelled import LabelledSource
from ..errors import InputError
from ..evaluation.feature_table import LabelledFeatures, nearest_neighbour_scores, predict_blocks
from ..evaluation.features import build_feature_views, extract_embeddings
from ..evaluation.metrics.accuracy import accuracy
from ..evaluation.probes import balanced_subset, train_linear_probe
from ..image_processing_vicmae import ViCMAEImageProcessor
from ..modeling_vicmae import ViCMAEForPreTrainingOutput, ViCMAEModel


logger = get_logger(__name__)

# Few frames and epochs, because training waits: a probe tells whether features become better, not how good they are.
NUM_FRAMES = 4
NUM_EPOCHS = 30
WARMUP_EPOCHS = 3
TRAIN_SHARE = 0.8


class OnlineProbe:
    """
    Measures accuracies of a nearest-neighbour and a linear classifier on features of labelled files. Both learn from
    80 % of every class, drawn by the seed, and are tested on the others.

    Probing changes nothing in the training: the mode of the model and the state of random numbers stay as they were.

    Args:
        encoder: the part of the trained model that makes features of frames.
        source: labelled videos and images. A video's features are the mean over four frames.
        processor: for its frames.
        loader: reads the files. A file that cannot be read is left out.
        probe_steps: updates between probes; the last update is always probed.
        batch_size: frames in a forward pass.
        num_workers: loading processes, which live as long as one probe.

    Raises:
        InputError: if no class has enough files to hold one out.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        encoder: ViCMAEModel,
        source: LabelledSource,
        processor: ViCMAEImageProcessor,
        loader: MediaLoader,
        *,
        probe_steps: int,
        seed: int,
        batch_size: int,
        num_workers: int,
    ):
        self.accelerator = accelerator
        self.encoder = encoder
        self.views = build_feature_views(source, processor, loader, pooling="frame", num_frames=NUM_FRAMES)
        labels = torch.as_tensor(source.labels)
        # Drawn once: figures of different steps must be of the same files.
        self.is_training = torch.zeros(len(source), dtype=torch.bool)
        self.is_training[balanced_subset(labels, TRAIN_SHARE, seed)] = True
        if self.is_training.all():
            raise InputError(f"{source.name}: expected a class with at least 3 files, one of them to test a probe on.")
        self.probe_steps = probe_steps
        self.seed = seed
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __call__(self, step: int, is_last: bool, output: ViCMAEForPreTrainingOutput) -> dict[str, float]:
        """`probe_knn_top1` and `probe_linear_top1` in percent after `step` updates, if it is time for a probe."""
        if step % self.probe_steps and not is_last:
            return {}
        features = extract_embeddings(
            self.accelerator, self.encoder, self.views, batch_size=self.batch_size, num_workers=self.num_workers
        )
        # Features are only of files that could be read.
        samples, is_training = LabelledFeatures.of(features, self.views.source), self.is_training[features.indices]
        known, queries = samples.select(is_training), samples.select(~is_training)
        if features.failures:
            first = features.failures[0]["error"]
            logger.warning("Left out of the probe: %d unreadable files, the first: %s", len(features.failures), first)
        if len(known) < 2 or len(queries) == 0:
            logger.warning("No probe after %d updates: too few of its files could be read.", step)
            return {}
        with torch.random.fork_rng(devices=[]):  # masks of the next update must not depend on probes
            probe = train_linear_probe(known, seed=self.seed, num_epochs=NUM_EPOCHS, warmup_epochs=WARMUP_EPOCHS)
        with torch.no_grad():
            blocks = predict_blocks(lambda views: probe(views).softmax(-1), queries.features)
            scores = {
                "probe_knn_top1": nearest_neighbour_scores(known, queries.features),
                "probe_linear_top1": torch.cat(list(blocks)),
            }
        return {name: accuracy(score, queries.labels)["top1"] for name, score in scores.items()}
