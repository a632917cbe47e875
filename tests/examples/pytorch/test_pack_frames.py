"""`pack_frames.py` as users run it: killed and run again, in two ranks; and training from the store that it leaves."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from launching import Forked, run_here, run_together
from safetensors.torch import load_file
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.sources.labelled import open_labelled


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
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("uninterrupted") / "store"


@pytest.fixture(scope="module")
def uninterrupted(videos, store):
    """Files of a store that one process packed, this one."""
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


def wait_until(condition, seconds=300):
    for _ in range(seconds * 100):
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(videos, uninterrupted, tmp_path):
    store = tmp_path / "store"
    killed = Forked("pack_frames.py", *flags(videos, store), "--num_proc", "2")
    assert wait_until(lambda: list(store.glob("data-*.arrow")))
    workers = child_processes(killed.process.pid)
    # Alone, not with its group.
    killed.process.kill()
    killed.finish()
    assert len(workers) >= 2
    # Nobody is left who would go on writing.
    assert wait_until(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers), seconds=60)
    whole = {path.name: path.read_bytes() for path in store.glob("data-*.arrow")}
    assert 0 < len(whole) < NUM_SHARDS
    assert not (store / "state.json").exists()
    assert all(uninterrupted[name] == data for name, data in whole.items())
    times = {name: (store / name).stat().st_mtime_ns for name in whole}

    finished = run_here("pack_frames.py", *flags(videos, store))
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
    process = run_together("pack_frames.py", *flags(videos, store))
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


TRAINING = """
config_overrides:
  hidden_size: 16
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 32
  patch_size: 16
  decoder_hidden_size: 16
  decoder_num_hidden_layers: 1
  decoder_num_attention_heads: 2
  decoder_intermediate_size: 32
  hidden_dropout_prob: 0.1
image_size: [48]
per_device_train_batch_size: 3
gradient_accumulation_steps: 2
max_train_steps: 24
base_learning_rate: 0.05
warmup_epochs: 1
contrastive_start_epoch: 2
checkpointing_steps: 3
logging_steps: 1
dataloader_num_workers: 3
"""


@pytest.fixture(scope="module")
def training(uninterrupted, store, tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "settings.yaml"
    path.write_text(f"train_data: [{store}]\n{TRAINING}")
    return path


def read_losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["reconstruction_loss"], line["contrastive_loss"]) for line in lines]


def test_a_killed_run_goes_on_in_the_stream_where_it_was(training, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = run_here("run_pretraining.py", training, "--streaming", "--output_dir", whole)
    assert process.returncode == 0, process.stderr
    process = Forked("run_pretraining.py", training, "--streaming", "--output_dir", killed)
    assert wait_until(lambda: (killed / "checkpoint-3").exists())
    process.kill()
    assert not (killed / "model.safetensors").exists()
    resumed = run_here(
        *["run_pretraining.py", training, "--streaming", "--output_dir", killed, "--resume_from_checkpoint", "latest"]
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from step" in resumed.stderr
    # 15 rows in updates of 6: several rounds.
    assert [losses[0] for losses in read_losses(whole)] == list(range(1, 25))
    assert read_losses(killed) == read_losses(whole)
    expected, found = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    # Other workers would have other shards: a run with another number of them is refused.
    other = run_here(
        *["run_pretraining.py", training, "--streaming", "--output_dir", killed, "--resume_from_checkpoint", "latest"],
        *["--dataloader_num_workers", 2],
    )
    assert other.returncode == 1 and "dataloader_num_workers was 3, is 2" in other.stderr


PROGRAM = """
import json, sys
from itertools import islice
from pathlib import Path
import torch
from accelerate import PartialState
from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.samples.streaming import FramePairStream

state = PartialState(cpu=True)
stream = load_frame_pairs(sys.argv[1], 16, streaming=True)
# What a sample was read from, in place of its pixels.
FramePairStream.read_pair = lambda self, item, generator: {
    "pixel_values": torch.tensor(list(item.name.encode().ljust(300)))
}
loader = stream.dataloader(
    1, num_workers=2, pin_memory=False, process_index=state.process_index, num_processes=state.num_processes
)
names = [bytes(batch["pixel_values"][0].tolist()).decode().strip() for batch in islice(loader, 8)]
Path(sys.argv[2], f"{state.process_index}.json").write_text(json.dumps(names))
state.destroy_process_group()
"""


def test_two_ranks_stream_different_rows(store, uninterrupted, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = run_together(str(program), store, tmp_path)
    assert process.returncode == 0, process.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first) == len(second) == 8
    # One of 15 rows comes a second time in 16 samples.
    assert not set(first) & set(second)
    assert len(set(first) | set(second)) == 15


@pytest.mark.slow
def test_a_store_trains_like_a_folder(training, tmp_path):
    process = run_here("run_pretraining.py", training, "--output_dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["num_train_files"] == 15
    assert (tmp_path / "run" / "plots" / "reconstructions.png").exists()
