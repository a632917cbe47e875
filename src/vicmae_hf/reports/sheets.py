"""Many images on one page."""

import numpy as np
import torch
from matplotlib.axes import Axes


class Sheet:
    """
    A white page of images of one size in rows and columns, with texts. It is drawn as one image in one panel: with a
    panel for each image matplotlib takes seconds.

    Args:
        size: height and width of an image, in pixels.
        rows, columns: of the page; a fraction leaves room.
        gap: between two images, as a share of their height.
    """

    def __init__(self, size: tuple[int, int], rows: float, columns: float, gap: float = 0.08):
        self.height, self.width = size
        self.gap = max(round(gap * self.height), 1)
        self.steps = self.height + self.gap, self.width + self.gap
        shape = (round(length * step) for length, step in zip((rows, columns), self.steps, strict=True))
        self.pixels = np.ones((*shape, 3), np.float32)
        self.texts: list[tuple[float, float, str, dict]] = []

    def corner(self, row: float, column: float) -> tuple[int, int]:
        """Top and left of an image, in pixels."""
        return round(row * self.steps[0]), round(column * self.steps[1])

    def place(self, image: torch.Tensor, row: float, column: float, text: str = "") -> None:
        """Places an image `(3, H, W)`, uint8 or in [0, 1], and a text above it."""
        top, left = self.corner(row, column)
        pixels = image.permute(1, 2, 0).cpu()
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float().clamp(0, 1)
        self.pixels[top : top + self.height, left : left + self.width] = pixels.numpy()
        if text:
            self.texts.append((left + self.width / 2, top, text, {"ha": "center", "va": "bottom", "fontsize": 7}))

    def write(self, text: str, row: float, column: float, **style) -> None:
        """Writes a text whose lower left is the upper left of an image there."""
        top, left = self.corner(row, column)
        self.texts.append((left, top, text, {"va": "bottom", "fontsize": 9} | style))

    def draw(self, axes: Axes) -> None:
        axes.axis("off")
        axes.imshow(self.pixels)
        for x, y, text, style in self.texts:
            axes.text(x, y - 0.02 * self.height, text, **style)
