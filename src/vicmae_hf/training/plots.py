"""Pictures of a run. Matplotlib's figures are used without pyplot: no display, no global state."""

import os
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ..data.augmentation import normalize_pixels
from ..modeling_vicmae import ViCMAEForPreTraining, unpatchify


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


@torch.no_grad()
def plot_reconstructions(
    model: ViCMAEForPreTraining,
    views: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    path: str | os.PathLike,
    seed: int = 0,
) -> None:
    """
    One row a sample: the first view, what the encoder saw of it, its reconstruction, the reconstruction in the masked
    patches only, and the second view. With `norm_pix_loss` the model predicts normalised patches; they are shown with
    the mean and the standard deviation of the true patch.

    Args:
        model: on any device; its mode is left as it was.
        views: `(N, 2, 3, H, W)`, uint8; N at least 1.
    """
    device = model.device
    height, width = views.shape[-2:]
    patch_size = model.config.patch_size
    pixel_values = normalize_pixels(views.to(device), mean, std)
    num_patches = (height // patch_size) * (width // patch_size)
    noise = torch.rand(*views.shape[:2], num_patches, generator=torch.Generator().manual_seed(seed)).to(device)
    was_training = model.training
    model.eval()
    hidden_states, mask, ids_restore = model.encode_views(pixel_values, noise)
    patches = model.reconstruct(hidden_states, ids_restore, (height, width))[:, 0].float()
    model.train(was_training)
    if model.config.norm_pix_loss:
        truth = pixel_values[:, 0].unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
        truth = truth.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        variance, average = torch.var_mean(truth, dim=-1, keepdim=True)
        patches = patches * torch.sqrt(variance + 1e-6) + average
    predicted = unpatchify(patches, height, width, 3)
    hidden = unpatchify(mask[:, 0, :, None].expand(-1, -1, patches.shape[-1]), height, width, 3)
    first, second = pixel_values.unbind(1)
    columns = {
        "first view": first,
        "visible": first * (1 - hidden),
        "reconstruction": predicted,
        "reconstruction of masked": first * (1 - hidden) + predicted * hidden,
        "second view": second,
    }
    figure = Figure(figsize=(2 * len(columns), 2 * len(views) * height / width + 0.4), layout="constrained")
    grid = figure.subplots(len(views), len(columns), squeeze=False)
    scale, offset = (torch.tensor(values, device=device).view(3, 1, 1) for values in (std, mean))
    for column, (title, images) in enumerate(columns.items()):
        grid[0, column].set_title(title, fontsize=9)
        for row, image in enumerate(images):
            pixels = (image * scale + offset).clamp(0, 1).permute(1, 2, 0)
            grid[row, column].imshow(pixels.cpu().numpy())
            grid[row, column].axis("off")
    figure.savefig(path, dpi=100)
