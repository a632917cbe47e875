"""Workers where shared memory is small, as in a container: 64 MB, less than four batches of the default size."""

import pickle
import shutil
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vicmae_hf.data.loading import shared_memory
from vicmae_hf.data.loading.collation import BatchCollator
from vicmae_hf.data.media.bad_files import BadFiles
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.collecting import collate_views, send_views


def limit(monkeypatch, free_bytes: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_bytes))
    shared_memory.warn_of_small_memory.cache_clear()


class Samples(Dataset):
    """As pretraining has them: views with the channels last, the noise of masks, a name, a label."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        views = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
        return {
            "pixel_values": views,
            "noise": torch.rand(2, 7, generator=generator),
            "name": str(index),
            "label": index,
        }


@pytest.mark.parametrize(("free_bytes", "warnings"), [(0, 1), (2**40, 0)])
def test_batches_that_do_not_fit_come_all_the_same_with_one_warning(free_bytes, warnings, monkeypatch, caplog):
    limit(monkeypatch, free_bytes)
    expected = list(DataLoader(Samples(), batch_size=5))
    batches = list(DataLoader(Samples(), batch_size=5, num_workers=2, collate_fn=BatchCollator()))
    for batch, own in zip(batches, expected, strict=True):
        assert batch.keys() == own.keys()
        for name in ("pixel_values", "noise", "label"):
            assert torch.equal(batch[name], own[name])
        assert batch["name"] == own["name"]
        assert batch["pixel_values"].stride() == own["pixel_values"].stride()
        batch["pixel_values"].zero_()  # its own, and not read-only
    assert len(caplog.messages) == warnings
    assert all(
        "/dev/shm" in text and "--shm-size" in text and "--dataloader_num_workers" in text for text in caplog.messages
    )


def test_a_batch_that_does_not_fit_beside_others_takes_the_pipe_until_one_of_them_was_received(monkeypatch):
    """Memory for one batch: the second goes through the pipe, the third uses the first one's memory again."""
    collator, views = BatchCollator(), Samples()[0]["pixel_values"]
    limit(monkeypatch, 2**40)
    first = ForkingPickler.dumps(collator.share([views]))
    limit(monkeypatch, 0)
    second = ForkingPickler.dumps(collator.share([views + 1]))
    assert torch.equal(pickle.loads(first)[0], views)
    third = ForkingPickler.dumps(collator.share([views + 2]))
    assert torch.equal(pickle.loads(second)[0], views + 1)
    assert torch.equal(pickle.loads(third)[0], views + 2)
    assert len(collator.memories) == 1


@pytest.mark.parametrize("free_bytes", [0, 2**40])
def test_views_of_evaluations_too(free_bytes, monkeypatch):
    limit(monkeypatch, free_bytes)
    samples = [
        {"index": 4, "pixel_values": torch.rand(3, 2, 3, 4, 4), "weights": torch.rand(3, 2).T},
        {"index": 5, "error": "cannot be read", "is_transient": False},
        {"index": 6, "pixel_values": torch.rand(1, 2, 3, 4, 4), "weights": torch.ones(2, 1)},
    ]
    for part in (samples, samples[1:2]):  # of the second, no item could be read
        expected, found = collate_views(part), pickle.loads(ForkingPickler.dumps(send_views(part)))
        assert torch.equal(found["indices"], expected["indices"])
        assert found["failures"] == expected["failures"]
        for own, other in zip(found["weights"], expected["weights"], strict=True):
            assert torch.equal(own, other)
        if expected["pixel_values"] is None:
            assert found["pixel_values"] is None
        else:
            assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_no_room_at_all_is_said_in_one_line(monkeypatch):
    limit(monkeypatch, 2**20)
    with pytest.raises(InputError, match=r"/dev/shm is full.*--shm-size.*--dataloader_num_workers") as caught:
        BadFiles(None, 1, 1.0).watch_workers(2)
    assert "\n" not in str(caught.value)
    BadFiles(None, 1, 1.0).watch_workers(0)  # no workers, no shared memory


# What happens when other processes take the room after it was looked at. Only a real disk shows what torch leaves.
PROGRAM = """
import os, torch
from vicmae_hf.data.loading.shared_memory import move_to_shared_memory
small, large = torch.ones(2**20, dtype=torch.uint8), torch.ones(8 * 2**20, dtype=torch.uint8)
print(move_to_shared_memory(large), move_to_shared_memory(large, -(2**40)), large.is_shared(), os.listdir("/dev/shm"))
print(move_to_shared_memory(small, 0), small.is_shared(), int(large.sum() + small.sum()) == 9 * 2**20)
"""
IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*IN_NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="this user may not mount anything, not even in a namespace of its own",
)
@pytest.mark.slow
def test_on_a_file_system_that_is_really_full():
    mount = "mount -t tmpfs -o size=4m tmpfs /dev/shm && exec"
    command = [*IN_NAMESPACE, "sh", "-c", f'{mount} "$0" -c "$1"', sys.executable, PROGRAM]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.stdout.splitlines() == ["False False False []", "True True True"], process.stderr
