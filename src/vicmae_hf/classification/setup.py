"""Opens what a classifier is trained from: labelled data, a model with one output per class, processors."""

import contextlib
import logging

import numpy as np
from torch import nn

from ..command_line import parse_config_overrides
from ..configuration_vicmae import ViCMAEConfig
from ..convert_checkpoint import own_checkpoint
from ..data.media.reading import MediaItem
from ..data.samples.label_fraction import select_label_fraction
from ..data.sources.frame_store import StoredItem
from ..data.sources.labelled import LabelledSource, match_labels, open_labelled, read_class_names, with_class_names
from ..errors import InputError, MediaDecodingError
from ..evaluation.prediction import is_multi_label
from ..image_processing_vicmae import ViCMAEImageProcessor
from ..modeling_vicmae import ViCMAEForImageClassification, ViCMAEForVideoClassification
from ..processors import build_processors, read_image_range
from ..settings import ArgumentsError
from ..training.session.models import MODEL_ERRORS, build_model, explain
from ..video_processing_vicmae import ViCMAEVideoProcessor
from .arguments import ClassificationArguments


logger = logging.getLogger(__name__)

MODEL_CLASSES = {"image": ViCMAEForImageClassification, "video": ViCMAEForVideoClassification}


def open_sources(arguments: ClassificationArguments) -> tuple[LabelledSource, LabelledSource]:
    """
    Opens training and evaluation data with the same class indices. The indices are those of `--label_names`, else of
    the checkpoint's classifier if its training goes on, else of the training data.

    Raises:
        InputError: if a source cannot be opened; if a class is missing in the label names, the checkpoint's classifier
            or, of the evaluation data, in the training data; if the number of classes differs from the
            classifier's; if samples are not what `--task` classifies; if `--label_fraction` leaves out a class.
    """
    if arguments.image_range is None:
        arguments.image_range = read_image_range(arguments.model_name_or_path)
    names = None if arguments.label_names is None else read_class_names(arguments.label_names)
    owner = f"--label_names {arguments.label_names}"
    train_source = open_labelled(arguments.train_data[0], names, owner, arguments)
    kept = kept_classifier(arguments)
    if kept is not None:
        train_source = fit_to_classifier(train_source, kept, arguments.model_name_or_path, names is not None)
    if not train_source.has_names:
        train_source = take_eval_names(
            train_source, open_labelled(arguments.eval_data, settings=arguments.of_evaluation)
        )
    if len(train_source.class_names) < 2:
        raise InputError(f"{train_source.name}: expected at least 2 classes, got {train_source.class_names}.")
    # With the indices of training, whatever folders the evaluation data has.
    names = train_source.class_names
    eval_source = open_labelled(arguments.eval_data, names, "the training data", arguments.of_evaluation)
    owner = f"{train_source.name}, the training data,"
    eval_source = match_labels(eval_source, train_source.is_multi_label, owner)
    for source in (train_source, eval_source):
        check_task(source, arguments.task)
    # After the classes are known: evaluation needs all of them, whatever part of the labels is trained on.
    if arguments.label_fraction is not None:
        train_source = select_label_fraction(train_source, arguments.label_fraction, arguments.seed)
    return train_source, eval_source


def take_eval_names(source: LabelledSource, evaluation: LabelledSource) -> LabelledSource:
    """
    Names the classes of training data that has only indices, as the evaluation data names its own. Raises an
    InputError if these are more or fewer.
    """
    names = evaluation.class_names
    if not evaluation.has_names or set(names) <= set(source.class_names):
        return source
    if len(names) != len(source.class_names):
        raise InputError(
            f"{source.name}: its labels are the indices 0 to {len(source.class_names) - 1}, and {evaluation.name} has "
            f"{len(names)} classes with names. Give the names in the order of the indices: --label_names FILE."
        )
    shown = ", ".join(f"{index} {name}" for index, name in enumerate(names[:5])) + (", ..." if len(names) > 5 else "")
    logger.warning("%s: its class indices are taken to be those of %s: %s.", source.name, evaluation.name, shown)
    return with_class_names(source, names, "the evaluation data")


def kept_classifier(arguments: ClassificationArguments) -> ViCMAEConfig | None:
    """Reads the config of a finetuned checkpoint whose classifier is trained on; None if it starts anew."""
    if arguments.model_name_or_path is None or arguments.new_classifier or arguments.method == "linear":
        return None
    changes = parse_config_overrides(ViCMAEConfig, arguments.config_overrides)
    try:
        with own_checkpoint(arguments.model_name_or_path, changes) as folder:
            config = ViCMAEConfig.from_pretrained(folder)
    except MODEL_ERRORS as error:
        raise ArgumentsError(f"--model_name_or_path {arguments.model_name_or_path}: {explain(error)}") from error
    if not any("Classification" in name for name in config.architectures or []):
        return None
    return config


def fit_to_classifier(
    source: LabelledSource, config: ViCMAEConfig, checkpoint: str, names_are_given: bool
) -> LabelledSource:
    """
    Turns labels into indices, or targets, of a checkpoint's classifier. A classifier without names takes those of the
    data.
    """
    source = match_labels(source, is_multi_label(config), f"the classifier of {checkpoint} (see --new_classifier)")
    known = [config.id2label[index] for index in range(config.num_labels)]
    hint = "Use data of the same classes, or --new_classifier to learn others."
    # Transformers calls classes LABEL_0, LABEL_1, ... if nobody named them.
    is_named = known != [f"LABEL_{index}" for index in range(len(known))]
    if not is_named and len(source.class_names) != len(known):
        raise InputError(
            f"{source.name}: {len(source.class_names)} classes, but the classifier of {checkpoint} has {len(known)}. "
            f"{hint}"
        )
    if not is_named:
        return source
    if names_are_given and source.class_names != known:
        raise InputError(
            f"--label_names: {len(source.class_names)} names that differ from the {len(known)} of the classifier of "
            f"{checkpoint}. Leave them out, or give --new_classifier."
        )
    try:
        return with_class_names(source, known, f"the classifier of {checkpoint}")
    except InputError as error:
        raise InputError(f"{error} {hint}") from error


def check_task(source: LabelledSource, task: str) -> None:
    """Raises an InputError if the first sample of a class is an image where videos are classified, or the reverse."""
    # One of each class: to ask millions of rows would take long, and mixtures come by whole folders.
    labels = source.labels
    for index in labels.argmax(0) if source.is_multi_label else np.unique(labels, return_index=True)[1]:
        item = source[int(index)]
        if task not in possible_tasks(item, task):
            kind = "an image" if task == "video" else "a video"
            raise InputError(f"{source.name}: --task {task} classifies {task}s, but {item.name} is {kind}.")


def possible_tasks(item: MediaItem, task: str) -> set[str]:
    """The tasks that an item may be of. Files are opened only where their name does not tell."""
    if isinstance(item, StoredItem):
        # A store has lists of frames. A list of one may be an image or a very short video; a damaged row has none.
        is_clip = item.frames.is_valid and len(item.frames) > 1
        return {"video"} if is_clip else {"image", "video"}
    if item.is_video or task == "image":
        return {"video" if item.is_video else "image"}
    with contextlib.suppress(MediaDecodingError), item.open("pyav") as reader:
        return {"video"} if reader.num_frames > 1 else {"image"}  # an animation has the extension of an image
    return {"image"}


def build_classifier(
    arguments: ClassificationArguments, class_names: list[str], is_multi_label: bool = False
) -> ViCMAEForImageClassification:
    """
    Builds the model, with one output for each class, of which an item has one or, with `is_multi_label`, several.

    Raises:
        ArgumentsError: if there is no such checkpoint, or the settings do not fit together.
    """
    settings = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "problem_type": f"{'multi' if is_multi_label else 'single'}_label_classification",
        "drop_path_rate": arguments.drop_path_rate,
    }
    if arguments.num_frames is not None:
        settings["num_frames"] = arguments.num_frames
    is_new = arguments.new_classifier or arguments.method == "linear"
    model_class = MODEL_CLASSES[arguments.task]
    model = build_model(model_class, arguments, replaced="classifier." if is_new else None, **settings)
    if is_new:  # also where the checkpoint's classifier has the same shape by chance
        nn.init.xavier_uniform_(model.classifier.weight)
        nn.init.zeros_(model.classifier.bias)
    return model


def build_classifier_processors(
    config: ViCMAEConfig, arguments: ClassificationArguments
) -> tuple[ViCMAEImageProcessor, ViCMAEVideoProcessor]:
    """Builds the processors of a model. The video processor samples frames as in training."""
    image_processor, video_processor = build_processors(config, arguments.image_range)
    video_processor.do_sample_frames = True
    video_processor.num_frames = config.num_frames
    video_processor.fps = arguments.frames_per_second or None
    return image_processor, video_processor
