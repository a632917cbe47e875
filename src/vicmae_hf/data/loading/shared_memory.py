"""Sends tensors of workers through shared memory where it has room, and through pipes where it has none."""

import functools
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from ...errors import InputError


logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # on Linux; elsewhere shared memory has no size of its own
# Left to others: semaphores of workers that start later, NCCL.
RESERVED_BYTES = 16 * 2**20
RESERVED_FOR_SEMAPHORES = 2**20
ADVICE = (
    "Make it larger (docker run --shm-size=8g; in Kubernetes an emptyDir of medium Memory), or use fewer "
    "--dataloader_num_workers."
)


def move_to_shared_memory(values: torch.Tensor, reserved_bytes: int = RESERVED_BYTES) -> bool:
    """Moves a tensor to shared memory, unless less than `reserved_bytes` would stay free. Returns whether it did."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free < values.nbytes + reserved_bytes:
        return False
    try:
        values.share_memory_()
    except RuntimeError as error:  # another process took what was free
        name = re.search(r"file </(\S+)>: No space left", str(error))
        if not name:
            raise
        (SHARED_MEMORY / name[1]).unlink(missing_ok=True)  # torch leaves it behind, empty
        return False
    return True


def share_with_workers(values: torch.Tensor) -> torch.Tensor:
    """Moves a tensor, if it is not empty, to shared memory. Raises an InputError if there is no room."""
    if values.nbytes and not move_to_shared_memory(values, RESERVED_FOR_SEMAPHORES):
        raise InputError(f"{SHARED_MEMORY} is full, and loading in other processes needs shared memory. {ADVICE}")
    return values


@dataclass(frozen=True)
class PipedTensor:
    """
    A tensor on its way through a pipe. The process that unpickles it gets the tensor, with the same strides.

    Args:
        values: without gaps in memory, of a type that numpy has.
        for_want_of_memory: whether it should have gone through shared memory.
    """

    values: torch.Tensor
    for_want_of_memory: bool = False

    def __reduce__(self):
        flat = self.values.as_strided((self.values.numel(),), (1,))  # numpy would put channels first
        return receive_tensor, (flat.numpy(), self.values.shape, self.values.stride(), self.for_want_of_memory)


def receive_tensor(
    flat: np.ndarray, shape: tuple[int, ...], stride: tuple[int, ...], for_want_of_memory: bool
) -> torch.Tensor:
    if for_want_of_memory:
        warn_of_small_memory()
    return torch.from_numpy(flat).as_strided(shape, stride)


@functools.cache  # one warning in a process
def warn_of_small_memory() -> None:
    logger.warning(
        "%s is too small for the batches under way. What does not fit goes through pipes, which is slower. %s",
        SHARED_MEMORY,
        ADVICE,
    )


def collate_small(values: Sequence[Any]) -> Any:
    """Stacks values of samples as torch's `default_collate` does. Tensors go through the pipe, which is never full."""
    # default_collate itself would make a shared tensor of tensors.
    batch = torch.stack(list(values)) if isinstance(values[0], torch.Tensor) else default_collate(values)
    return PipedTensor(batch) if isinstance(batch, torch.Tensor) else batch


def send_large(values: torch.Tensor) -> torch.Tensor | PipedTensor:
    """Returns what a worker has to return in place of a large tensor."""
    return values if move_to_shared_memory(values) else PipedTensor(values, for_want_of_memory=True)
