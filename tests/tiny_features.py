"""Tables of features from tensors, for tests."""

import torch

from vicmae_hf.evaluation.feature_table import Features, LabelledFeatures


def table(values: torch.Tensor) -> Features:
    """Features `(N, V, D)` of V views, or `(N, D)` of one, of items that could all be read."""
    values = values if values.ndim == 3 else values[:, None]
    rows = torch.arange(values.shape[0] * values.shape[1]).reshape(values.shape[:2])
    return Features(values.flatten(0, 1), rows, torch.arange(len(values)), [])


def labelled_table(values: torch.Tensor, labels: torch.Tensor, num_classes: int) -> LabelledFeatures:
    return LabelledFeatures(table(values), labels, [str(label) for label in range(num_classes)])
