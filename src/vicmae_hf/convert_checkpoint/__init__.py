"""Converts checkpoints of other code bases (see `conversion`)."""

from .conversion import (
    convert_checkpoint,
    convert_state_dict,
    main,
    own_checkpoint,
    read_checkpoint,
    revert_state_dict,
)


__all__ = [
    "convert_checkpoint",
    "convert_state_dict",
    "main",
    "own_checkpoint",
    "read_checkpoint",
    "revert_state_dict",
]
