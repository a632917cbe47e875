"""Tiny checkpoints of all kinds on disk, with their processors."""

import torch
from tiny_models import shake, tiny_config

from vicmae_hf.processors import build_processors


CLASS_NAMES = ["ant", "bee", "cow"]
LABELS = {
    "id2label": dict(enumerate(CLASS_NAMES)),
    "label2id": {name: index for index, name in enumerate(CLASS_NAMES)},
}
# ImageNet's, of the processors.
PIXELS_MEAN, PIXELS_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def save(folder, model_class, **settings):
    torch.manual_seed(0)
    model = shake(model_class(tiny_config(**LABELS, **settings))).eval()
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.save_pretrained(folder)
    return model
