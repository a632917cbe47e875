"""Reading of image files."""

import io
import struct
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from ..errors import MediaDecodingError


class ImageDecodingError(MediaDecodingError):
    """An image could not be read; the message names it and says why."""


class ImageReader:
    """An image, as a video of one frame (see `MediaReader`)."""

    timestamps = np.zeros(1)
    duration = 0.0
    num_frames = 1

    def __init__(self, source: str | bytes):
        self.image = read_image(source)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        self.image = None

    def get_frames(self, indices: Sequence[int]) -> torch.Tensor:
        """The image, uint8 `(len(indices), 3, H, W)`, as views of one memory."""
        return self.image.expand(len(indices), -1, -1, -1)


def read_image(source: str | bytes) -> torch.Tensor:
    """
    An image file, or the bytes of one, as uint8 RGB `(3, H, W)`, turned upright as its EXIF orientation says.

    Raises:
        ImageDecodingError: if Pillow cannot read it.
    """
    name = source if isinstance(source, str) else f"{len(source)} bytes"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow would cut 16-bit gray values off at 255.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            upright = upright.convert("RGB")
    # Pillow raises all of these on broken files, or on broken EXIF data in them.
    except (OSError, SyntaxError, TypeError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ImageDecodingError(f"{name}: {error}") from error
    return F.pil_to_tensor(upright)
