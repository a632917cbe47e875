"""Cuts random views out of frames."""

import math
import random
from collections.abc import Sequence

import torch
from torch import nn
from torchvision.transforms import v2

from ...errors import InputError


class PixelNormalizer(nn.Module):
    """
    Normalises pixels on the device it is on: uint8 `(..., 3, H, W)` -> float32 of the same shape,
    `(pixel / 255 - mean) / std`.

    Its constants stay on the device. Made anew for every batch they would be sent there, and the program would wait
    until all before is computed.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        # Multiplied instead of dividing the pixels: one pass over the batch less.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) * 255)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return (pixel_values.float() - self.mean) / self.std


def color_steps(is_first: bool) -> list[v2.Transform]:
    """Colour augmentation of the authors' released code: the first view is blurred, some others are solarised."""
    jitter = v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8)
    last = v2.GaussianBlur(kernel_size=(5, 9), sigma=(0.1, 2)) if is_first else v2.RandomSolarize(128, p=0.2)
    return [jitter, v2.RandomGrayscale(0.2), last]


def draw_box(
    height: int, width: int, scale: tuple[float, float], generator: random.Random
) -> tuple[int, int, int, int]:
    """
    Draws top, left, height and width of a random box in a frame, by the rule of torchvision's RandomResizedCrop in a
    tenth of its time. The share of the area is uniform in `scale`, the aspect ratio log-uniform in [3/4, 4/3]. A box
    that doesn't fit is drawn again; after ten tries the largest centred box of a possible ratio is taken.
    """
    smallest, largest = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(math.log(smallest), math.log(largest)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = generator.randint(0, height - box_height), generator.randint(0, width - box_width)
            return top, left, box_height, box_width
    box_width, box_height = min(width, round(height * largest)), min(height, round(width / smallest))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


class RandomView:
    """
    Random resized crop and horizontal flip (Table 1: hflip, crop [0.5, 1]), drawn anew for every frame.

    Args:
        image_size: height and width of the view in pixels; one number for both.
        crop_scale: smallest and largest share of the frame's area.
        horizontal_flip: whether to flip every second view on average.
        color_augmentation: whether to change colours as well, as the released code does and the paper does not.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        crop_scale: tuple[float, float] = (0.5, 1.0),
        horizontal_flip: bool = True,
        color_augmentation: bool = False,
    ):
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or min(size) <= 0:
            raise InputError(f"image_size must be one positive number or (height, width), got {image_size}.")
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"crop_scale must be two ascending shares in (0, 1], got {crop_scale}.")
        self.size = size
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.first_colors = v2.Compose(color_steps(is_first=True)) if color_augmentation else None
        self.other_colors = v2.Compose(color_steps(is_first=False)) if color_augmentation else None

    def __call__(self, frames: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
        """
        Frames `(3, H, W)` of any sizes, uint8 -> views `(len(frames), 3, height, width)`, uint8, in memory with the
        channels last. The same seed gives the same views; the global random state stays as it is.
        """
        generator = random.Random(seed)  # Python's: torch takes several times as long for so few numbers
        views = [self.cut_view(frame, generator) for frame in frames]  # (1, 3, height, width) each
        if self.first_colors is not None:
            views = self.change_colors(views, seed)
        return torch.cat(views).contiguous(memory_format=torch.channels_last)

    def cut_view(self, frame: torch.Tensor, generator: random.Random) -> torch.Tensor:
        """
        Does what torchvision's RandomResizedCrop and RandomHorizontalFlip do, in less time: `(3, H, W)` ->
        `(1, 3, height, width)`.
        """
        top, left, height, width = draw_box(*frame.shape[1:], self.crop_scale, generator)
        region = frame.narrow(1, top, height).narrow(2, left, width).unsqueeze(0)
        # Whole in memory and channels last: resizing anything else begins and ends with slow copies (docs/data.md).
        region = region.contiguous(memory_format=torch.channels_last)
        view = torch.nn.functional.interpolate(region, self.size, mode="bicubic", antialias=True)
        return view.flip(-1) if self.horizontal_flip and generator.random() < 0.5 else view

    def change_colors(self, views: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            # The transforms use the global state. torch.manual_seed would seed GPUs too, which are not forked here.
            torch.default_generator.manual_seed(seed)
            first, *others = views
            return [self.first_colors(first), *(self.other_colors(view) for view in others)]
