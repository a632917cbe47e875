"""Labels of items that may have several each, as targets of 0 and 1 with one column a class."""

from collections.abc import Sequence

import numpy as np

from ...errors import InputError
from .tables import index_labels


MAX_TARGETS = 2**34  # bytes; more would be for indices that are numbers of something else


def index_label_lists(
    where: str,
    values: Sequence[Sequence[str | int] | None],
    class_names: list[str] | None = None,
) -> tuple[np.ndarray, list[str] | None]:
    """
    Turns lists of class names, or of indices, into targets, int8 `(N, C)`: 1 where an item has the class. An empty
    list is an item of no class. None stands for no label, and gives a row of -1.

    Args:
        where: what messages begin with.
        class_names: of the indices. Default: the sorted names; or no names, with as many classes as the largest index
            asks for.

    Raises:
        InputError: if a list has a negative number, something empty, or a class twice, as a list of 0 and 1 has.
    """
    labels, found_names = index_labels(where, [label for value in values for label in value or ()])
    class_names = found_names if class_names is None else class_names
    num_classes = len(class_names) if class_names is not None else int(labels.max(initial=-1)) + 1
    if (labels < 0).any() or labels.max(initial=-1) >= num_classes or len(values) * num_classes > MAX_TARGETS:
        raise InputError(
            f"{where}: expected lists of class names, or of class indices from 0 on, as labels; got lists with "
            + ("empty or negative ones." if (labels < 0).any() else f"the index {labels.max()}.")
        )
    targets = np.zeros((len(values), num_classes), dtype=np.int8)
    counts = np.array([len(value or ()) for value in values], dtype=np.int64)
    targets[np.repeat(np.arange(len(values)), counts), labels] = 1
    if len(twice := np.flatnonzero(targets.sum(1) < counts)):
        raise InputError(f"{where}: expected each class once in a list of labels, got {values[twice[0]]}.")
    targets[[row for row, value in enumerate(values) if value is None]] = -1
    return targets, class_names


def to_targets(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Class indices `(N,)`, or targets `(N, C)`, all below `num_classes` -> targets `(N, num_classes)`."""
    if labels.ndim == 2:
        labels = labels[:, :num_classes]  # a dataset may have more classes than occur
        return np.pad(labels, ((0, 0), (0, num_classes - labels.shape[1])))
    targets = np.zeros((len(labels), num_classes), dtype=np.int8)
    targets[np.arange(len(labels)), labels] = 1
    return targets


def renumber(labels: np.ndarray, mapping: np.ndarray, num_classes: int) -> np.ndarray:
    """Gives the classes of labels, `(N,)` or `(N, C)`, the numbers `mapping`; -1 is for classes that do not occur."""
    if labels.ndim == 1:
        return mapping[labels]
    targets = np.zeros((len(labels), num_classes), dtype=np.int8)
    targets[:, mapping[mapping >= 0]] = labels[:, mapping >= 0]
    return targets


def used_classes(labels: np.ndarray) -> np.ndarray:
    """Lists the classes that occur in labels `(N,)` or `(N, C)`, ascending."""
    return np.unique(labels) if labels.ndim == 1 else np.flatnonzero((labels > 0).any(0))


def has_no_label(labels: np.ndarray) -> np.ndarray:
    """Whether each item of labels, `(N,)` or `(N, C)`, is without, `(N,)`."""
    return labels < 0 if labels.ndim == 1 else (labels < 0).any(1)


def name_labels(labels: np.ndarray, class_names: Sequence[str]) -> list[str | list[str] | None]:
    """Names the class of each item, or lists those of targets `(N, C)`; None where there is no label."""
    if labels.ndim == 1:
        return [class_names[label] if label >= 0 else None for label in labels.tolist()]
    return [
        None if missing else [class_names[index] for index in np.flatnonzero(row)]
        for row, missing in zip(labels, has_no_label(labels), strict=True)
    ]
