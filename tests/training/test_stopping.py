"""Requests to stop, received at awkward moments. Whole runs are stopped in tests/examples/pytorch/test_resuming.py."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from accelerate import Accelerator
from launching import ACCELERATE, ON_CPU, script_path
from PIL import Image
from tiny_models import tiny_overrides

from vicmae_hf.training import stopping
from vicmae_hf.training.stopping import StopRequest


def test_a_signal_during_the_agreement_counts_the_next_time(monkeypatch):
    request = StopRequest(Accelerator(cpu=True))
    request.group = "as with several processes"

    def exchange_while_a_signal_arrives(asked, operation, group):
        os.kill(os.getpid(), signal.SIGTERM)

    with request:
        monkeypatch.setattr(dist, "all_reduce", exchange_while_a_signal_arrives)
        assert not request.is_agreed()  # 0 was sent to the others
        monkeypatch.setattr(dist, "all_reduce", lambda *arguments, **options: None)
        assert request.is_agreed() and request.signal == signal.SIGTERM


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in stopping.STOP_SIGNALS]
    with StopRequest(Accelerator(cpu=True)) as request:
        assert not request.is_agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.is_agreed() and request.signal == signal.SIGUSR1
    assert [signal.getsignal(number) for number in stopping.STOP_SIGNALS] == before


@pytest.mark.slow
def test_a_training_whose_launcher_is_killed_stops_too(tmp_path):
    for index in range(8):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / f"{index}.png")
    folder = tmp_path / "run"
    flags = ["--train_data", tmp_path, "--output_dir", folder, "--image_size", "32", "--num_train_epochs", "100000"]
    flags += ["--config_overrides", tiny_overrides(), "--contrastive_start_epoch", "1", "--warmup_epochs", "1"]
    flags += ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--checkpointing_steps", "100000"]
    command = [sys.executable, *ACCELERATE, script_path("run_pretraining.py"), *map(str, flags)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | ON_CPU) as launcher:
        while not (folder / "metrics.jsonl").exists():
            assert launcher.poll() is None
            time.sleep(0.1)
        launcher.terminate()
    limit = time.monotonic() + 60
    while not (folder / "stopped.json").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    assert json.loads((folder / "stopped.json").read_text())["signal"] == "SIGTERM"
    assert list(folder.glob("checkpoint-*/checksums.json"))
