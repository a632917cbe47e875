"""Deterministic preprocessing of images: short side to 256, centre crop of 224, ImageNet normalisation."""

import numpy as np
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs


class ViCMAEImageProcessorKwargs(ImagesKwargs, total=False):
    """
    image_range (`str`): Range of numbers of more than 8 bits that is scaled to 0..255: "type", "file" or "LOW,HIGH".
    """

    image_range: str


class ViCMAEImagePreprocessing:
    """The settings and the input checks that both backends share.

    Images are paths, PIL images, arrays or tensors with 1, 3 or 4 channels, one or a list of them. They become RGB of
    8 bits by the rule of `media_reading_vicmae.py`: gray becomes three channels, transparency is left out, numbers
    of 16 bits, 32 bits and floats are scaled by `image_range` (of arrays only uint16; others stay as they are).
    The output `pixel_values` is (B, 3, H, W), float32.

    Raises:
        ValueError: for an empty input, an image without pixels, or one without 1, 3 or 4 channels.
    """

    valid_kwargs = ViCMAEImageProcessorKwargs
    image_range = "type"
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
        # Here and below inside of functions, so that importing the package loads only what training reads.
        from .media_reading_vicmae import check_images

        check_images(images)
        return super().preprocess(images, *args, **kwargs)

    def fetch_images(self, image_url_or_urls):
        from .media_reading_vicmae import open_images

        return open_images(image_url_or_urls)

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, image_range="type", **kwargs):
        from .media_reading_vicmae import prepare_image

        image, input_data_format = prepare_image(image, do_convert_rgb, input_data_format, image_range)
        return super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)

    def read_image(self, source) -> np.ndarray:
        """Reads a path, URL or bytes as uint8 (H, W, 3). `pipeline()` takes it as it is; it would convert a file."""
        from .media_reading_vicmae import open_image, to_rgb

        return to_rgb(open_image(source), self.image_range)

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


# With this, saved processors carry this file.
ViCMAEImageProcessor.register_for_auto_class()
ViCMAEImageProcessorPil.register_for_auto_class()

__all__ = ["ViCMAEImageProcessor", "ViCMAEImageProcessorPil"]
