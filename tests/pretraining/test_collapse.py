"""Figures that tell a collapse."""

import math
from types import SimpleNamespace

import numpy_vicmae
import pytest
import torch
from tiny_models import random_tensor, shake, tiny_config

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.pretraining.collapse import CollapseFigures, collapse_metrics, effective_rank, uniformity


@pytest.mark.parametrize(("num_samples", "size"), [(7, 5), (4, 12), (2, 1)])
def test_figures_are_those_of_their_definitions(num_samples, size):
    content = random_tensor(num_samples, 1, size) * torch.linspace(0.2, 2, size) + 0.7
    embeddings = content + 0.4 * random_tensor(num_samples, 2, size, seed=1)
    expected = numpy_vicmae.collapse(embeddings.double().numpy())
    assert collapse_metrics(embeddings) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_collapse_to_a_point_and_to_a_line_are_told_from_a_full_space():
    point = collapse_metrics(torch.ones(64, 2, 16))
    assert point == pytest.approx({"std": 0, "rank": 1, "alignment": 0, "uniformity": 0}, abs=1e-4)
    # A line through 0: embeddings differ, yet in one direction.
    line = collapse_metrics(random_tensor(64, 2, 1) * torch.ones(16))
    assert line["rank"] == pytest.approx(1, abs=1e-4)
    assert line["std"] == pytest.approx(1 / math.sqrt(16), rel=0.05)
    full = collapse_metrics(random_tensor(2000, 2, 16))
    assert full["std"] == pytest.approx(1 / math.sqrt(16), rel=0.01)
    assert full["rank"] == pytest.approx(16, rel=0.01)
    # Independent views: the mean squared distance of two random unit vectors is 2.
    assert full["alignment"] == pytest.approx(2, rel=0.05)
    # The potential of points spread evenly over the sphere of 16 dimensions: Wang and Isola's lower limit, about.
    assert full["uniformity"] < -3


def test_the_rank_of_orthogonal_directions_counts_them():
    assert effective_rank(torch.eye(8)).item() == pytest.approx(8, rel=1e-4)
    assert effective_rank(torch.eye(8)[:3] * 5).item() == pytest.approx(3, rel=1e-4)
    assert effective_rank(torch.zeros(4, 4)).item() == pytest.approx(1, abs=1e-4)


def test_the_potential_of_two_opposite_points():
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == pytest.approx(-8)


def test_one_sample_tells_nothing():
    assert collapse_metrics(torch.ones(1, 2, 16)) == {}


def test_all_processes_give_embeddings_and_the_main_one_computes(monkeypatch):
    features, projections, others = (random_tensor(3, 2, 8, seed=seed) for seed in range(3))
    output = SimpleNamespace(features=features, projections=projections)
    gathered = []

    def gather(tensor):
        gathered.append(tensor)
        return torch.cat([tensor, others])

    def figures(is_main_process, step=10, is_last=False):
        accelerator = SimpleNamespace(is_main_process=is_main_process, gather=gather)
        return CollapseFigures(accelerator, logging_steps=10)(step, is_last, output)

    whole = {"feature": torch.cat([features, others]), "projection": torch.cat([projections, others])}
    expected = {
        f"{kind}_{name}": value
        for kind, tensor in whole.items()
        for name, value in numpy_vicmae.collapse(tensor.double().numpy()).items()
    }
    assert figures(is_main_process=True) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    monkeypatch.setattr("vicmae_hf.pretraining.collapse.collapse_metrics", lambda embeddings: pytest.fail("computed"))
    assert figures(is_main_process=False) == {}
    assert len(gathered) == 4  # all wait for all: one that gave nothing would hold up the others for ever
    assert figures(is_main_process=True, step=9) == {}
    assert len(gathered) == 4


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("contrastive_loss", ["info_nce", "simsiam", "none"])
def test_the_model_gives_what_is_measured(contrastive_loss, pooling):
    config = tiny_config(contrastive_loss=contrastive_loss, pooling=pooling)
    model = shake(ViCMAEForPreTraining(config)).train()
    pixel_values, noise = random_tensor(3, 2, 3, 16, 16), random_tensor(3, 2, 16, seed=1)
    output = model(pixel_values, noise=noise)
    weights = numpy_vicmae.to_numpy(model.state_dict())
    expected = numpy_vicmae.pretraining(pixel_values.double().numpy(), noise.double().numpy(), weights, config)
    for view in range(2):
        features = expected["cls_tokens" if pooling == "cls" else "pooled"][view]
        torch.testing.assert_close(output.features[:, view].double(), torch.from_numpy(features), atol=1e-4, rtol=1e-4)
        if contrastive_loss == "none":
            assert output.projections is None
        else:
            read = expected["cls_tokens" if contrastive_loss == "simsiam" else "pooled"][view]
            projected = torch.from_numpy(numpy_vicmae.project(read, weights))
            torch.testing.assert_close(output.projections[:, view].double(), projected, atol=1e-3, rtol=1e-3)
