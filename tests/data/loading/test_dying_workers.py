"""Workers of a loader that die: which file they were reading, and that the samples stay the same."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import Forked, run_here
from PIL import Image
from tiny_models import tiny_overrides

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.loading import loader
from vicmae_hf.data.loading.loader import EpochBatchSampler, SteadyBatches, build_dataloader
from vicmae_hf.data.media.bad_files import BadFilesError
from vicmae_hf.errors import InputError


NUM_FILES = 12


@pytest.fixture
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for index in range(NUM_FILES):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(path / f"{index:02}.png")
    return path


class Deadly(torch.utils.data.Dataset):
    """A dataset whose workers die at some files, as in a decoder that crashes. They die only while `deaths` last."""

    def __init__(self, dataset, deadly, signal_number, deaths=10**6):
        self.dataset = dataset
        self.deadly = deadly
        self.signal_number = signal_number
        self.deaths = torch.tensor([deaths]).share_memory_()
        read_pair = dataset.read_pair

        def read_or_die(item, generator):
            if os.path.basename(item.name) in deadly and self.deaths[0] > 0:
                self.deaths -= 1
                os.kill(os.getpid(), signal_number)
            return read_pair(item, generator)

        dataset.read_pair = read_or_die

    def __getitem__(self, key):
        return self.dataset[key]


def batches_of(dataset, bad_files, num_workers, batch_size=2, num_epochs=2):
    def open_loader(num_batches):
        sampler = EpochBatchSampler([NUM_FILES], NUM_FILES, batch_size, num_epochs, start_batch=num_batches)
        return build_dataloader(dataset, sampler, num_workers, pin_memory=False)

    return SteadyBatches(open_loader, bad_files, num_workers)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGSEGV, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_file_that_kills_workers_is_named_and_replaced_and_all_other_samples_stay(folder, number, tmp_path):
    record = tmp_path / "bad_files.jsonl"
    sound = load_frame_pairs(folder, 16)
    deadly = load_frame_pairs(folder, 16, bad_files_path=record, max_bad_files=0.5)
    names = [os.path.basename(sound.item(index).name) for index in range(NUM_FILES)]
    # An earlier loader of the process, whose handler of dead children torch leaves behind.
    next(iter(torch.utils.data.DataLoader(sound, num_workers=1)))
    expected = torch.cat([b["pixel_values"] for b in batches_of(sound, sound.bad_files, 0)])
    wrapped = Deadly(deadly, {"05.png"}, number)
    found = torch.cat([batch["pixel_values"] for batch in batches_of(wrapped, deadly.bad_files, 2)])
    keys = [key for batch in EpochBatchSampler([NUM_FILES], NUM_FILES, 2, 2) for key in batch]
    same = [torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    assert same == [names[index] != "05.png" for _, _, index in keys]
    assert list(deadly.bad_files.errors) == [str(folder / "05.png")]
    assert "workers that were reading it died" in record.read_text()


def test_deaths_at_many_files_are_bounded_by_the_share_of_bad_files(folder, tmp_path):
    dataset = load_frame_pairs(folder, 16, bad_files_path=tmp_path / "bad_files.jsonl", max_bad_files=0.1)
    wrapped = Deadly(dataset, {"01.png", "03.png"}, signal.SIGKILL)
    with pytest.raises(BadFilesError, match="2 of 12 files could not be read"):
        list(batches_of(wrapped, dataset.bad_files, 2))


class DyingAtOnce(torch.utils.data.Dataset):
    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow  # torch waits for 5 s at each death
def test_workers_that_die_again_and_again_without_a_file_end_the_run(folder, monkeypatch):
    monkeypatch.setattr(loader, "MAX_DEATHS", 1)  # torch waits for 5 s before it takes a worker for dead
    dataset = load_frame_pairs(folder, 16)
    with pytest.raises(InputError, match="Workers died 2 times without a batch in between"):
        list(batches_of(DyingAtOnce(), dataset.bad_files, 1))


@pytest.mark.slow  # two trainings, one of them a process with workers of its own
def test_a_training_survives_the_death_of_a_worker_and_gives_the_same_losses(folder, tmp_path):
    """Killed once while it reads, as by the system that is short of memory: in a real run, from outside."""

    def flags(output_dir):
        return [
            *("--train_data", folder, "--output_dir", output_dir, "--image_size", 32),
            *(
                "--config_overrides",
                tiny_overrides(),
                "--num_train_epochs",
                15,
                "--warmup_epochs",
                1,
                "--contrastive_start_epoch",
                1,
                "--logging_steps",
                1,
            ),
            *("--dataloader_num_workers", 2, "--per_device_train_batch_size", 4, "--checkpointing_steps", 0),
        ]

    process = Forked("run_pretraining.py", *flags(tmp_path / "killed"))
    log = tmp_path / "killed" / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.is_running()
        time.sleep(0.01)
    children = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read_text().split()
    workers = [child for child in children if "pt_data_worker" in Path(f"/proc/{child}/comm").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[-1]), signal.SIGKILL)
    finished = process.finish()
    assert finished.returncode == 0, finished.stderr
    assert "A loading worker died" in finished.stderr
    other = run_here("run_pretraining.py", *flags(tmp_path / "other"))
    assert other.returncode == 0, other.stderr

    def losses(name):
        return [line.split('"pairs_per')[0] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert losses("killed") == losses("other")
