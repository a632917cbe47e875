"""Reconstructs hidden patches for a picture, by the trained model and by random weights, from visible ones alone."""

import math
from collections.abc import Sequence

import torch

from ..data.samples.augmentation import PixelNormalizer
from ..modeling_vicmae import ViCMAEForPreTraining, patchify
from .baselines import with_random_weights


def unpatchify(patches: torch.Tensor, height: int, width: int, num_channels: int) -> torch.Tensor:
    """Patches `(..., L, p * p * C)`, pixels ordered row, column, channel -> frames `(..., C, height, width)`."""
    *batch, _, size = patches.shape
    patch_size = math.isqrt(size // num_channels)
    rows, columns = height // patch_size, width // patch_size
    patches = patches.reshape(*batch, rows, columns, patch_size, patch_size, num_channels)  # (..., h, w, p, p, C)
    order = [patches.ndim + axis for axis in (-1, -5, -3, -4, -2)]
    return patches.permute(*range(len(batch)), *order).reshape(*batch, num_channels, height, width)


@torch.no_grad()
def reconstruct_views(
    model: ViCMAEForPreTraining,
    views: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    untrained: ViCMAEForPreTraining | None = None,
) -> tuple[dict[str, torch.Tensor], str]:
    """
    Makes the images for `plot_reconstructions` and the text below them: the first view, its visible patches, these
    with the hidden ones as the model and as random weights predict them, and the second view, each `(N, 3, H, W)` in
    [0, 1] up to overshoot.

    With `norm_pix_loss` the model predicts patches of mean 0 and deviation 1. They get what the visible patches around
    them have (see `spread_statistics`). The true mean and deviation would show a small image of what is hidden, by
    random weights, too.

    Args:
        views: `(N, 2, 3, H, W)`, uint8.
        untrained: the model with random weights, where it is at hand; else they are drawn by `seed`.
    """
    height, width = views.shape[-2:]
    patch_size = model.config.patch_size
    num_patches = (height // patch_size) * (width // patch_size)
    pixel_values = PixelNormalizer(mean, std).to(model.device)(views.to(model.device))
    # A generator of its own: the same patches are masked in the pictures of every run.
    noise = torch.rand(*views.shape[:2], num_patches, generator=torch.Generator().manual_seed(seed))
    noise = noise.to(model.device)
    scale, offset = (torch.tensor(values, device=model.device).view(3, 1, 1) for values in (std, mean))
    first, second = (images * scale + offset for images in pixel_values.unbind(1))  # back to colours
    trained, mask = predict_patches(model, pixel_values, noise)
    random, _ = predict_patches(untrained or with_random_weights(model, seed), pixel_values, noise)
    # 1 in hidden patches, 0 in visible ones: (N, 3, H, W).
    hidden = unpatchify(mask[..., None].expand_as(trained), height, width, num_channels=3)

    def fill(patches: torch.Tensor) -> torch.Tensor:
        predicted = unpatchify(patches, height, width, num_channels=3) * scale + offset
        return first * (1 - hidden) + predicted * hidden

    columns = {
        "first view": first,
        "visible": first * (1 - hidden),
        "reconstruction": fill(trained),
        "random weights": fill(random),
        "second view": second,
    }
    ratios = {
        name: peak_signal_to_noise(columns[name], first, hidden) for name in ("reconstruction", "random weights")
    }
    text = (
        f"Hidden patches (PSNR): {ratios['reconstruction']:.1f} dB by the model, {ratios['random weights']:.1f} dB by "
        "random weights. Visible patches are shown as they are."
    )
    if model.config.norm_pix_loss:
        text += (
            " The model predicts patches of mean 0 and variance 1 (norm_pix_loss). Brightness and contrast of hidden "
            "patches are borrowed from the visible ones around them, not from the truth."
        )
    return columns, text


def predict_patches(
    model: ViCMAEForPreTraining, pixel_values: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views `(N, 2, 3, H, W)`, noise `(N, 2, L)` -> patches of the first views `(N, L, p * p * 3)`, mask `(N, L)`."""
    size, patch_size = pixel_values.shape[-2:], model.config.patch_size
    was_training = model.training
    model.eval()
    hidden_states, mask, ids_restore = model.encode_views(pixel_values, noise)
    patches = model.reconstruct(hidden_states, ids_restore, size)[:, 0].float()
    model.train(was_training)
    mask = mask[:, 0]
    if model.config.norm_pix_loss:
        truth = patchify(pixel_values[:, 0], patch_size).flatten(2)  # (N, L, 3 * p * p)
        variance, average = torch.var_mean(truth, dim=-1)
        statistics = torch.stack([torch.sqrt(variance + 1e-6), average], dim=-1)
        deviation, average = spread_statistics(statistics, mask, size[1] // patch_size).unsqueeze(-1).unbind(2)
        patches = patches * deviation + average
    return patches, mask


def spread_statistics(values: torch.Tensor, mask: torch.Tensor, num_columns: int) -> torch.Tensor:
    """
    Replaces the values of hidden patches by a mean over the visible ones, each weighted by 1 / distance ** 4, so that
    the nearest count most (Shepard's interpolation).

    Args:
        values: `(N, L, S)`; mask: `(N, L)`, 1 where a patch is hidden; num_columns: patches side by side.
    """
    places = torch.arange(values.shape[1], device=values.device)
    places = torch.stack([places // num_columns, places % num_columns], dim=-1).float()
    weights = torch.cdist(places, places).pow(-4)  # (L, L), infinite from a patch to itself
    weights = weights.fill_diagonal_(0) * (1 - mask)[:, None, :]  # (N, L, L): only visible patches give
    # At least 1e-12: the only visible patch gets nothing from others, and 0 / 0 would be NaN.
    spread = weights @ values / weights.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.where(mask[..., None] == 1, spread, values)


def peak_signal_to_noise(images: torch.Tensor, truth: torch.Tensor, hidden: torch.Tensor) -> float:
    """PSNR in dB of the pixels where `hidden` is 1, all `(N, 3, H, W)`, in [0, 1] up to overshoot."""
    error = ((images.clamp(0, 1) - truth.clamp(0, 1)).square() * hidden).sum() / hidden.sum()
    return float(-10 * torch.log10(error))
