"""Baselines are what the losses and figures of this package come to without anything learned."""

import numpy as np
import pytest
import torch
from tiny_models import random_tensor, tiny_config

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.evaluation.metrics.accuracy import accuracy
from vicmae_hf.evaluation.metrics.multi_label import mean_average_precision
from vicmae_hf.reports.baselines import classification_baselines, pretraining_baselines


@pytest.mark.parametrize("contrastive_loss", ["info_nce", "nt_xent"])
def test_chance_is_the_loss_of_views_that_are_all_alike(contrastive_loss):
    model = ViCMAEForPreTraining(tiny_config(contrastive_loss=contrastive_loss)).eval()
    with torch.no_grad():
        _, loss = model.contrast(random_tensor(1, 1, 16).expand(6, 2, 16))
    value, label = pretraining_baselines(model.config, 6)["contrastive_loss"]
    assert value == pytest.approx(loss.item(), rel=1e-5)
    assert label == "chance, 6 samples"
    assert value == pytest.approx({"info_nce": 7.167, "nt_xent": 2.398}[contrastive_loss], abs=1e-3)


def test_orthogonal_views_have_the_baseline_of_simsiam():
    model = ViCMAEForPreTraining(tiny_config(contrastive_loss="simsiam")).eval()
    model.projector = torch.nn.Identity()
    first = torch.eye(16)[:6]
    with torch.no_grad():
        _, loss = model.contrast(torch.stack([first, first.roll(8, dims=1)], dim=1))
    assert pretraining_baselines(model.config, 6)["contrastive_loss"][0] == pytest.approx(loss.item())


def test_the_mean_of_each_patch_has_a_loss_of_one():
    model = ViCMAEForPreTraining(tiny_config(norm_pix_loss=True, patch_size=8)).eval()
    with torch.no_grad():
        model.decoder.prediction.weight.zero_()
        model.decoder.prediction.bias.zero_()
        loss = model(random_tensor(3, 2, 3, 16, 16), noise=random_tensor(3, 2, 4)).reconstruction_loss.item()
    value, _ = pretraining_baselines(model.config, 3)["reconstruction_loss"]
    assert value == pytest.approx(loss, rel=0.01)  # (n - 1) / n of it, with n = 192 numbers of a patch


def test_losses_without_such_a_value_have_no_baseline():
    assert pretraining_baselines(tiny_config(norm_pix_loss=False, contrastive_loss="vicreg"), 4) == {}
    assert list(pretraining_baselines(tiny_config(norm_pix_loss=True, contrastive_loss="none"), 4)) == [
        "reconstruction_loss"
    ]


def test_figures_of_a_classifier_that_looks_at_nothing():
    labels = torch.tensor([0] * 5 + [1] * 9 + [2] * 2 + [3] + [4] * 3 + [6] * 4)
    frequency = torch.bincount(labels, minlength=8).float()
    expected = accuracy(frequency.expand(len(labels), 8), labels)
    found = classification_baselines(labels.numpy())
    assert found["eval_top1"][0] == pytest.approx(expected["top1"])
    assert found["eval_top5"][0] == pytest.approx(expected["top5"])
    assert found["eval_top1"][0] == pytest.approx(100 * 9 / 24)

    targets = (random_tensor(50, 4, seed=1) > torch.tensor([-1.0, 0.0, 1.0, 9.0])).long()
    expected = mean_average_precision(torch.full((50, 4), 0.3), targets)
    assert classification_baselines(targets.numpy())["eval_map"][0] == pytest.approx(expected)
    assert np.isfinite(expected)
