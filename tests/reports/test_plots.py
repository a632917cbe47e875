"""Pictures show the right thing in the right place."""

import torch
from PIL import Image

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.reports.plots import plot_losses, plot_reconstructions, reconstruct_views


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def wide_model(**overrides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {f"decoder_{name}": value for name, value in sizes.items()}
    return ViCMAEForPreTraining(ViCMAEConfig(**sizes, image_size=(16, 32), patch_size=8, **overrides))


def test_reconstructions_are_where_the_mask_is():
    model = wide_model(norm_pix_loss=False, mask_ratio=0.5)
    # A decoder that predicts the same normalised pixel everywhere: red 1, green 0, blue -1.
    with torch.no_grad():
        model.decoder.prediction.weight.zero_()
        model.decoder.prediction.bias.copy_(torch.tensor([1.0, 0.0, -1.0]).repeat(64))
    views = torch.randint(0, 256, (3, 2, 3, 16, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    columns = reconstruct_views(model, views, MEAN, STD, seed=5)

    noise = torch.rand(3, 2, 8, generator=torch.Generator().manual_seed(5))[:, 0]
    visible = noise <= noise.sort(dim=1).values[:, 3:4]
    visible = visible.view(3, 1, 2, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    truth = views[:, 0] / 255
    flat = torch.tensor([0.5 + 0.2, 0.4, 0.3 - 0.3]).view(1, 3, 1, 1).expand_as(truth)
    torch.testing.assert_close(columns["first view"], truth)
    torch.testing.assert_close(columns["second view"], views[:, 1] / 255)
    torch.testing.assert_close(columns["reconstruction"], flat)
    torch.testing.assert_close(columns["visible"], torch.where(visible, truth, 0))
    torch.testing.assert_close(columns["masked patches filled in"], torch.where(visible, truth, flat))


def test_normalised_predictions_get_the_statistics_of_the_patch():
    model = wide_model(norm_pix_loss=True)
    with torch.no_grad():
        model.decoder.prediction.weight.zero_()
        model.decoder.prediction.bias.zero_()
    views = torch.randint(0, 256, (2, 2, 3, 16, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    predicted = reconstruct_views(model, views, MEAN, STD)["reconstruction"]
    # A normalised prediction of 0 is the mean over the patch's normalised pixels and channels.
    scale, offset = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
    patch = (views[1, 0, :, 8:16, 24:32] / 255 - offset) / scale
    torch.testing.assert_close(predicted[1, :, 8:16, 24:32], (patch.mean() * scale + offset).expand(3, 8, 8))


def test_pictures_are_written(tmp_path):
    images = torch.rand(2, 3, 16, 32)
    plot_reconstructions({"one": images, "two": images}, tmp_path / "reconstructions.png")
    line = {"loss": 2.0, "reconstruction_loss": 1.0, "learning_rate": 0.1, "pairs_per_second": 3.0}
    plot_losses([{"step": 1, **line}, {"step": 2, **line}], tmp_path / "losses.png")
    for name in ["reconstructions.png", "losses.png"]:
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10
