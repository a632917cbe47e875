"""Pictures of a run. Matplotlib's figures are used without pyplot: no display, no global state."""

import os
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ..data.augmentation import normalize_pixels
from ..modeling_vicmae import ViCMAEForPreTraining, patchify, unpatchify


def plot_losses(metrics: Sequence[dict[str, float]], path: str | os.PathLike) -> None:
    """Losses and learning rate against the update, one panel each, from the lines of `metrics.jsonl`."""
    names = [name for name in metrics[0] if name == "loss" or name.endswith("_loss")] + ["learning_rate"]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot([line["step"] for line in metrics], [line[name] for line in metrics])
        axes.set(title=name.replace("_", " "), xlabel="update")
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def plot_reconstructions(columns: dict[str, torch.Tensor], path: str | os.PathLike) -> None:
    """One row a sample, one column a name of `columns`: RGB images `(N, 3, H, W)` in [0, 1]."""
    num_rows, _, height, width = next(iter(columns.values())).shape
    figure = Figure(figsize=(2 * len(columns), 2 * num_rows * height / width + 0.4), layout="constrained")
    grid = figure.subplots(num_rows, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        grid[0, column].set_title(title, fontsize=9)
        for row, image in enumerate(images):
            grid[row, column].imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
            grid[row, column].axis("off")
    figure.savefig(path, dpi=100)


@torch.no_grad()
def reconstruct_views(
    model: ViCMAEForPreTraining, views: torch.Tensor, mean: Sequence[float], std: Sequence[float], seed: int = 0
) -> dict[str, torch.Tensor]:
    """
    What `plot_reconstructions` shows: the first view, what the encoder sees of it, its reconstruction, the
    reconstruction in the masked patches only, and the second view, each `(N, 3, H, W)` in [0, 1] up to overshoot.

    With `norm_pix_loss` the model predicts normalised patches; they get the mean and standard deviation of the true
    ones.

    Args:
        views: `(N, 2, 3, H, W)`, uint8.
    """
    height, width = views.shape[-2:]
    patch_size = model.config.patch_size
    pixel_values = normalize_pixels(views.to(model.device), mean, std)
    num_patches = (height // patch_size) * (width // patch_size)
    noise = torch.rand(*views.shape[:2], num_patches, generator=torch.Generator().manual_seed(seed))
    was_training = model.training
    model.eval()
    hidden_states, mask, ids_restore = model.encode_views(pixel_values, noise.to(model.device))
    patches = model.reconstruct(hidden_states, ids_restore, (height, width))[:, 0].float()
    model.train(was_training)
    if model.config.norm_pix_loss:
        truth = patchify(pixel_values[:, 0], patch_size).movedim(-3, -1).flatten(-3)
        variance, average = torch.var_mean(truth, dim=-1, keepdim=True)
        patches = patches * torch.sqrt(variance + 1e-6) + average
    predicted = unpatchify(patches, height, width, num_channels=3)
    hidden = unpatchify(mask[:, 0, :, None].expand_as(patches), height, width, num_channels=3)
    scale, offset = (torch.tensor(values, device=model.device).view(3, 1, 1) for values in (std, mean))
    first, second = pixel_values.unbind(1)
    first, second, predicted = (images * scale + offset for images in (first, second, predicted))
    return {
        "first view": first,
        "visible": first * (1 - hidden),
        "reconstruction": predicted,
        "masked patches filled in": first * (1 - hidden) + predicted * hidden,
        "second view": second,
    }
