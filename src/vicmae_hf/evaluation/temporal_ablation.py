"""Measures how much a video classifier uses time: frames shuffled, one frame repeated (supplement, section C)."""

import math
import statistics
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from .metrics.accuracy import top_k_accuracies


NUM_PERMUTATIONS = 16


class FrameOrders:
    """
    The orders in which an item's frames are shown: first the permutations, then every frame repeated.

    The permutations of an item depend on (seed, index) alone. They differ from one another and from the true order.
    Clips of fewer than four frames have fewer than 16 of them.

    Args:
        num_frames: frames of a clip.
        seed: decides the permutations.

    Raises:
        InputError: if a clip has one frame only.
    """

    def __init__(self, num_frames: int, seed: int):
        if num_frames < 2:
            raise InputError(f"The temporal ablation needs clips of several frames, got num_frames={num_frames}.")
        self.num_frames = num_frames
        self.seed = seed
        self.num_permutations = min(NUM_PERMUTATIONS, math.factorial(num_frames) - 1)

    def __call__(self, index: int) -> torch.Tensor:
        """Orders as places of frames in the clip, `(num_permutations + num_frames, num_frames)`, int64."""
        # The seed has the index of the item, so orders are the same for any number of processes.
        generator = np.random.default_rng([self.seed, index])
        in_order = tuple(range(self.num_frames))
        permutations: dict[tuple[int, ...], None] = {}  # a set that keeps its order
        while len(permutations) < self.num_permutations:
            permutation = tuple(generator.permutation(self.num_frames).tolist())
            if permutation != in_order:  # frames in their order are the standard that it is compared with
                permutations[permutation] = None
        repetitions = [[frame] * self.num_frames for frame in in_order]
        return torch.tensor([*map(list, permutations), *repetitions])

    def summarize(self, standard: dict[str, float], reordered: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """
        Returns accuracies in percent: of the clips as they are, the mean over the permutations, and the mean over the
        repeated frames. The last two come with the standard deviation, and with the accuracy of each permutation or
        frame.

        Args:
            standard: `eval_top1` and `eval_top5` of the same views in their true order.
            reordered: classes predicted for each order, the likeliest first, `(N, G, 5)`.
            labels: `(N,)`.
        """
        figures = [top_k_accuracies(classes, labels) for classes in reordered.unbind(1)]
        runs = {"shuffled": figures[: self.num_permutations], "repeated": figures[self.num_permutations :]}
        summary = {"standard": {name: standard[name] for name in ("eval_top1", "eval_top5")}}
        for name, accuracies in runs.items():
            top1 = [accuracy["top1"] for accuracy in accuracies]
            summary[name] = {
                "eval_top1": statistics.fmean(top1),
                "eval_top5": statistics.fmean(accuracy["top5"] for accuracy in accuracies),
                "eval_top1_spread": statistics.stdev(top1) if len(top1) > 1 else 0.0,
                "eval_top1_runs": top1,
            }
        return summary
