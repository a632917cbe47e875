"""Measures classifiers of items that may have several labels each."""

import torch


def average_precisions(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """
    Average precision of each class, float64 `(C,)` between 0 and 1, NaN for a class that no item has: precision at
    each threshold, weighted by the recall that it adds, without interpolation. Equal scores are one threshold.

    Args:
        scores: of items and classes, `(N, C)`.
        targets: 1 where an item has the class, else 0, `(N, C)`.
    """
    ranked, order = scores.double().sort(dim=0, descending=True)
    hits = targets.gather(0, order).double().cumsum(0)  # (N, C), among the items down to each
    precision = hits / torch.arange(1, len(scores) + 1, dtype=torch.float64)[:, None]
    values = []
    for column in range(scores.shape[1]):
        is_threshold = torch.ones(len(scores), dtype=torch.bool)
        is_threshold[:-1] = ranked[:-1, column] != ranked[1:, column]
        found = hits[is_threshold, column]
        added = found.diff(prepend=found.new_zeros(1))
        values.append((added * precision[is_threshold, column]).sum() / found[-1])  # 0 / 0 is NaN
    return torch.stack(values)


def mean_average_precision(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean of `average_precisions` in percent, over the classes that some item has; NaN if there is none."""
    return 100 * average_precisions(scores, targets).nanmean().item()
