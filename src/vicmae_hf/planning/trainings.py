"""Opens what is planned as the training itself would, with the same checks: a pretraining, or a classification."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..classification.arguments import ClassificationArguments
from ..classification.classification import Objective as ClassificationObjective
from ..classification.classification import build_view, resolve_settings
from ..classification.linear import LinearClassifier
from ..classification.setup import build_classifier, open_sources
from ..data.media.bad_files import BadFiles
from ..data.media.reading import MediaItem, MediaLoader
from ..data.samples.clips import ClipDataset
from ..data.samples.frame_choice import ClipSampling
from ..modeling_vicmae import ViCMAEForPreTraining
from ..pretraining.arguments import check_contrast
from ..pretraining.objective import Objective
from ..pretraining.presets import PresetArguments, check_mask, fit_to_data, freeze_layers
from ..pretraining.pretraining import build_frame_pairs
from ..processors import build_processors
from ..settings import ArgumentsError
from ..training.arguments import TrainingArguments
from ..training.optimization import plan_run
from ..training.session.models import build_model
from .costs import classification_flops, pretraining_flops
from .plan import Training
from .survey import Items


@contextmanager
def scratch_folder(arguments: TrainingArguments) -> Iterator[None]:
    """Puts a folder that is deleted afterwards in place of the output folder, where a plan leaves nothing."""
    before = arguments.output_dir
    with tempfile.TemporaryDirectory() as folder:
        arguments.output_dir = folder
        try:
            yield
        finally:
            arguments.output_dir = before


def open_pretraining(accelerator: Accelerator, arguments: PresetArguments, num_processes: int) -> Training:
    """Raises an ArgumentsError or InputError where the training would."""
    if arguments.streaming:
        raise ArgumentsError("--streaming: a plan reads samples in any order. Plan without it; a stream is no faster.")
    model = build_model(ViCMAEForPreTraining, arguments)
    check_mask(model.config)
    freeze_layers(model, arguments.freeze_layers)
    dataset = build_frame_pairs(accelerator, model.config, arguments)
    fit_to_data(arguments, model.config, dataset.num_samples, num_processes)
    schedule = plan_run(arguments, num_processes, dataset.num_samples)
    check_contrast(arguments, model.config, schedule)
    processor, _ = build_processors(model.config, arguments.image_range)
    is_contrastive = model.config.contrastive_loss != "none"
    start = math.ceil(arguments.contrastive_start_epoch * schedule.steps_per_epoch)
    flops = pretraining_flops(
        model.config,
        schedule.total_batch_size,
        arguments.freeze_layers or 0,
        is_contrastive and arguments.contrast_across_accumulation,
    )
    return Training(
        arguments,
        Items(dataset.sources, dataset.read_pair, dataset.num_samples),
        model,
        lambda prepared: partial(Objective(prepared, model, processor, 0.0), epoch=0.0),
        schedule,
        flops,
        model.config.num_hidden_layers + model.config.decoder_num_hidden_layers,
        start if is_contrastive else None,
    )


def open_classification(arguments: ClassificationArguments, num_processes: int) -> Training:
    """Raises an ArgumentsError or InputError where the training would."""
    if not arguments.train_augmentation:
        raise ArgumentsError("--plan: without augmentation, features are computed once; there is nothing to plan.")
    train_source, _ = open_sources(arguments)
    model = build_classifier(arguments, train_source.class_names, train_source.is_multi_label)
    resolve_settings(arguments, model.config, num_processes)
    schedule = plan_run(arguments, num_processes, len(train_source))
    view = build_view(model.config, arguments)
    loader = MediaLoader(arguments.video_backend, arguments.seconds_per_file)
    is_video, is_frozen = arguments.task == "video", arguments.method == "linear"
    sampling = ClipSampling(model.config.num_frames, arguments.frames_per_second) if is_video else None

    def read(item: MediaItem, generator: np.random.Generator) -> dict[str, Any]:
        # Of any item, also one that no source has; all have the first label.
        one = replace(train_source, items=[item], all_labels=train_source.labels[:1], indices=np.arange(1))
        return ClipDataset(one, sampling, view, BadFiles(None, 1, 1.0), loader).read_sample(0, generator)

    num_frames = model.config.num_frames if is_video else 1
    return Training(
        arguments,
        Items([train_source], read, len(train_source)),
        LinearClassifier(model) if is_frozen else model,
        lambda prepared: partial(ClassificationObjective(prepared, model.config, arguments), epoch=0.0),
        schedule,
        classification_flops(model.config, schedule.total_batch_size, num_frames, is_frozen),
        model.config.num_hidden_layers,
    )
