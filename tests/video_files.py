"""Small encoded videos for the tests, every frame of which carries its own number in its pixels, and small images."""

from fractions import Fraction

import av
import numpy as np
import torch
from PIL import Image


NUMBER_OF_BITS = 8


def numbered_frames(count: int, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
    """Frames (T, H, W, 3), uint8: the upper half holds the frame's number, modulo 256, as eight black or white strips;
    in the lower half a coloured texture moves, so that encoders find a use for B-frames."""
    texture = np.random.default_rng(seed).integers(40, 200, (height, width // 8 + 1, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=1)[:, :width]
    frames = np.stack([np.roll(texture, 2 * index, axis=1) for index in range(count)])
    strips = np.arange(width) * NUMBER_OF_BITS // width
    for index in range(count):
        frames[index, : height // 2] = 255 * ((index >> strips & 1)[None, :, None])
    return frames


def read_numbers(frames: torch.Tensor) -> list[int]:
    """The numbers that `numbered_frames` wrote, from decoded upright frames (T, 3, H, W)."""
    height, width = frames.shape[-2:]
    upper = frames[:, :, : height // 2].float().mean(dim=(1, 2))  # [T, W]
    strips = torch.arange(width) * NUMBER_OF_BITS // width
    bits = torch.stack([upper[:, strips == bit].mean(dim=1) > 127 for bit in range(NUMBER_OF_BITS)], dim=1)
    return (bits * 2 ** torch.arange(NUMBER_OF_BITS)).sum(dim=1).tolist()


def write_video(
    path,
    frames: np.ndarray,
    fps: float = 30,
    codec: str = "libx264",
    timestamps=None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
) -> None:
    """Encode `frames` (T, H, W, 3), uint8, into the container that the suffix of `path` names.

    `timestamps` (seconds, one per frame, kept to the millisecond) make the frame rate variable. `rotation` (degrees,
    counterclockwise) is written as metadata: players turn the stored picture by it.
    """
    rate = Fraction(fps).limit_denominator(1001)
    time_base = 1 / rate if timestamps is None else Fraction(1, 1000)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts = index if timestamps is None else round(timestamps[index] * 1000)
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_images(folder, count: int, cells: int = 6, side: int = 48) -> None:
    """Writes 0.png, 1.png, ... of `side` pixels, which all differ: enlarged from `cells` x `cells` random colours."""
    folder.mkdir(exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (cells, cells, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side)).save(folder / f"{index}.png")
