"""Loads classifiers to evaluate: those of this package, and the video and image classifiers of Transformers."""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..data.samples.views import ViewDataset
from ..data.sources.labelled import read_class_names
from ..errors import InputError
from ..processors import processor_folder
from ..training.session.models import MODEL_ERRORS, NO_FOREIGN_CODE, explain


@dataclass(frozen=True)
class Classifier:
    """
    A model with its processor, its input and its classes.

    Args:
        processor: its own image or video processor.
        class_names: in the order of its outputs.
        num_frames: frames of a clip; 1 for a classifier of images.
        frames_per_second: rate of a clip; None if clips are spread over the whole video.
    """

    model: PreTrainedModel
    processor: Any
    task: Literal["image", "video"]
    class_names: list[str]
    num_frames: int
    frames_per_second: float | None


def load_classifier(name: str, label_names: str | os.PathLike | None = None) -> Classifier:
    """
    Loads a classifier from a folder or from the Hub.

    Args:
        label_names: text file of class names in the order of the model's outputs, one a line. Default: the names in
            the model's config.

    Raises:
        InputError: if there is no such checkpoint, it is no classifier, lacks weights or class names, or has another
            number of them.
    """
    if os.path.isfile(name):
        raise InputError(f"{name}: is a file; give the folder of a classifier, with its config.json, or a Hub name.")
    # Configuration first: a wrong kind of model is reported before gigabytes of weights are downloaded.
    try:
        config = AutoConfig.from_pretrained(name, **NO_FOREIGN_CODE)
        task = classification_task(name, config)
        class_names = read_model_classes(name, config, label_names)
        model_class = AutoModelForVideoClassification if task == "video" else AutoModelForImageClassification
        model, loading = model_class.from_pretrained(name, output_loading_info=True, **NO_FOREIGN_CODE)
        processor = load_processor(name, task)
    except InputError:
        raise
    except MODEL_ERRORS as error:
        raise InputError(f"{name}: the model or its processor cannot be loaded: {explain(error)}") from error
    # Transformers only warns and fills in random weights, and the accuracy would be that of chance.
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(f"{name}: is not finetuned: {len(missing)} weights are missing, the first: {missing[0]}.")
    # V-JEPA 2 calls it frames_per_clip.
    num_frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    return Classifier(
        model=model.eval(),
        processor=processor,
        task=task,
        class_names=class_names,
        num_frames=num_frames if task == "video" else 1,
        frames_per_second=getattr(processor, "fps", None),
    )


def classification_task(name: str, config: PreTrainedConfig) -> Literal["image", "video"]:
    """Reads from a config what its model classifies. Raises an InputError if it is no classifier."""
    architecture = (config.architectures or ["none"])[0]
    for task in ("image", "video"):
        if architecture.endswith(f"For{task.capitalize()}Classification"):
            return task
    raise InputError(f"{name}: expected a classifier of images or videos, got the architecture {architecture}.")


def load_processor(name: str, task: Literal["image", "video"]) -> Any:
    """Loads the video processor of a video model, or its image processor if it has no other."""
    if task == "image":
        return AutoImageProcessor.from_pretrained(processor_folder(name), **NO_FOREIGN_CODE)
    try:
        folder = processor_folder(name, "video_preprocessor_config.json")
        return AutoVideoProcessor.from_pretrained(folder, **NO_FOREIGN_CODE)
    except (OSError, ValueError):  # VideoMAE and others take image processors for their frames
        return AutoImageProcessor.from_pretrained(name, **NO_FOREIGN_CODE)


def read_model_classes(name: str, config: PreTrainedConfig, label_names: str | os.PathLike | None) -> list[str]:
    """Reads class names in the order of a model's outputs, from a file or its config (see `load_classifier`)."""
    if label_names is not None:
        class_names = read_class_names(label_names)
        if len(class_names) != config.num_labels:
            raise InputError(
                f"{label_names}: names {len(class_names)} classes, expected {config.num_labels} for {name}."
            )
        return class_names
    id2label = config.id2label
    missing = [index for index in range(config.num_labels) if index not in id2label]
    if missing:
        raise InputError(f"{name}: id2label of its config has no name for class {missing[0]}; give --label_names.")
    class_names = [id2label[index] for index in range(config.num_labels)]
    # Names that Transformers made up: no label of the data could be found among them.
    if all(re.fullmatch(r"LABEL_\d+", class_name) for class_name in class_names):
        raise InputError(
            f"{name}: its config has no class names (id2label is LABEL_0 ...). Give them with --label_names FILE, one "
            "a line in the order of the model's outputs."
        )
    twice = [class_name for class_name in class_names if class_names.count(class_name) > 1]
    if twice:
        raise InputError(f"{name}: id2label of its config has {twice[0]!r} twice; give --label_names.")
    return class_names


@torch.no_grad()
def check_fit(model: PreTrainedModel, dataset: ViewDataset) -> None:
    """Raises an InputError if a model cannot take the views of a dataset, before any file of it is read."""
    # Not square, because a processor that does not crop would give other shapes than for squares.
    frames = torch.zeros(dataset.num_frames, 3, 64, 96, dtype=torch.uint8)
    view = dataset.preprocess(frames, 1).to(model.device, model.dtype)
    view = view if dataset.task == "video" else view[:, 0]  # (1, T, 3, h, w) or (1, 3, h, w)
    try:
        num_classes = model(**{model.main_input_name: view}).logits.shape[-1]
    except (ValueError, RuntimeError) as error:
        raise InputError(f"The model cannot take views of shape {tuple(view.shape[1:])}: {error}") from error
    if num_classes != model.config.num_labels:
        raise InputError(f"The model has {num_classes} outputs, and its config {model.config.num_labels} classes.")
