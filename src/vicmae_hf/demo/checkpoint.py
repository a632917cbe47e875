"""Opens a checkpoint with all that it can do: encode, and perhaps reconstruct or classify."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from ..convert_checkpoint import own_checkpoint
from ..errors import InputError
from ..evaluation.classifier_loading import Classifier, load_classifier
from ..evaluation.features import load_encoder
from ..modeling_vicmae import ViCMAEForPreTraining, ViCMAEModel
from ..reports.baselines import with_random_weights
from ..training.session.models import MODEL_ERRORS, NO_FOREIGN_CODE, explain


@dataclass(frozen=True)
class Checkpoint:
    """
    A checkpoint in eval mode, on one device.

    Args:
        name: as the user gave it.
        encoder: its encoder.
        untrained: the same encoder with random weights.
        processor: its image processor.
        reconstructor: the encoder with its decoder; None if there is none.
        untrained_reconstructor: the same with random weights; None if there is none.
        classifier: the encoder with its classes; None if it is no classifier.
    """

    name: str
    encoder: ViCMAEModel
    untrained: ViCMAEModel
    processor: Any
    reconstructor: ViCMAEForPreTraining | None
    untrained_reconstructor: ViCMAEForPreTraining | None
    classifier: Classifier | None

    @property
    def encoders(self) -> list[ViCMAEModel]:
        return [self.encoder, self.untrained]


def open_checkpoint(name: str, label_names: str | None, device: torch.device) -> Checkpoint:
    """
    Opens any ViC-MAE, MAE or ViTMAE checkpoint.

    Args:
        label_names: file of the class names of a classifier whose config has none (see `load_classifier`).

    Raises:
        InputError: if there is no such checkpoint, it lacks weights, or names of classes.
    """
    encoder, processor = load_encoder(name, "frame")
    reconstructor = untrained_reconstructor = classifier = None
    try:
        with own_checkpoint(name) as folder:
            config = AutoConfig.from_pretrained(folder, **NO_FOREIGN_CODE)
            architecture = (config.architectures or [""])[0]
            if architecture == ViCMAEForPreTraining.__name__:
                reconstructor = load_reconstructor(folder)
            elif architecture.endswith("Classification"):
                classifier = load_classifier(folder, label_names)
    except InputError:
        raise
    except MODEL_ERRORS as error:
        raise InputError(f"{name}: the model cannot be loaded: {explain(error)}") from error
    if label_names is not None and classifier is None:
        raise InputError(f"--label_names {label_names}: {name} is no classifier; leave it out.")
    # The encoder that these hold is the same; one copy is enough.
    if reconstructor is not None:
        encoder = reconstructor.to(device).eval().vicmae
    elif classifier is not None:
        encoder = classifier.model.to(device).eval().vicmae
    encoder = encoder.to(device).eval()
    if reconstructor is not None:
        untrained_reconstructor = with_random_weights(reconstructor)
        untrained = untrained_reconstructor.vicmae
    else:
        is_video = encoder.embeddings.temporal_position_embeddings is not None
        untrained = with_random_weights(encoder, video=is_video)
    return Checkpoint(name, encoder, untrained, processor, reconstructor, untrained_reconstructor, classifier)


def load_reconstructor(folder: str) -> ViCMAEForPreTraining | None:
    """Loads encoder and decoder; None if the weights of the decoder are missing."""
    model, loading = ViCMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    # Transformers only warns, and would reconstruct by random weights.
    has_decoder = not any(name.startswith("decoder.") for name in loading["missing_keys"])
    return model if has_decoder else None
