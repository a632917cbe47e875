"""Cuts random views out of clips and images, and mixes them, to train classifiers (Table 2)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from transformers.image_utils import IMAGENET_DEFAULT_MEAN

from ...errors import InputError


# The colour of what lies outside a shifted picture, and of what is erased: it becomes 0 after normalisation.
MEAN_COLOR = [round(255 * value) for value in IMAGENET_DEFAULT_MEAN]
RAND_AUGMENT_OPERATIONS = 2
LARGEST_MAGNITUDE = 10
BINS_PER_MAGNITUDE = 100  # torchvision takes whole magnitudes only; in hundredths the deviation is kept


class RandAugmentOperation(v2.RandAugment):
    """
    One random operation of torchvision's RandAugment, at a magnitude drawn around `magnitude` with deviation `std`.

    The scale goes from 0 to 10, as RandAugment's authors and timm have it. The MAE family's "RandAug (9, 0.5)" means
    timm's `rand-m9-mstd0.5`, so 9 is nearly the strongest. (torchvision's own scale has 31 steps and no deviation; 9
    would be a third of it.) The operations and their ranges are torchvision's.
    """

    def __init__(self, magnitude: float, std: float):
        super().__init__(
            num_ops=1,  # each operation draws its own magnitude, so two of them are two transforms
            num_magnitude_bins=LARGEST_MAGNITUDE * BINS_PER_MAGNITUDE + 1,
            interpolation=InterpolationMode.BILINEAR,
            fill=MEAN_COLOR,
        )
        self.mean_magnitude = magnitude
        self.std = std

    def forward(self, *inputs):
        drawn = self.mean_magnitude + self.std * torch.randn(()).item()
        self.magnitude = round(min(max(drawn, 0), LARGEST_MAGNITUDE) * BINS_PER_MAGNITUDE)
        return super().forward(*inputs)


class RandomClip:
    """
    Cuts a random view out of a clip, the same for all its frames: random resized crop and, where they are wanted,
    horizontal flip, RandAugment and random erasing. (Operations that look at the histogram, such as equalisation, look
    at it frame by frame.)

    Args:
        image_size: height and width of the view in pixels.
        crop_scale: smallest and largest share of the frame's area; by default that of MAE's finetuning.
        horizontal_flip: whether to flip every second clip on average.
        rand_augment_magnitude: mean magnitude of two operations of RandAugment, from 0 to 10; 0 leaves it out.
        rand_augment_std: standard deviation of the magnitude.
        random_erasing: probability of erasing a rectangle.

    Raises:
        InputError: if a setting is out of range.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        crop_scale: Sequence[float] = (0.08, 1.0),
        horizontal_flip: bool = True,
        rand_augment_magnitude: float = 0.0,
        rand_augment_std: float = 0.5,
        random_erasing: float = 0.0,
    ):
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"crop_scale must be two ascending shares in (0, 1], got {list(crop_scale)}.")
        if not 0 <= rand_augment_magnitude <= LARGEST_MAGNITUDE:
            raise InputError(
                f"rand_augment_magnitude must be between 0 and {LARGEST_MAGNITUDE}, got {rand_augment_magnitude}."
            )
        if not rand_augment_std >= 0:
            raise InputError(f"rand_augment_std must not be negative, got {rand_augment_std}.")
        if not 0 <= random_erasing <= 1:
            raise InputError(f"random_erasing is a probability, got {random_erasing}.")
        steps: list[v2.Transform] = [
            v2.RandomResizedCrop(
                image_size, scale=tuple(crop_scale), interpolation=InterpolationMode.BICUBIC, antialias=True
            )
        ]
        if horizontal_flip:
            steps.append(v2.RandomHorizontalFlip())
        if rand_augment_magnitude > 0:
            operation = RandAugmentOperation(rand_augment_magnitude, rand_augment_std)
            steps += [operation] * RAND_AUGMENT_OPERATIONS
        if random_erasing > 0:
            steps.append(v2.RandomErasing(p=random_erasing, value=MEAN_COLOR))
        self.transform = v2.Compose(steps)

    def __call__(self, frames: torch.Tensor, seed: int) -> torch.Tensor:
        """
        Frames `(T, 3, H, W)`, uint8 -> `(T, 3, height, width)`, uint8. The same seed gives the same view; the global
        random state stays as it is.
        """
        with torch.random.fork_rng(devices=[]):
            # The transforms use the global state. torch.manual_seed would seed GPUs too, which are not forked here.
            torch.default_generator.manual_seed(seed)
            return self.transform(frames)


class BatchMixing:
    """
    Smooths labels and mixes the samples of a batch by mixup, by cutmix, or by one of both, which is drawn for each
    batch. Random numbers come from the global state, which the training loop seeds.

    Args:
        num_classes: C.
        label_smoothing: share of the target that is spread over all classes.
        mixup, cutmix: alpha of the Beta distribution that the proportions are drawn from; 0 leaves it out.

    Raises:
        InputError: if a setting is out of range.
    """

    def __init__(self, num_classes: int, label_smoothing: float = 0.0, mixup: float = 0.0, cutmix: float = 0.0):
        if not 0 <= label_smoothing < 1:
            raise InputError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing}.")
        for name, value in {"mixup": mixup, "cutmix": cutmix}.items():
            if not value >= 0:
                raise InputError(f"{name} must not be negative, got {value}.")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        transforms = [
            transform(alpha=alpha) for transform, alpha in [(v2.MixUp, mixup), (v2.CutMix, cutmix)] if alpha > 0
        ]
        self.mix = v2.RandomChoice(transforms) if transforms else None

    def __call__(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Normalised `(B, 3, H, W)` or `(B, T, 3, H, W)` and class indices `(B,)`, or targets `(B, C)` -> the mixture,
        and probabilities `(B, C)`.
        """
        targets = F.one_hot(labels, self.num_classes) if labels.ndim == 1 else labels
        targets = targets.to(torch.float32)  # (B, C)
        targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        if self.mix is None:
            return pixel_values, targets
        # torchvision mixes tensors of a known kind only, and mixes the targets by the same proportion.
        kind = tv_tensors.Video if pixel_values.ndim == 5 else tv_tensors.Image
        mixed, targets = self.mix(kind(pixel_values), targets)
        return mixed.as_subclass(torch.Tensor), targets
