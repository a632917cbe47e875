"""How the saved processors read images and videos, and how any image becomes RGB of 8 bits.

The rule for images is the same one for training, evaluation and the processors:

- It is turned upright, as its EXIF orientation says.
- 8 bits stay as they are. Gray becomes three equal channels, palettes and CMYK become their colours.
- Transparency is left out: the colours are those that are stored. (`pipeline()` leaves it out before a processor sees
  the image, so any other rule would show one model two pictures.)
- Of a file of several pictures, `list_frames` says which are meant. An image of Pillow is the picture at which it is.
- Numbers of more bits (16 bits, 32 bits, floats) are scaled by a range, and what lies outside becomes black or white:
  "type" takes all that the type can hold: integers keep their upper eight bits, floats go from 0 to 1;
  "file" goes from the smallest to the largest number of each picture; "LOW,HIGH" is fixed. A picture with pixels that
  are no numbers (NaN) is refused.
"""

# What only some need is imported by `importlib`, in functions: the Hub's loader of custom code wants all that
# a file imports by `import`, wherever that stands.
import base64
import importlib
import io
import math
import os
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension, ImageInput, infer_channel_dimension_format, is_valid_image
from transformers.utils import logging, requires_backends
from transformers.video_utils import VideoMetadata


logger = logging.get_logger(__name__)

# Pillow knows more, among them EPS: programs, which it would have Ghostscript run, whatever the file is called.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
try:  # an extra
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()
    IMAGE_FORMATS += ("HEIF",)
# Formats whose further pictures are frames. (Those of a JPEG are previews, depths and the other eye.)
ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "TIFF", "AVIF")
# TIFF 6.0, section 8 ("NewSubfileType", whose bit 0 is a smaller copy of another picture), and "SampleFormat" in
# section 19.
SUBFILE_TYPE, BITS_PER_SAMPLE, SAMPLE_FORMAT = 254, 258, 339
SMALLER_COPY, UNSIGNED = 1, 1
# An APNG states how many pictures it has, whatever its size: a list of all that it claims would fill the memory.
MAX_PICTURES = 1_000_000
# Formats that name other files or addresses, which FFmpeg would open, wherever they are.
PLAYLISTS = {"concat", "dash", "hls", "imf", "sdp", "webm_dash_manifest"}
# Three times 8K. Some kilobytes may unpack to larger frames, and a clip of them would fill the memory.
MAX_FRAME_PIXELS = 100_000_000


def open_image(source: str | os.PathLike | bytes) -> Image.Image:
    """
    Opens a path, a URL, bytes, or bytes in base 64, at the first of its frames (`list_frames`). Raises what the HTTP
    client raises; an OSError for what is no image, a ValueError for more pixels than Pillow reads, 179 million. Damage
    raises either, or shows only when the pixels are decoded (`to_rgb`), and then raises what Pillow raises.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        httpx = importlib.import_module("httpx")  # Transformers fetches images by it
        source = httpx.get(source, follow_redirects=True).raise_for_status().content
    elif isinstance(source, str) and source.startswith("data:image/"):
        source = base64.decodebytes(source.partition(",")[2].encode())
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS)
        frames, num_left_out = list_frames(image)
        if num_left_out:
            logger.warning_once("Of TIFF files whose pages have several sizes, only the largest page is read.")
        image.seek(frames[0])
        return image
    except OSError:
        raise
    # Of kinds that nobody expects: on damaged bytes, Pillow's parsers raise nearly all that there are.
    except Exception as error:
        name = source if isinstance(source, str | os.PathLike) else "image"
        raise ValueError(f"{name}: cannot be read: {error}") from error


def list_frames(image: Image.Image) -> tuple[list[int], int]:
    """
    Lists which pictures of an opened file are the frames of a video; one, if it is a still image. Thumbnails are left
    out, and so is the picture of an animated PNG for programs that know no animations. Pages of several sizes are no
    video: then the largest of them is the image, of equals the first. Also counts the other pages of these. Raises a
    ValueError for more than MAX_PICTURES.
    """
    if image.format not in ANIMATED_FORMATS or not getattr(image, "is_animated", False):
        return [0], 0
    if image.n_frames > MAX_PICTURES:
        raise ValueError(f"it claims {image.n_frames:,} pictures, and at most {MAX_PICTURES:,} are read")
    frames = list(range(image.n_frames))
    if image.format == "PNG" and getattr(image, "default_image", False):
        return frames[1:], 0
    if image.format != "TIFF":
        return frames, 0
    pixels = {}
    sizes = set()
    for frame in frames:
        image.seek(frame)
        if not image.tag_v2.get(SUBFILE_TYPE, 0) & SMALLER_COPY:
            pixels[frame] = image.width * image.height
            sizes.add(image.size)
    image.seek(0)
    if len(sizes) > 1:
        return [max(pixels, key=pixels.get)], len(pixels) - 1
    return list(pixels) or [0], 0


def open_images(images: ImageInput):
    """Opens the paths and URLs in `images`, at any nesting. (Transformers' methods drop bits of some of them.)"""
    if isinstance(images, list | tuple):
        return [open_images(image) for image in images]
    return open_image(images) if isinstance(images, str) else images


def prepare_image(
    image: ImageInput, do_convert_rgb: bool, input_data_format: str | ChannelDimension | None, image_range: str
) -> tuple[np.ndarray, str | ChannelDimension | None]:
    """
    Makes an array or tensor of 3 channels of an image of Pillow, or of an array or tensor of 1, 3 or 4 channels.
    Returns where its channels are, too. Without `do_convert_rgb` the channels stay as they are.
    """
    if isinstance(image, Image.Image):
        # Copied, because PyTorch warns of an array that it may not write to, as Pillow's are.
        pixels = np.array(to_rgb(image, image_range) if do_convert_rgb else image)
        return pixels, ChannelDimension.LAST if do_convert_rgb else None
    image = narrow_array(image, image_range)
    if not do_convert_rgb:
        return image, input_data_format
    if input_data_format is None:
        input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
    is_last = input_data_format == ChannelDimension.LAST
    channels = [0, 0, 0] if image.shape[-1 if is_last else -3] == 1 else [0, 1, 2]
    return image[..., channels] if is_last else image[..., channels, :, :], input_data_format


def narrow_array(image, image_range: str):
    """uint16 -> uint8, of arrays and tensors. Other types stay: whether 255 or 1 is white, their user has to say."""
    return scale_numbers(np.asarray(image), image_range) if str(image.dtype).endswith("uint16") else image


def to_rgb(image: Image.Image, image_range: str = "type") -> np.ndarray:
    """
    Converts an image to uint8 (H, W, 3), upright.

    Args:
        image_range: for numbers of more than 8 bits: "type", "file" or "LOW,HIGH".

    Raises:
        ValueError: if there is no such range, the type's range holds none of the numbers, or a pixel is no number.
    """
    # First, because the upright copy no longer knows its file.
    number_type, largest = find_number_type(image), find_pgm_maximum(image, image_range)
    upright = ImageOps.exif_transpose(image)
    if number_type is None:
        return np.asarray(upright.convert("RGB"))
    numbers = np.asarray(upright).astype(number_type[0])
    if largest is not None:
        numbers = np.rint(numbers * (largest / 65535)).astype(number_type[0])
    try:
        gray = scale_numbers(numbers, image_range, number_type[1])
    except ValueError as error:
        if image.mode == "I" and image.format is None:
            raise ValueError(f"{error} If they are of 16 bits, give an image of mode I;16.") from error
        raise
    return np.repeat(gray[..., None], 3, axis=-1)


def find_pgm_maximum(image: Image.Image, image_range: str) -> int | None:
    """
    Finds the largest number that a PGM file may have, from which Pillow scales all to 65535; "LOW,HIGH" are numbers of
    the file. None where Pillow leaves the numbers as they are, or the range is another one.
    """
    if image.format != "PPM" or image.mode != "I" or image_range in ("type", "file"):
        return None
    if not image.tile:  # it says how to read the file, and is empty once that is done
        logger.warning_once(
            "image_range='LOW,HIGH': Pillow scales the numbers of a PGM to 65535 when it loads the file, and a loaded "
            "image no longer tells their maximum. Give its path, or an image that was opened and not yet loaded."
        )
        return None
    arguments = image.tile[0][3]
    return arguments[1] if isinstance(arguments, tuple) else None


def find_number_type(image: Image.Image) -> tuple[str, int] | None:
    """Finds NumPy's type of an image's numbers, and how many of its bits are used; None for 8 bits and less."""
    if image.mode == "F":
        return "float32", 32
    if not image.mode.startswith("I"):
        return None
    # Pillow opens as "I" (int32) what fits nowhere else: 16 bits of PGM, signed and 32-bit ones of TIFF.
    is_wide = image.mode == "I" and image.format != "PPM"
    tags = getattr(image, "tag_v2", {})
    bits, *_ = tags.get(BITS_PER_SAMPLE, [32 if is_wide else 16])
    sample_format, *_ = tags.get(SAMPLE_FORMAT, [UNSIGNED if tags else None])
    is_signed = is_wide and sample_format != UNSIGNED
    return f"{'' if is_signed else 'u'}int{32 if bits > 16 else 16}", bits - is_signed


def scale_numbers(numbers: np.ndarray, image_range: str = "type", bits: int | None = None) -> np.ndarray:
    """
    Scales integers or floats of any shape to uint8.

    Args:
        bits: of an integer, without its sign; default: those of its type.

    Raises:
        ValueError: as `to_rgb`.
    """
    limits = read_range(image_range)
    is_integer = np.issubdtype(numbers.dtype, np.integer)
    if not is_integer and (missing := np.isnan(numbers).mean()):
        raise ValueError(
            f"{missing:.2%} of its pixels are no numbers (NaN). Replace each by a number that says how bright it "
            "should be."
        )
    finite = numbers if is_integer else numbers[np.isfinite(numbers)]
    smallest, largest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if limits == "type":
        top = 2 ** (bits or np.iinfo(numbers.dtype).bits - (numbers.dtype.kind == "i")) - 1 if is_integer else 1
        check_type_range(smallest, largest, top)
        if is_integer:  # as Pillow reads 16-bit colours, too
            return (numbers >> max(int(top).bit_length() - 8, 0)).clip(0, 255).astype(np.uint8)
        limits = (0.0, 1.0)
    low, high = (smallest, largest) if limits == "file" else limits
    scaled = (numbers.astype(np.float64) - low) * (255 / (high - low if high > low else math.inf))
    # Infinity times 0, in a picture that has one number only, is NaN.
    return np.rint(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255)).astype(np.uint8)


def check_type_range(smallest: float, largest: float, top: int) -> None:
    """
    Warns where most grey levels stay unused, as with 12 bits in a file of 16. Raises a ValueError where nothing would
    be left to see: numbers outside of 0 to `top`, and small ones of 32 bits.
    """
    advice = "Take image_range='file' (from the smallest to the largest of each picture) or 'LOW,HIGH'."
    if smallest < -0.01 * top or largest > 1.01 * top or (top >= 2**24 and 0 < largest < top / 256):
        raise ValueError(f"its numbers go from {smallest:g} to {largest:g}, the type's from 0 to {top:g}. {advice}")
    if 0 < largest <= top / 16:
        logger.warning_once(
            "Images of more than 8 bits use less than a sixteenth of the range of their type: 16 grey levels or less "
            f"are left. {advice}"
        )


def read_range(image_range: str) -> str | tuple[float, float]:
    """Reads "type", "file" or "LOW,HIGH". Raises a ValueError for anything else."""
    if image_range in ("type", "file"):
        return image_range
    try:
        low, high = map(float, image_range.split(","))
    except (AttributeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"image_range must be type, file or LOW,HIGH with LOW below HIGH, got {image_range!r}.")
    return low, high


def prepare_frames(videos, do_convert_rgb: bool, image_range: str):
    """Checks `videos` at any nesting. Paths become strings, and PIL images arrays: else their modes would be lost."""
    if isinstance(videos, list | tuple):
        if not videos:
            raise ValueError("Expected at least one video with at least one frame, got an empty list.")
        return [prepare_frames(video, do_convert_rgb, image_range) for video in videos]
    if isinstance(videos, os.PathLike):
        return os.fspath(videos)
    if isinstance(videos, Image.Image):
        return to_rgb(videos, image_range) if do_convert_rgb else np.array(videos)
    if is_valid_image(videos) and (videos.ndim not in (3, 4, 5) or 0 in videos.shape):
        raise ValueError(
            "Expected frames (C, H, W) or (H, W, C), videos (T, C, H, W) or (T, H, W, C), or batches of videos, with "
            f"at least one frame and one pixel, got an array of shape {tuple(videos.shape)}."
        )
    return narrow_array(videos, image_range) if is_valid_image(videos) else videos


def channels_first(video, input_data_format: str | ChannelDimension | None):
    """(T, C, H, W) or (T, H, W, C) -> (T, C, H, W)."""
    torch = importlib.import_module("torch")
    channels = (1, 3, 4)
    if input_data_format is None:
        input_data_format = ChannelDimension.FIRST if video.shape[1] in channels else ChannelDimension.LAST
    # Contiguous, because torch takes no arrays with negative strides, as flipped ones have.
    frames = torch.as_tensor(np.ascontiguousarray(video) if isinstance(video, np.ndarray) else video)
    if input_data_format == ChannelDimension.LAST:
        frames = frames.permute(0, 3, 1, 2)
    if frames.shape[1] not in channels:
        raise ValueError(
            "Expected a video (T, C, H, W) or (T, H, W, C) with 1, 3 or 4 channels, got one of shape "
            f"{tuple(video.shape)}."
        )
    return frames


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


def open_container(source: str | bytes):
    """Opens a path, URL or bytes by PyAV, unless it is a playlist. Raises what PyAV raises."""
    av = importlib.import_module("av")
    return av.open(
        io.BytesIO(source) if isinstance(source, bytes) else source,
        options={"format_whitelist": ",".join(av.formats_available - PLAYLISTS)},
        metadata_errors="ignore",  # titles may be wrongly encoded
    )


def check_frame_size(stream, what: str = "its frames"):
    """Raises a ValueError, which begins with `what`, if the frames of a stream are too large to be decoded."""
    if stream.width * stream.height > MAX_FRAME_PIXELS:
        raise ValueError(
            f"{what} have {stream.width}x{stream.height} pixels, and at most {MAX_FRAME_PIXELS:,} are read"
        )


def find_stream(container, video: str):
    """Finds the video stream of a file. Raises a ValueError if there is none, or its frames are too large."""
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError(f"{video}: expected a file with a video stream, found none.")
    check_frame_size(stream, f"{video}: its frames")
    return stream


def read_video(video: str, sample_indices_fn: Callable[..., np.ndarray] | None = None) -> tuple:
    """Decodes frames of a file or URL, upright (the rotation in its metadata is applied).

    The frames are decoded in order from the first to the last wanted one. This is exact for every codec. The decoders
    of Transformers, which seek, are not (decord is a frame off on HEVC), and save nothing when the frames are spread
    over the video. (Training has a faster decoder, data/media/video.py. It does not travel to the Hub with this file.)

    Args:
        video (`str`): Path or URL.
        sample_indices_fn (`Callable`, *optional*): Called with `metadata=VideoMetadata`, returns the indices of the
            wanted frames, in any order and with repetitions. All frames if it is not given.

    Returns:
        Frames (T, 3, H, W), uint8, in the order of the indices; metadata with `frames_indices`.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if PyAV is not installed.
        ValueError: if the file holds no video, is a playlist, has frames that are too large, or cannot be decoded.
    """
    requires_backends(read_video, ["av"])
    av = importlib.import_module("av")
    torch = importlib.import_module("torch")
    sample_indices_fn = sample_indices_fn or all_frame_indices
    try:
        with open_container(video) as container:
            stream = find_stream(container, video)
            frame_rate = stream.average_rate or stream.guessed_rate
            metadata = VideoMetadata(
                # Some containers don't state their number of frames; then packets are counted.
                total_num_frames=stream.frames or sum(packet.size > 0 for packet in container.demux(stream)),
                fps=float(frame_rate) if frame_rate else None,
                video_backend="pyav",
            )
        indices = sample_indices_fn(metadata=metadata)
        frames, num_decoded = decode_frames(video, indices)
        # Headers may promise more frames than there are. Then we choose again among those that are there.
        if 0 < num_decoded <= max(indices):
            logger.warning(
                f"{video}: expected {metadata.total_num_frames} frames, found {num_decoded}; sampling those."
            )
            metadata.total_num_frames = num_decoded
            indices = sample_indices_fn(metadata=metadata)
            frames, num_decoded = decode_frames(video, indices)
    except av.error.FileNotFoundError:
        raise
    except av.error.FFmpegError as error:
        raise ValueError(f"{video}: expected a video that can be decoded, got: {error}.") from error
    if num_decoded == 0:
        raise ValueError(f"{video}: expected at least one frame, found none.")

    pixels = torch.from_numpy(np.stack([frames[index] for index in indices])).permute(0, 3, 1, 2)  # (T, 3, H, W)
    metadata.frames_indices = indices
    metadata.height, metadata.width = pixels.shape[-2:]
    if metadata.fps is not None:
        metadata.duration = metadata.total_num_frames / metadata.fps
    return pixels, metadata


def all_frame_indices(metadata: VideoMetadata) -> np.ndarray:
    return np.arange(metadata.total_num_frames)


def decode_frames(video: str, indices: np.ndarray) -> tuple[dict[int, np.ndarray], int]:
    """Decodes from the start to the last of `indices`: those frames (H, W, 3) by index, and how many were decoded."""
    wanted, last = set(indices.tolist()), max(indices)
    frames, num_decoded = {}, 0
    # Opened anew and not rewound, because streams without a container (.h264) allow no seeking.
    with open_container(video) as container:
        stream = container.streams.best("video")
        stream.thread_type = "AUTO"  # one file at a time, so it may use all cores
        for frame in container.decode(stream):
            if num_decoded in wanted:
                # Degrees anticlockwise. Cameras turn by quarters only.
                frames[num_decoded] = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)
            num_decoded += 1
            if num_decoded > last:
                break
    return frames, num_decoded
