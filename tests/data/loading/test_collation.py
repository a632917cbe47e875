import os
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vicmae_hf.data.loading.collation import BatchCollator, received_memories


class NumberedViews(Dataset):
    """Sample i holds i in every pixel but the first, channels last as views are, or contiguous."""

    def __init__(self, channels_last: bool = True, dtype=torch.uint8, sizes=(8,)):
        self.channels_last = channels_last
        self.dtype = dtype
        self.sizes = sizes

    def __len__(self):
        return 120

    def __getitem__(self, index):
        size = self.sizes[index % len(self.sizes)]
        views = torch.full((2, size, size, 3), index, dtype=self.dtype)
        views[0, 0, 0] = torch.tensor([1, 2, 3])
        views = views.permute(0, 3, 1, 2)
        return {"pixel_values": views if self.channels_last else views.contiguous(), "labels": index}


@pytest.mark.parametrize(
    ("channels_last", "dtype"), [(True, torch.uint8), (False, torch.uint8), (False, torch.float64)]
)
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_batches_of_workers_are_those_of_one_process(channels_last, dtype, context):
    dataset = NumberedViews(channels_last, dtype)
    expected = list(DataLoader(dataset, batch_size=7))  # torch's own collation; the last batch is smaller
    loader = DataLoader(
        dataset, batch_size=7, num_workers=2, collate_fn=BatchCollator(), multiprocessing_context=context
    )
    # All are held until the end: memory that is used again must not show through.
    batches = list(loader)
    assert len(batches) == len(expected) == 18
    for batch, own in zip(batches, expected, strict=True):
        assert batch.keys() == own.keys()
        assert batch["pixel_values"].dtype == dtype
        assert torch.equal(batch["pixel_values"], own["pixel_values"])
        assert torch.equal(batch["labels"], own["labels"])
        assert batch["pixel_values"][0].stride() == dataset[0]["pixel_values"].stride()
        batch["pixel_values"].zero_()  # nobody else's memory


def test_in_one_process():
    batch = next(iter(DataLoader(NumberedViews(), batch_size=5, collate_fn=BatchCollator())))
    assert batch["pixel_values"][:, 1, 2, 3, 4].tolist() == batch["labels"].tolist() == [0, 1, 2, 3, 4]
    assert batch["pixel_values"][0].stride() == NumberedViews()[0]["pixel_values"].stride()


def test_memory_is_used_again_once_it_was_received():
    collator = BatchCollator()
    views = torch.randint(0, 256, (3, 2, 3, 4, 5), dtype=torch.uint8)

    def send(batch):
        return bytes(ForkingPickler.dumps(collator.share(list(batch))))

    first, second = send(views), send(255 - views)
    assert len(collator.memories) == 2
    received = pickle.loads(first)
    assert torch.equal(received, views)
    third = send(views // 2)
    assert len(collator.memories) == 2
    assert torch.equal(received, views)
    assert torch.equal(pickle.loads(second), 255 - views)
    assert torch.equal(pickle.loads(third), views // 2)


def test_memories_of_workers_that_have_ended_are_given_up():
    def own_processes():
        return {process for process, _ in received_memories}

    for _ in range(3):
        list(DataLoader(NumberedViews(), batch_size=5, num_workers=2, collate_fn=BatchCollator()))
    before = own_processes()
    list(DataLoader(NumberedViews(), batch_size=5, num_workers=1, collate_fn=BatchCollator()))
    assert not before - {os.getpid()} & own_processes()
    # A batch and what waits in the queue, 2 by default; one is written while another is read.
    assert 1 <= len(received_memories) - sum(process == os.getpid() for process, _ in received_memories) <= 4


def test_views_of_different_sizes_are_an_error():
    loader = DataLoader(NumberedViews(sizes=(8, 1)), batch_size=4, num_workers=1, collate_fn=BatchCollator())
    with pytest.raises(RuntimeError, match="equal size"):
        next(iter(loader))
