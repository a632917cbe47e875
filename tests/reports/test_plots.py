"""Pictures show the right thing in the right place."""

import torch
from PIL import Image

from vicmae_hf.reports.plots import plot_losses, plot_reconstructions


def test_pictures_are_written(tmp_path):
    images = torch.rand(2, 3, 16, 32)
    plot_reconstructions({"one": images, "two": images}, tmp_path / "reconstructions.png")
    line = {"loss": 2.0, "reconstruction_loss": 1.0, "learning_rate": 0.1, "pairs_per_second": 3.0}
    plot_losses([{"step": 1, **line}, {"step": 2, **line}], tmp_path / "losses.png")
    for name in ["reconstructions.png", "losses.png"]:
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10
