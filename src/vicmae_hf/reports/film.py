"""Writes a film of features beside the video, as an animated WebP, which web pages and model cards play."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence

from ..files import partial_file


PANEL_HEIGHT = 224  # pixels
MARGIN = 24  # above and below the panels, for text
GAP = 6
TITLES = ("video", "trained", "random weights")
TEXT = "Colours: the first three principal components of the patch features, for each encoder separately."


def write_film(
    frames: torch.Tensor,
    colours: Sequence[torch.Tensor],
    grid: tuple[int, int],
    frames_per_second: float,
    path: str | os.PathLike,
) -> None:
    """
    Writes a video and the colours of its patches by two encoders side by side.

    Args:
        frames: `(T, 3, H, W)`, uint8; colours: of the trained and of the untrained encoder, `(T, L, 3)` in [0, 1].
        grid: rows and columns of patches.
    """
    panels = [frames.permute(0, 2, 3, 1).numpy()]
    panels += [(255 * each.unflatten(1, grid)).round().to(torch.uint8).numpy() for each in colours]
    pictures = [draw_frame(images) for images in zip(*panels, strict=True)]
    with partial_file(Path(path)) as partial:
        pictures[0].save(
            partial,
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 / frames_per_second),
            loop=0,  # without end
            quality=80,
        )


def as_gif(film: Path, path: Path) -> Path:
    """Writes a film as an animated GIF, because trackers show no WebP. Returns its path."""
    with Image.open(film) as pictures:
        frames = [picture.convert("RGB") for picture in ImageSequence.Iterator(pictures)]
        duration = pictures.info["duration"]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return path


def draw_frame(images: Sequence[np.ndarray]) -> Image.Image:
    """Draws images `(H, W, 3)`, uint8, side by side, under their titles."""
    height, width = images[0].shape[:2]
    size = (round(PANEL_HEIGHT * width / height), PANEL_HEIGHT)
    picture = Image.new("RGB", (len(images) * (size[0] + GAP) - GAP, PANEL_HEIGHT + 2 * MARGIN), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for place, (title, image) in enumerate(zip(TITLES, images, strict=True)):
        left = place * (size[0] + GAP)
        # Patches stay squares of one colour each.
        resample = Image.Resampling.BICUBIC if place == 0 else Image.Resampling.NEAREST
        picture.paste(Image.fromarray(image).resize(size, resample), (left, MARGIN))
        draw.text((left + 4, 4), title, fill="black", font=font)
    draw.text((4, MARGIN + PANEL_HEIGHT + 4), TEXT, fill="black", font=font)
    return picture
