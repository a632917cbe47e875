"""Reading of images: files, and the frames of a store."""

import contextlib
import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

from ...errors import MediaDecodingError


# Pillow knows more, among them EPS: programs, which it would have Ghostscript run, whatever the file is called.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# JPEG markers (ITU-T T.81, table B.1).
JPEG_START = b"\xff\xd8"
JPEG_START_OF_SCAN = b"\xff\xda"
JPEG_METADATA = b"\xff\xe1"  # APP1: EXIF or XMP, either of which may tell an orientation
JPEG_FILL = b"\xff\xff"


class ImageDecodingError(MediaDecodingError):
    """An image could not be read; the message names it and says why."""


class ImageReader:
    """An image as a video of one frame (see `MediaReader`), so that both go the same way."""

    timestamps = np.zeros(1)
    duration = 0.0
    num_frames = 1
    is_long = False

    def __init__(self, source: str | bytes):
        self.image = read_image(source)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        self.image = None

    def get_frames(self, indices: Sequence[int]) -> torch.Tensor:
        """Returns the image once for each index, uint8 `(len(indices), 3, H, W)`; all share one memory."""
        return self.image.expand(len(indices), -1, -1, -1)


def read_image(source: str | bytes) -> torch.Tensor:
    """Reads an image file, or its bytes, as `decode_image` does. Raises an ImageDecodingError if it cannot be read."""
    if isinstance(source, bytes):
        return decode_image(source)
    try:
        return decode_image(Path(source).read_bytes())
    except (OSError, ImageDecodingError) as error:
        raise ImageDecodingError(f"{source}: {error}") from error


def decode_image(data: bytes) -> torch.Tensor:
    """
    Decodes an image to uint8 RGB `(3, H, W)`, turned upright as its EXIF orientation says. In memory the channels are
    last: decoders write them so, and views are cut fastest from them.

    Raises:
        ImageDecodingError: if Pillow cannot read it.
    """
    try:
        if _plain_jpeg_size(data):
            # Pillow may still read what simplejpeg rejects. If it cannot, its error says why.
            with contextlib.suppress(ValueError):
                return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
        # All other formats, and JPEGs that have to be turned or are damaged.
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                # Pillow would cut 16-bit gray values off at 255.
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return F.pil_to_tensor(upright.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ImageDecodingError(f"{len(data)} bytes: in no image format of {', '.join(IMAGE_FORMATS)}") from error
    # Pillow raises all of these on broken files, or on broken EXIF data in them.
    except (OSError, SyntaxError, TypeError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ImageDecodingError(f"{len(data)} bytes: {error}") from error


def decode_jpegs(encoded: Sequence[bytes]) -> torch.Tensor | None:
    """
    Decodes JPEG images of one size to uint8 `(len(encoded), 3, H, W)`, channels last in memory. Returns None if they
    are anything else, or damaged; then `decode_image` reads them one by one, or says what is wrong.
    """
    sizes = {_plain_jpeg_size(data) for data in encoded}
    if len(sizes) != 1 or None in sizes:
        return None
    pixels = np.empty((len(encoded), *sizes.pop(), 3), dtype=np.uint8)
    try:
        for data, image in zip(encoded, pixels, strict=True):
            simplejpeg.decode_jpeg(data, buffer=image)  # to where it stays: stacking would copy every frame
    except ValueError:
        return None
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """
    Returns height and width of a JPEG for which simplejpeg, which is faster, gives the same pixels as Pillow. None for
    anything else: CMYK, pictures that have to be turned, and sizes that Pillow takes for an attack.
    """
    if not data.startswith(JPEG_START):
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if color_space in ("CMYK", "YCCK") or height * width > Image.MAX_IMAGE_PIXELS:
        return None
    return None if _may_be_turned(data) and _orientation(data) != 1 else (height, width)


def _may_be_turned(data: bytes) -> bool:
    """
    Whether a JPEG has metadata before its image data, or anything that is not understood here. Only then do we open
    it with Pillow to know its orientation, which takes longer than this look.
    """
    position = len(JPEG_START)
    while position + 4 <= len(data):
        marker = data[position : position + 2]
        if marker == JPEG_START_OF_SCAN:
            return False
        if marker[0] != 0xFF or marker in (JPEG_METADATA, JPEG_FILL):
            return True
        position += 2 + int.from_bytes(data[position + 2 : position + 4])  # the length counts itself
    return True


def _orientation(data: bytes) -> int:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
