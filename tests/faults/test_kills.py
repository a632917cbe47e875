"""
A pretraining that is killed again and again ends as one that was never killed, to the bit.

What lies on disk after a kill tells where it struck: in a save, a new checkpoint is half written under another name;
in the rotation, an old one is half removed.
"""

import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from launching import Forked, Together
from pictures import drawn
from safetensors.torch import load_file
from tiny_models import tiny_overrides
from video_files import numbered_frames, write_video


NUM_RANDOM_KILLS = 20
KILLS_AT_THE_START = 5  # of these; the others strike while the run trains
START_SECONDS = 0.4  # about what a process needs before its first update

# Dropout and stochastic depth make a resumed run differ unless all random numbers are the same. Lines of the log,
# checkpoints and epochs end at different updates, so that kills find every combination of them.
SETTINGS = f"""
config_overrides: "{tiny_overrides(hidden_dropout_prob=0.1, drop_path_rate=0.2)}"
image_size: 32
per_device_train_batch_size: 2
num_train_epochs: 40
base_learning_rate: 0.05
warmup_epochs: 1
contrastive_start_epoch: 20
checkpointing_steps: 4
save_total_limit: 2
logging_steps: 3
dataloader_num_workers: 2
"""

# Name -> size, and when it changed, of all that lies in a folder.
Listing = dict[str, tuple[int, int]]


def list_folder(folder: Path) -> Listing:
    listing = {}
    for path in folder.glob("*"):
        with suppress(FileNotFoundError):  # gone meanwhile
            listing[path.name] = (path.stat().st_size, path.stat().st_mtime_ns)
    return listing


def appears(pattern: str) -> Callable[[Listing, Listing], bool]:
    return lambda before, now: any(re.fullmatch(pattern, name) for name in now.keys() - before.keys())


def log_grows(before: Listing, now: Listing) -> bool:
    return now.get("metrics.jsonl", (0,))[0] > before.get("metrics.jsonl", (1 << 60,))[0]


def changes(name: str) -> Callable[[Listing, Listing], bool]:
    return lambda before, now: name in now and now[name] != before.get(name)


# A moment -> how a listing differs from the one before when it has come, and how many seconds later at most.
AIMED = {
    "a save begins": (appears(r"\.partial-checkpoint-\d+"), 0.0),
    "within a save": (appears(r"\.partial-checkpoint-\d+"), 0.02),
    "a checkpoint gets its name": (appears(r"checkpoint-\d+"), 0.0),
    "an old checkpoint is removed": (appears(r"\.partial-checkpoint-\d+-old"), 0.0),
    "the log has grown": (log_grows, 0.0),
}
# The last two lives of a run.
AIMED_AT_THE_END = {
    "the final model is written": (changes("model.safetensors"), 0.0),
    "the report is written": (changes("model.safetensors"), 0.3),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for index in range(12):
        write_video(folder / f"{index:02}.mp4", numbered_frames(12 + index, height=48, width=48, seed=index))
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(f"train_data: [{folder}]\n{SETTINGS}")
    return path


def start(num_processes: int, *flags) -> Forked | Together:
    with drawn():  # else the last kill would strike when there is nothing left to write
        if num_processes == 1:
            return Forked("run_pretraining.py", *flags)
        return Together("run_pretraining.py", *flags, num_processes=num_processes)


def wait_until(process: Forked | Together, folder: Path, comes: Callable[[Listing, Listing], bool]) -> None:
    before = list_folder(folder)
    while True:
        now = list_folder(folder)
        if comes(before, now):
            return
        before = now
        assert process.is_running(), f"the run has ended: {process.finish().stderr}"


def read_lines(path: Path) -> list[dict]:
    """Of a log, without what depends on the speed of the machine."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        {k: v for k, v in line.items() if not k.endswith(("_per_second", "wait_share", "memory_mib"))}
        for line in lines
    ]


def list_steps(folder: Path) -> list[int]:
    """Of the checkpoints."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def flatten(value, name: str = "") -> dict:
    """Nested dicts and lists -> each tensor or number by its path, tensors as bytes: so -0 is not 0, NaN is NaN."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for index, part in items for key, leaf in flatten(part, f"{name}/{index}").items()}
    if isinstance(value, torch.Tensor):
        return {name: (value.dtype, value.shape, value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}
    return {name: value}


def assert_same_weights(folder: Path, expected: Path) -> None:
    found = flatten(load_file(folder / "model.safetensors"))
    assert found == flatten(load_file(expected / "model.safetensors")), folder


def assert_same_checkpoint(folder: Path, expected: Path) -> None:
    assert_same_weights(folder, expected)
    states = [flatten(torch.load(path / "optimizer.bin", weights_only=True)) for path in (folder, expected)]
    assert states[0] == states[1], folder
    assert len(states[0]) > 100
    assert json.loads((folder / "training_state.json").read_text())["step"] == int(folder.name.split("-")[1])


class KilledRun:
    """A run in `folder`, of many lives. After each kill, what it left is compared with an uninterrupted run."""

    def __init__(self, folder: Path, reference: Path, settings: Path, num_processes: int, seed: int):
        self.folder = folder
        self.reference = reference
        self.arguments = (num_processes, settings, "--output_dir", folder, "--resume_from_checkpoint", "latest")
        self.random = random.Random(seed)
        self.found = Counter()  # where kills struck
        self.repeated: list[int] = []  # for each kill, updates that were made and must be made again

    def live(self, comes: Callable[[Listing, Listing], bool] | None, latest: float) -> None:
        """Goes on until a moment has come (None: at once), and at most `latest` seconds more. Then it is killed."""
        steps = list_steps(self.folder)
        process = start(*self.arguments)
        try:
            if comes is not None:
                wait_until(process, self.folder, comes)
            if latest:
                time.sleep(self.random.uniform(0, latest))
        finally:
            process.kill()
        ended = process.finish()
        assert ended.returncode == -signal.SIGKILL, f"it ended before the kill: {ended.stderr}"
        self.check_leftovers(steps)

    def check_leftovers(self, steps_before: list[int]) -> None:
        steps = list_steps(self.folder)
        assert max(steps, default=0) >= max(steps_before, default=0)
        for step in steps:
            assert_same_checkpoint(self.folder / f"checkpoint-{step}", self.reference / f"checkpoint-{step}")
        lines = read_lines(self.folder / "metrics.jsonl")
        # Also what is there beyond the newest checkpoint.
        assert lines == read_lines(self.reference / "metrics.jsonl")[: len(lines)]
        assert not (self.folder / "all_results.json").exists()
        self.repeated.append(max(lines[-1]["step"] - max(steps, default=0), 0) if lines else 0)
        names = list_folder(self.folder)
        if appears(r"\.partial-checkpoint-\d+-old")({}, names):
            self.found["in the rotation"] += 1
        elif appears(r"\.partial-checkpoint-\d+")({}, names):
            self.found["in a save"] += 1
        else:
            self.found["elsewhere"] += 1

    def finish(self) -> None:
        finished = start(*self.arguments).finish()
        assert finished.returncode == 0, finished.stderr


@pytest.mark.faults
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_killed_at_any_moment_ends_as_if_it_never_was(num_processes, settings, tmp_path):
    reference, folder = tmp_path / "uninterrupted", tmp_path / "killed"
    # It keeps all its checkpoints, to be compared with.
    finished = start(num_processes, settings, "--output_dir", reference, "--save_total_limit", 1000).finish()
    assert finished.returncode == 0, finished.stderr
    results = json.loads((reference / "all_results.json").read_text())
    num_steps = results["num_steps"]

    run = KilledRun(folder, reference, settings, num_processes, seed=num_processes)
    lives = [(None, START_SECONDS)] * KILLS_AT_THE_START
    # At most so long that the run is not done before the last kill.
    lives += [(log_grows, results["train_seconds"] / NUM_RANDOM_KILLS)] * (NUM_RANDOM_KILLS - KILLS_AT_THE_START)
    lives += AIMED.values()
    run.random.shuffle(lives)
    for comes, latest in lives:
        run.live(comes, latest)
    while not run.found["in the rotation"]:  # over in a millisecond, and easily missed
        run.live(*AIMED["an old checkpoint is removed"])
    for comes, latest in AIMED_AT_THE_END.values():
        run.live(comes, latest)
    run.finish()

    assert_same_weights(folder, reference)
    assert list_steps(folder) == [num_steps - 4, num_steps]
    for step in list_steps(folder):
        assert_same_checkpoint(folder / f"checkpoint-{step}", reference / f"checkpoint-{step}")
    assert read_lines(folder / "metrics.jsonl") == read_lines(reference / "metrics.jsonl")
    assert {step for step in range(1, num_steps + 1) if step % 3 == 0} <= {
        line["step"] for line in read_lines(folder / "metrics.jsonl")
    }
    assert (folder / "bad_files.jsonl").read_text() == (reference / "bad_files.jsonl").read_text()
    assert not list(folder.glob(".partial*"))
    assert run.found["in a save"] > 0
    tried = len(run.repeated)
    where = ", ".join(f"{count} {place}" for place, count in sorted(run.found.items()))
    print(
        f"| kill -9 of the process group, {num_processes} process{'es' * (num_processes > 1)} | {tried}: "
        f"{NUM_RANDOM_KILLS} random, {tried - NUM_RANDOM_KILLS} aimed ({where}) | {tried} | none; "
        f"{sum(run.repeated)} logged updates of {num_steps} made again, {max(run.repeated)} after one kill at most |"
    )
