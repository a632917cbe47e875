"""Builds the processors that are saved beside a model, and reads what a saved one says."""

import os
from pathlib import Path

from ..configuration_vicmae import ViCMAEConfig
from ..image_processing_vicmae import ViCMAEImageProcessor
from ..video_processing_vicmae import ViCMAEVideoProcessor


def processor_folder(checkpoint: str, name: str = "preprocessor_config.json") -> str:
    """
    Where a checkpoint's processors are: in its own folder, or for a training's `checkpoint-N`, and the best model in
    it (`checkpoint-N/best`), in the training's.
    """
    folder = Path(checkpoint).resolve()
    of_training = folder.parent if folder.name == "best" else folder
    is_of_training = of_training.name.startswith("checkpoint-") and not (folder / name).exists()
    return str(of_training.parent) if is_of_training and (of_training.parent / name).is_file() else checkpoint


def read_image_range(checkpoint: str | None) -> str:
    """Reads the `image_range` of a checkpoint's image processor; "type" if it has none, as one to go on from."""
    if checkpoint is None or os.path.isfile(checkpoint):  # a file of weights alone
        return "type"
    try:
        return ViCMAEImageProcessor.from_pretrained(processor_folder(checkpoint)).image_range
    except OSError:
        return "type"


def build_processors(
    config: ViCMAEConfig, image_range: str = "type"
) -> tuple[ViCMAEImageProcessor, ViCMAEVideoProcessor]:
    """
    Builds image and video processor for a model's image size: a centre crop of an image 256 / 224 as large. They read
    images of more than 8 bits as training does, by `image_range`.
    """
    # 256 / 224 is the margin of ImageNet evaluations, kept for other sizes: the crop shows the same part of an image.
    height, width = config.image_height_and_width
    sizes = {
        "size": {"shortest_edge": round(max(height, width) * 256 / 224)},
        "crop_size": {"height": height, "width": width},
        "image_range": image_range,
    }
    return ViCMAEImageProcessor(**sizes), ViCMAEVideoProcessor(**sizes)
