"""Mean average precision, against its definition in NumPy."""

import math

import numpy as np
import pytest
import torch

from vicmae_hf.evaluation.metrics.multi_label import average_precisions, mean_average_precision


def average_precision(scores, targets):
    """By its definition: the sum over thresholds of (recall - recall before) x precision."""
    recall_before, total = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = targets[taken].sum() / targets.sum()
        total += (recall - recall_before) * targets[taken].mean()
        recall_before = recall
    return total


def test_average_precision_by_its_definition():
    generator = np.random.default_rng(0)
    targets = generator.integers(0, 2, (50, 6))
    scores = generator.random((50, 6)).astype(np.float32)
    scores[:, 3] = np.round(scores[:, 3], 1)  # equal ones
    scores[:, 4] = 0.5
    targets[:, 5] = 0
    found = average_precisions(torch.from_numpy(scores), torch.from_numpy(targets.astype(np.int8)))
    expected = [average_precision(scores[:, column], targets[:, column]) for column in range(5)]
    assert found[:5].tolist() == pytest.approx(expected, abs=1e-12)
    assert found[4].item() == pytest.approx(targets[:, 4].mean())  # that of chance
    assert math.isnan(found[5])  # no item has the class, which is left out of the mean
    mean = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    assert mean == pytest.approx(100 * np.mean(expected))


def test_a_ranking_of_three():
    # The items of the class come first and third.
    found = average_precisions(torch.tensor([[0.9], [0.2], [0.5]]), torch.tensor([[1], [1], [0]]))
    assert found.item() == pytest.approx((1 / 1 + 2 / 3) / 2)
