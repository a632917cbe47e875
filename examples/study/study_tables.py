"""Figures of several seeds, and Markdown tables of them."""

import statistics
from collections.abc import Sequence


def deviation(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_and_spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """`12.3 ± 0.4`, or `12.3` of a single seed; with `sign` "+" a positive mean has its sign too."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):.{digits}f}"
