"""Random views of frames."""

from collections.abc import Sequence

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import InputError


def normalize_pixels(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 `(..., 3, H, W)` -> float32 of the same shape, `(pixel / 255 - mean) / std`, on the device it is on."""
    mean = torch.tensor(mean, device=pixel_values.device).view(-1, 1, 1) * 255
    std = torch.tensor(std, device=pixel_values.device).view(-1, 1, 1) * 255
    return (pixel_values.float() - mean) / std


def color_steps(is_first: bool) -> list[v2.Transform]:
    """The colour augmentation of the authors' released code: blur for the first view, solarisation for others."""
    jitter = v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8)
    last = v2.GaussianBlur(kernel_size=(5, 9), sigma=(0.1, 2)) if is_first else v2.RandomSolarize(128, p=0.2)
    return [jitter, v2.RandomGrayscale(0.2), last]


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
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"crop_scale must be two ascending shares in (0, 1], got {crop_scale}.")
        self.size = size
        self.horizontal_flip = horizontal_flip
        self.boxes = v2.RandomResizedCrop(size, scale=crop_scale)
        self.first_colors = v2.Compose(color_steps(is_first=True)) if color_augmentation else None
        self.other_colors = v2.Compose(color_steps(is_first=False)) if color_augmentation else None

    def __call__(self, frames: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
        """
        Frames `(3, H, W)` of any sizes, uint8 -> views `(len(frames), 3, height, width)`, uint8, in memory with the
        channels last. The same seed gives the same views; the global random state stays as it is.
        """
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which seeds the devices too.
            torch.default_generator.manual_seed(seed)
            first, *others = frames
            views = [
                self.draw_view(first, self.first_colors),
                *(self.draw_view(frame, self.other_colors) for frame in others),
            ]
        return torch.stack([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)

    def draw_view(self, frame: torch.Tensor, colors: v2.Transform | None) -> torch.Tensor:
        """What torchvision's RandomResizedCrop and RandomHorizontalFlip draw and return, in two thirds of the time."""
        box = self.boxes.make_params([frame])
        # Whole in memory with the channels last: the only layout whose resizing is not preceded by a slow copy.
        cut = F.crop(frame.unsqueeze(0), **box).contiguous(memory_format=torch.channels_last)
        view = torch.nn.functional.interpolate(cut, self.size, mode="bicubic", antialias=True).squeeze(0)
        if self.horizontal_flip and torch.rand(1) < 0.5:
            view = view.flip(-1)
        return view if colors is None else colors(view)
