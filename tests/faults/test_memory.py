"""Over thousands of updates and of files, neither memory nor the number of open files grows."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from launching import ON_CPU, script_path
from tiny_models import tiny_overrides
from video_files import numbered_frames, write_video


NUM_UPDATES = 2_000
NUM_VIDEOS = 10_000
# From the second quarter, when the run is warm, to the last. In between each process reads 2,000 files or more, or
# makes 1,000 updates. If it kept one view of each file (3 KiB), it would grow by 6 MiB.
MAX_MIB = 4
# Batches come in shared memory, a file for each that is under way. Two workers have four each; how many there are at
# once depends on chance.
MAX_OPEN_FILES = 8
READ_VIDEOS = str(Path(__file__).with_name("read_videos.py"))
SETTINGS = f"""
config_overrides: "{tiny_overrides()}"
image_size: 32
per_device_train_batch_size: 4
max_train_steps: {NUM_UPDATES}
warmup_epochs: 1
contrastive_start_epoch: 1
checkpointing_steps: 100
save_total_limit: 2
logging_steps: 10
dataloader_num_workers: 2
"""


@dataclass
class Sample:
    """Of a process, when so many updates or videos were done: resident memory, and how many files it has open."""

    done: int
    mib: float
    num_open: int


def write_videos(folder: Path, count: int) -> Path:
    """Ten videos under many names (hard links). To a dataset each name is a file, which it opens and decodes."""
    folder.mkdir()
    for index in range(10):
        write_video(folder / f"{index:05}.mp4", numbered_frames(8 + index, height=48, width=48, seed=index))
    for index in range(10, count):
        os.link(folder / f"{index % 10:05}.mp4", folder / f"{index:05}.mp4")
    return folder


def watch(log: Path, *command) -> list[list[Sample]]:
    """
    Runs a program. Returns samples of it and of each of its workers, the main process first. The last line of `log`
    says how much is done. Processes that end before anything is done are left out: they only ask for something.
    """
    output = log.with_name("output.txt")
    with output.open("w") as file:
        program = subprocess.Popen(
            [sys.executable, *map(str, command)], env=os.environ | ON_CPU, stdout=file, stderr=file
        )
    main, samples = psutil.Process(program.pid), defaultdict(list)
    while program.poll() is None:
        time.sleep(0.1)
        lines = log.read_text().splitlines() if log.exists() else []
        done = json.loads(lines[-1])["step"] if lines else 0
        with suppress(psutil.Error):  # one that has just ended
            for process in [main, *main.children()]:
                samples[process.pid].append(Sample(done, process.memory_info().rss / 2**20, process.num_fds()))
    assert program.returncode == 0, output.read_text()
    return [each for each in samples.values() if each[-1].done]


def check_flat(samples: list[Sample], total: int) -> str:
    """Compares the second quarter with the last; returns the figures."""
    parts = [[each for each in samples if start <= each.done / total < start + 0.25] for start in (0.25, 0.75)]
    assert min(map(len, parts)) >= 10
    warm, end = (statistics.median(each.mib for each in part) for part in parts)
    warm_open, end_open = (max(each.num_open for each in part) for part in parts)
    figures = f"{warm:.1f} -> {end:.1f} MiB, {warm_open} -> {end_open} open files"
    assert end - warm <= MAX_MIB, figures
    assert end_open - warm_open <= MAX_OPEN_FILES, figures
    return figures


def report(what: str, processes: list[list[Sample]], total: int) -> None:
    figures = "; ".join(check_flat(samples, total) for samples in processes)
    print(f"| memory and open files, {what} | {len(processes)} processes watched | all flat | {figures} |")


@pytest.mark.faults
def test_over_2000_updates(tmp_path):
    data = write_videos(tmp_path / "videos", 10)
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"train_data: [{data}]\noutput_dir: {tmp_path}/run\n{SETTINGS}")
    log = tmp_path / "run" / "metrics.jsonl"
    log.parent.mkdir()
    processes = watch(log, script_path("run_pretraining.py"), settings)
    assert len(processes) == 3
    report(f"{NUM_UPDATES} updates with 2 workers", processes, NUM_UPDATES)


@pytest.mark.faults
@pytest.mark.parametrize("num_workers", [0, 2])
def test_over_10000_videos(num_workers, tmp_path):
    folder, log = write_videos(tmp_path / "videos", NUM_VIDEOS), tmp_path / "log.jsonl"
    processes = watch(log, READ_VIDEOS, folder, num_workers, log)
    assert len(processes) == 1 + num_workers
    report(f"{NUM_VIDEOS} videos (hard links of ten) with {num_workers} workers", processes, NUM_VIDEOS)
