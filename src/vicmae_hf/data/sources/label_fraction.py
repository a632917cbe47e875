"""Parts of the labels: the semi-supervised study of Table 5."""

import zlib

import numpy as np

from ...errors import InputError
from .labelled import LabelledSource


def select_label_fraction(source: LabelledSource, fraction: float, seed: int) -> LabelledSource:
    """
    The same share of every class, drawn by `seed` and the items' names alone: the same of a folder and of a store that
    was packed from it. Nested: what belongs to 5 % belongs to 10 % as well.

    Raises:
        InputError: if the share is not in (0, 1], or is less than one sample of some class.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"label_fraction is a share above 0 and at most 1, got {fraction}.")
    chosen = []
    labels = source.labels
    all_names = source.items.list_names()
    names = [all_names[index] for index in source.indices]
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label), key=names.__getitem__)
        # Fractions such as 0.1 are not exact: 0.1 of 30 shall be 3.
        if fraction * len(members) < 1 - 1e-9:
            raise InputError(
                f"{source.name}: label_fraction {fraction} is less than one sample of class "
                f"{source.class_names[label]!r}, which has {len(members)}. Take at least {1 / len(members):.4g}."
            )
        # By the name of the class, whose index differs from source to source.
        class_seed = zlib.crc32(source.class_names[label].encode())
        order = np.random.default_rng([seed, class_seed]).permutation(members)
        chosen.append(order[: int(fraction * len(members) + 0.5)])
    return source.select(np.sort(np.concatenate(chosen)))
