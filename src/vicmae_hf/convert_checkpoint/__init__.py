"""Converts checkpoints of other code bases (see `conversion`)."""

from .checkpoints import convert_checkpoint, own_checkpoint, read_checkpoint
from .conversion import main
from .state_dicts import convert_state_dict, revert_state_dict


__all__ = [
    "convert_checkpoint",
    "convert_state_dict",
    "main",
    "own_checkpoint",
    "read_checkpoint",
    "revert_state_dict",
]
