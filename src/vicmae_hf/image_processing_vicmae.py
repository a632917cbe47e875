"""Deterministic preprocessing of images: short side to 256, centre crop of 224, ImageNet normalisation."""

from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    is_valid_image,
)


class ViCMAEImagePreprocessing:
    """The settings and the input checks that both backends share.

    Images are paths, PIL images, arrays or tensors with 1, 3 or 4 channels, one or a list of them. Gray becomes RGB,
    transparency is blended with white. The output `pixel_values` is (B, 3, H, W), float32.

    Raises:
        ValueError: for an empty input, an image without pixels, or one that has not 1, 3 or 4 channels.
    """

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD

    def preprocess(self, images: ImageInput, *args, **kwargs):
        check_images(images)
        return super().preprocess(images, *args, **kwargs)

    def to_dict(self) -> dict:
        processor_dict = super().to_dict()
        if "AutoImageProcessor" in processor_dict.get("auto_map", {}):
            # Transformers saves one class; as a pair (PIL, torchvision) the Hub's code also runs without torchvision.
            module_name = type(self).__module__.rpartition(".")[-1]
            class_names = (ViCMAEImageProcessorPil.__name__, ViCMAEImageProcessor.__name__)
            auto_map = {"AutoImageProcessor": [f"{module_name}.{class_name}" for class_name in class_names]}
            processor_dict["auto_map"] = {**processor_dict["auto_map"], **auto_map}
        return processor_dict


class ViCMAEImageProcessor(ViCMAEImagePreprocessing, TorchvisionBackend):
    """Preprocesses images with torchvision, in batches and on any device (see `ViCMAEImagePreprocessing`)."""


class ViCMAEImageProcessorPil(ViCMAEImagePreprocessing, PilBackend):
    """Preprocesses images with PIL and NumPy, where torchvision is missing (see `ViCMAEImagePreprocessing`)."""


def check_images(images: ImageInput):
    """Checks the images in `images`, at any nesting. Transformers checks what is neither an image nor a list."""
    if isinstance(images, list | tuple):
        if not images:
            raise ValueError("Expected at least one image, got an empty list.")
        for image in images:
            check_images(image)
    elif is_valid_image(images) and hasattr(images, "shape"):
        shape = tuple(images.shape)
        if 0 in shape:
            raise ValueError(f"Expected an image with pixels, got an array of shape {shape}.")
        if len(shape) not in (3, 4) or (shape[-3] not in (1, 3, 4) and shape[-1] not in (1, 3, 4)):
            raise ValueError(
                "Expected an image (C, H, W) or (H, W, C), or a batch of them, with 1, 3 or 4 channels, got an array "
                f"of shape {shape}."
            )


# With this, saved processors carry this file.
ViCMAEImageProcessor.register_for_auto_class()
ViCMAEImageProcessorPil.register_for_auto_class()

__all__ = ["ViCMAEImageProcessor", "ViCMAEImageProcessorPil"]
