"""Brings batches from the workers that make them to the process that trains."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils.data import default_collate, get_worker_info


# Bytes before the pixels of a batch. The first one is 1 while the batch is under way: the worker sees without a
# message when the memory is free. 64 bytes, so that the pixels stay aligned.
HEADER_BYTES = 64


class BatchCollator:
    """
    Stacks samples `{"pixel_values": tensor, ...}` as torch's `default_collate` does, and keeps their memory layout.

    Workers send the pixels through shared memory that they use again. torch takes new memory for every batch, and its
    pages may cost half as much time as decoding what is written there (docs/data.md). What does not fit is piped.
    """

    def __init__(self):
        self.memories: list[torch.Tensor] = []  # of this worker

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
        if get_worker_info() is None:  # no worker: nothing has to be sent
            return default_collate(samples)
        from .shared_memory import collate_small  # only workers need it

        columns = {name: [sample[name] for sample in samples] for name in samples[0]}
        pixels = self.share(columns.pop("pixel_values"))
        return {"pixel_values": pixels, **{name: collate_small(values) for name, values in columns.items()}}

    def share(self, pixel_values: Sequence[torch.Tensor]) -> Any:
        """Returns what is sent in place of the stacked pixels."""
        from .shared_memory import PipedTensor, move_to_shared_memory

        first = torch.empty_like(pixel_values[0])  # strides without gaps, channels last if the views are
        num_bytes = HEADER_BYTES + len(pixel_values) * first.nbytes
        layout = Layout(first.dtype, (len(pixel_values), *first.shape), (first.numel(), *first.stride()))
        number = self.find_free_memory(num_bytes)
        is_new = number is None
        if is_new:
            memory, number = torch.zeros(num_bytes, dtype=torch.uint8), len(self.memories)
            if not move_to_shared_memory(memory):
                return PipedTensor(torch.stack(list(pixel_values), out=layout.view(memory)), for_want_of_memory=True)
            self.memories.append(memory)
        memory = self.memories[number]
        memory[0] = 1
        torch.stack(list(pixel_values), out=layout.view(memory))  # (B, ...), straight to where it is sent from
        return SharedPixels((os.getpid(), number), memory if is_new else None, layout)

    def find_free_memory(self, num_bytes: int) -> int | None:
        """
        Finds the number of a memory of this size whose last batch was received. There are never more memories than
        batches were under way at once.
        """
        for number, memory in enumerate(self.memories):
            if len(memory) == num_bytes and memory[0] == 0:
                return number
        return None


@dataclass(frozen=True)
class Layout:
    """Type, size and strides of a batch in a memory."""

    dtype: torch.dtype
    size: Sequence[int]
    stride: Sequence[int]

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[HEADER_BYTES:].view(self.dtype).as_strided(self.size, self.stride)


@dataclass(frozen=True)
class SharedPixels:
    """
    A batch in shared memory. The process that unpickles it gets a tensor of its own, which frees the memory.

    Args:
        key: names the memory: the worker's process and a number.
        memory: sent only the first time, because the receiver has to wait for the worker to hand it over.
        layout: of the batch.
    """

    key: tuple[int, int]
    memory: torch.Tensor | None
    layout: Layout

    def __reduce__(self):
        return receive_pixels, (self.key, self.memory, self.layout)


received_memories: dict[tuple[int, int], torch.Tensor] = {}


def receive_pixels(key: tuple[int, int], memory: torch.Tensor | None, layout: Layout) -> torch.Tensor:
    if memory is not None:
        # Another run in this process starts new workers, and the memories of dead ones would stay.
        for process, number in list(received_memories):
            if not psutil.pid_exists(process):
                del received_memories[process, number]
        received_memories[key] = memory
    memory = received_memories[key]
    pixel_values = layout.view(memory).clone()  # (B, ...); training may hold it while the worker writes the next batch
    memory[0] = 0
    return pixel_values
