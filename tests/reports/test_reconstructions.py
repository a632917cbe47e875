"""The picture of reconstructions shows what the model made of the visible patches, and nothing of the hidden ones."""

import numpy as np
import pytest
import torch

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.reports.baselines import with_random_weights
from vicmae_hf.reports.reconstructions import reconstruct_views


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def wide_model(image_size=(16, 32), **overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
    return ViCMAEForPreTraining(ViCMAEConfig(**sizes, image_size=image_size, patch_size=8, **overrides))


def random_views(*shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def visible_patches(count, num_patches, num_visible, seed):
    """Which patches of the first views are visible, `(count, L)`: those of the smallest noise."""
    noise = torch.rand(count, 2, num_patches, generator=torch.Generator().manual_seed(seed))[:, 0]
    return noise <= noise.sort(dim=1).values[:, num_visible - 1 : num_visible]


def to_pixels(patches, rows, columns):
    """`(N, L)` -> `(N, 3, 8 * rows, 8 * columns)`."""
    pixels = patches.view(-1, 1, rows, columns).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return pixels.expand(-1, 3, -1, -1)


def test_reconstructions_are_where_the_mask_is():
    model = wide_model(norm_pix_loss=False, mask_ratio=0.5)
    # A decoder that predicts the same normalised pixel everywhere: red 1, green 0, blue -1.
    with torch.no_grad():
        model.decoder.prediction.weight.zero_()
        model.decoder.prediction.bias.copy_(torch.tensor([1.0, 0.0, -1.0]).repeat(64))
    views = random_views(3, 2, 3, 16, 32)
    columns, text = reconstruct_views(model, views, MEAN, STD, seed=5)
    visible = to_pixels(visible_patches(3, 8, 4, seed=5), 2, 4)
    truth = views[:, 0] / 255
    flat = torch.tensor([0.5 + 0.2, 0.4, 0.3 - 0.3]).view(1, 3, 1, 1).expand_as(truth)
    torch.testing.assert_close(columns["first view"], truth)
    torch.testing.assert_close(columns["second view"], views[:, 1] / 255)
    torch.testing.assert_close(columns["visible"], torch.where(visible, truth, 0))
    torch.testing.assert_close(columns["reconstruction"], torch.where(visible, truth, flat))
    error = (flat - truth)[~visible].square().mean()
    assert f"{-10 * torch.log10(error):.1f} dB by the model" in text
    assert "borrowed" not in text


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
def test_normalised_predictions_get_the_statistics_of_visible_neighbours(mask_ratio):
    model = wide_model(norm_pix_loss=True, mask_ratio=mask_ratio)
    with torch.no_grad():
        model.decoder.prediction.weight.zero_()
        model.decoder.prediction.bias.copy_(torch.tensor([1.0, 0.0, -1.0]).repeat(64))
    views = random_views(2, 2, 3, 16, 32)
    columns, text = reconstruct_views(model, views, MEAN, STD)
    visible = visible_patches(2, 8, round(8 * (1 - mask_ratio)), seed=0)
    mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
    for sample in range(2):
        pixels = (views[sample, 0].numpy() / 255 - mean) / std
        patch = {(r, c): pixels[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] for r in range(2) for c in range(4)}
        seen = [place for place in patch if visible[sample, 4 * place[0] + place[1]]]
        for row, column in patch.keys() - set(seen):
            weights = [((row - r) ** 2 + (column - c) ** 2) ** -2 for r, c in seen]
            average = np.average([patch[place].mean() for place in seen], weights=weights)
            deviation = np.average([patch[place].std(ddof=1) for place in seen], weights=weights)
            colour = [average + deviation * value for value in (1, 0, -1)] * std[:, 0, 0] + mean[:, 0, 0]
            found = columns["reconstruction"][sample, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            np.testing.assert_allclose(found, np.broadcast_to(colour[:, None, None], (3, 8, 8)), atol=1e-5)
    assert "borrowed from the visible ones around them, not from the truth" in text


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_nothing_of_the_hidden_patches_is_shown(norm_pix_loss):
    """Other hidden content, the same reconstruction."""
    model = wide_model(norm_pix_loss=norm_pix_loss, mask_ratio=0.75)
    views = random_views(2, 2, 3, 16, 32)
    hidden = ~to_pixels(visible_patches(2, 8, 2, seed=0), 2, 4)
    other = views.clone()
    other[:, 0][hidden] = 255 - other[:, 0][hidden] // 2
    columns, others = (reconstruct_views(model, each, MEAN, STD)[0] for each in (views, other))
    assert not torch.equal(columns["first view"], others["first view"])
    for name in ("visible", "reconstruction", "random weights"):
        torch.testing.assert_close(columns[name], others[name])


def test_random_weights_show_no_hidden_object():
    """Bright things in hidden patches: random weights show them no better than the colour of the ground does."""
    model = wide_model(image_size=(64, 64), norm_pix_loss=True, mask_ratio=0.75)
    hidden = ~to_pixels(visible_patches(4, 64, 16, seed=0), 8, 8)
    views = random_views(4, 2, 3, 64, 64) // 8 + 40
    things = random_views(4, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3) // 2 + 100
    things[..., ::3] = 255
    views[:, 0] = torch.where(hidden, things, views[:, 0])
    columns, text = reconstruct_views(model, views, MEAN, STD)
    truth = columns["first view"]

    def psnr(images):
        return float(-10 * torch.log10((images.clamp(0, 1) - truth)[hidden].square().mean()))

    constant = psnr(truth[~hidden].mean().expand_as(truth))
    assert psnr(columns["random weights"]) < constant + 0.1  # dB
    assert f"{psnr(columns['random weights']):.1f} dB by random weights" in text


def test_random_weights_are_the_same_each_time_and_touch_no_other_random_numbers():
    model = wide_model()
    state = torch.get_rng_state()
    first, second, other = (with_random_weights(model, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    name = "vicmae.layers.0.mlp.fc1.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], model.state_dict()[name])
