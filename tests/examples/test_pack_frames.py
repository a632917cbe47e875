"""`pack_frames.py` as users run it: killed and run again, and in two ranks."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from launching import TORCHRUN, command, environment, run
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data.labelled import open_labelled
from vicmae_hf.data.packing import PackingInput, PackingSettings, pack_frames


NUM_SHARDS = 8
SETTINGS = {"frames_per_second": 0.0, "format": "webp", "videos_per_shard": 2}
FLAGS = [flag for name, value in SETTINGS.items() for flag in (f"--{name}", value)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """ROOT/CLASS_NAME/FILE of 15 videos, and one that cannot be read."""
    root = tmp_path_factory.mktemp("videos") / "input"
    for index in range(15):
        folder = root / ("odd" if index % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{index}.mp4", numbered_frames(40, 96, 128, seed=index))
    (root / "odd" / "broken.mp4").write_bytes(b"no video" * 100)
    return root


@pytest.fixture(scope="module")
def uninterrupted(videos, tmp_path_factory):
    """Files of a store that one process packed, in this one."""
    store = tmp_path_factory.mktemp("uninterrupted") / "store"
    pack_frames(PackingInput.open(videos, labelled=True), store, PackingSettings(**SETTINGS))
    return content(store)


def content(store):
    # store.json tells the command.
    return {path.name: path.read_bytes() for path in Path(store).iterdir() if path.name != "store.json"}


def flags(videos, store):
    return ["--input", videos, "--output", store, "--labelled", *FLAGS]


def child_processes(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def wait_until(condition, seconds=60):
    for _ in range(seconds * 100):
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(videos, uninterrupted, tmp_path):
    store = tmp_path / "store"
    script = command("pack_frames.py", *flags(videos, store), launcher=[])
    with subprocess.Popen(
        [*script, "--num_proc", "2"], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        assert wait_until(lambda: list(store.glob("data-*.arrow")))
        workers = child_processes(process.pid)
        process.kill()
    assert len(workers) >= 2
    # Nobody is left who would go on writing.
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers), seconds=10)
    whole = {path.name: path.read_bytes() for path in store.glob("data-*.arrow")}
    assert 0 < len(whole) < NUM_SHARDS
    assert not (store / "state.json").exists()
    assert all(uninterrupted[name] == data for name, data in whole.items())
    times = {name: (store / name).stat().st_mtime_ns for name in whole}

    finished = subprocess.run(script, env=environment(), capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert content(store) == uninterrupted
    assert {name: (store / name).stat().st_mtime_ns for name in whole} == times
    lines = [line.split() for line in finished.stdout.splitlines()]
    assert lines[0][1:] == ["8", "shards,", "finished"]
    assert lines[1][-1] == "15"
    assert lines[2] == ["frames", "600"]
    assert lines[3] == ["bytes", f"{sum(len(data) for name, data in uninterrupted.items() if '.arrow' in name):,}"]
    assert lines[4] == ["failures", "1", f"{store}/bad_files.jsonl"]


def test_two_ranks_write_one_store(videos, uninterrupted, tmp_path):
    store = tmp_path / "store"
    process = run("pack_frames.py", *flags(videos, store), launcher=TORCHRUN)
    assert process.returncode == 0, process.stderr
    assert content(store) == uninterrupted
    source = open_labelled(store)
    assert source.class_names == ["even", "odd"]
    assert source.labels.tolist().count(0) == 8
    for index in (0, 14):
        assert read_numbers(source[index].open("pyav").get_frames([39, 7])) == [39, 7]


def test_a_rank_writes_its_share_only(videos, uninterrupted, tmp_path):
    arguments = (PackingInput.open(videos, labelled=True), tmp_path / "store", PackingSettings(**SETTINGS))
    summary = pack_frames(*arguments, process_index=1, num_processes=3)
    assert not summary.is_finished
    assert summary.num_missing == 5
    assert {path.name for path in (tmp_path / "store").glob("*.arrow")} == {
        f"data-0000{shard}-of-00008.arrow" for shard in (1, 4, 7)
    }
    # Another number of ranks goes on.
    assert not pack_frames(*arguments, process_index=1, num_processes=2).is_finished
    assert pack_frames(*arguments, process_index=0, num_processes=2).is_finished
    assert content(tmp_path / "store") == uninterrupted
