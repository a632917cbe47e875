"""Pictures show the right thing in the right place."""

import pytest
import torch
from PIL import Image

from vicmae_hf.reports import plots
from vicmae_hf.reports.plots import plot_accuracies, plot_losses, plot_reconstructions, plot_temporal_ablation


def test_pictures_are_written(tmp_path):
    images = torch.rand(2, 3, 16, 32)
    plot_reconstructions({"one": images, "two": images}, tmp_path / "reconstructions.png")
    line = {"loss": 2.0, "reconstruction_loss": 1.0, "learning_rate": 0.1, "pairs_per_second": 3.0}
    plot_losses([{"step": 1, **line}, {"step": 2, **line}], tmp_path / "losses.png")
    for name in ["reconstructions.png", "losses.png"]:
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in place of files."""
    saved = []
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: saved.append(figure))
    return saved


def dashed(axes):
    return {line.get_label(): line.get_ydata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"}


def test_losses_have_their_baselines(figures):
    metrics = [
        {"step": 5, "epoch": 1, "learning_rate": 0.1, "probe_knn_top1": 9.0},  # of a probe: it has no losses
        {"step": 10, "epoch": 2, "learning_rate": 0.1, "loss": 3.0, "reconstruction_loss": 1.1},
    ]
    baselines = {"reconstruction_loss": (1.0, "mean of each patch"), "contrastive_loss": (16.6, "chance")}
    plot_losses(metrics, "losses.png", baselines)
    panels = {axes.get_title(): axes for axes in figures[0].axes}
    assert list(panels) == ["loss", "reconstruction loss", "learning rate"]  # no empty one
    assert dashed(panels["reconstruction loss"]) == {"mean of each patch (1)": 1.0}
    assert [dashed(panels[name]) for name in ("loss", "learning rate")] == [{}, {}]


@pytest.mark.parametrize(("count", "marker"), [(1, "."), (30, "."), (31, "None")])
def test_the_values_of_a_short_run_are_dots(figures, count, marker):
    metrics = [{"step": step, "loss": 2.0, "learning_rate": 0.1} for step in range(count)]
    plot_losses(metrics, "losses.png")
    for axes in figures[0].axes:
        assert [line.get_marker() for line in axes.get_lines()] == [marker]


def test_accuracies_have_their_chance(figures):
    metrics = [{"step": 1, "loss": 3.0}, {"step": 2, "epoch": 1, "eval_top1": 40.0, "eval_top5": 80.0}]
    baselines = {"eval_top1": (12.5, "one class"), "eval_top5": (62.5, "five classes"), "eval_map": (1.0, "none")}
    plot_accuracies(metrics, "a.png", {"eval_top1": "top-1", "eval_top5": "top-5"}, baselines)
    assert dashed(figures[0].axes[0]) == {"one class (12.5)": 12.5, "five classes (62.5)": 62.5}
    ablation = {"standard": {"eval_top1": 50.0}, "shuffled": {"eval_top1": 30.0, "eval_top1_runs": [29.0, 31.0]}}
    plot_temporal_ablation(ablation, "b.png", baselines)
    assert dashed(figures[1].axes[0]) == {"one class (12.5)": 12.5}


def test_the_text_stands_below_reconstructions(figures):
    plot_reconstructions({"one": torch.rand(1, 3, 8, 8)}, "a.png", "what is borrowed")
    assert figures[0].get_supxlabel() == "what is borrowed"
