"""Batches on their way from the workers that make them to the process that trains."""

from collections.abc import Sequence

import torch
from torch.utils.data import default_collate, get_worker_info


# Bytes before the pixels of a batch. The first is 1 until they have been received; 64 keep the pixels aligned.
HEADER_BYTES = 64


class BatchCollator:
    """
    Stacks samples `{"pixel_values": uint8 tensor, ...}` as torch's `default_collate` does, in the memory layout that
    they have. Workers send the pixels through shared memory that they use again: the pages of new memory, which torch
    takes for every batch, may cost half as much as the decoding of what is written there (docs/loading_speed.md).
    """

    def __init__(self):
        self.memories: list[torch.Tensor] = []  # of this worker

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, "torch.Tensor | SharedPixels"]:
        if get_worker_info() is None:
            return default_collate(samples)
        others = [{name: value for name, value in sample.items() if name != "pixel_values"} for sample in samples]
        pixels = self.share([sample["pixel_values"] for sample in samples])
        return {"pixel_values": pixels, **default_collate(others)}

    def share(self, pixel_values: Sequence[torch.Tensor]) -> "SharedPixels":
        first = torch.empty_like(pixel_values[0])  # as dense as a copy would be
        size, stride = (len(pixel_values), *first.shape), (first.numel(), *first.stride())
        memory = self.free_memory(HEADER_BYTES + len(pixel_values) * first.numel())
        memory[0] = 1
        torch.stack(list(pixel_values), out=memory.as_strided(size, stride, HEADER_BYTES))
        return SharedPixels(memory, size, stride)

    def free_memory(self, num_bytes: int) -> torch.Tensor:
        """Memory of this size whose last batch has been received; there are soon as many as batches under way."""
        for memory in self.memories:
            if len(memory) == num_bytes and memory[0] == 0:
                return memory
        self.memories.append(torch.zeros(num_bytes, dtype=torch.uint8).share_memory_())
        return self.memories[-1]


class SharedPixels:
    """A batch in shared memory. The process that unpickles it gets a tensor of its own, and the memory is free."""

    def __init__(self, memory: torch.Tensor, size: Sequence[int], stride: Sequence[int]):
        self.memory = memory
        self.size = size
        self.stride = stride

    def __reduce__(self):
        return receive_pixels, (self.memory, self.size, self.stride)


def receive_pixels(memory: torch.Tensor, size: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    pixel_values = memory.as_strided(size, stride, HEADER_BYTES).clone()
    memory[0] = 0
    return pixel_values
