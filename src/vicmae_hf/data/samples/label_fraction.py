"""Selects a share of the labels, for the semi-supervised study of Table 5."""

import zlib
from collections.abc import Callable

import numpy as np

from ...errors import InputError
from ..sources.labelled import LabelledSource, refuse_several_labels


def select_label_fraction(source: LabelledSource, fraction: float, seed: int) -> LabelledSource:
    """
    Selects the same share of every class. Only `seed` and the items' names decide, so a folder and a store packed from
    it give the same part. Parts are nested: what belongs to 5 % belongs to 10 % as well.

    Raises:
        InputError: if the share is not in (0, 1], or is less than one sample of some class; if items may have several
            labels.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"label_fraction is a share above 0 and at most 1, got {fraction}.")
    refuse_several_labels(source, "--label_fraction")
    names = source.list_names()

    def shuffle(label: int, members: np.ndarray) -> np.ndarray:
        # Floats such as 0.1 are not exact: 0.1 of 30 must be 3.
        if fraction * len(members) < 1 - 1e-9:
            raise InputError(
                f"{source.name}: label_fraction {fraction} is less than one sample of class "
                f"{source.class_names[label]!r}, which has {len(members)}. Take at least {1 / len(members):.4g}."
            )
        # The seed depends on the class's name and not on its index, because the same class may have another index in
        # another source. crc32, because Python's hash of a string differs from process to process.
        class_seed = zlib.crc32(source.class_names[label].encode())
        # Sorted, because a store has its rows in another order than the folder.
        return np.random.default_rng([seed, class_seed]).permutation(sorted(members, key=names.__getitem__))

    return source.select(np.sort(take_share(source.labels, fraction, shuffle)))


def take_share(labels: np.ndarray, fraction: float, shuffle: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """
    Indices of the same share of every class, at least one of each. Shares are nested: a smaller one takes the first of
    what a larger one takes.

    Args:
        labels: class indices `(N,)`.
        fraction: above 0, at most 1. Half an item counts as one.
        shuffle: (label, indices of its members) -> the indices in the order in which they are taken.
    """
    chosen = []
    for label in np.unique(labels):
        members = shuffle(int(label), np.flatnonzero(labels == label))
        chosen.append(members[: max(int(fraction * len(members) + 0.5), 1)])
    return np.concatenate(chosen)
