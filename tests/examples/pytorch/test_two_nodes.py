"""Two nodes on one machine: two launchers that meet at a port of the loopback, a process in each."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from launching import ON_CPU, run_together, script_path
from safetensors.torch import load_file
from tiny_models import tiny_overrides
from video_files import write_images


def run_on_two_nodes(*flags):
    """Runs `run_pretraining.py` to its end under two launchers; returns what both print."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    nodes = []
    for rank in range(2):
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        command = [sys.executable, *launcher, script_path("run_pretraining.py"), *map(str, flags)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        nodes.append(subprocess.Popen(command, env={**os.environ, **ON_CPU}, **streams))
    try:
        printed = "".join(node.communicate(timeout=240)[0] for node in nodes)
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], printed
    return printed


@pytest.mark.slow
def test_two_nodes_pretrain_and_resume(tmp_path):
    data, whole = tmp_path / "data", tmp_path / "whole"
    write_images(data, 16)
    flags = [
        *("--train_data", data, "--image_size", 32, "--config_overrides", tiny_overrides(drop_path_rate=0.1)),
        *("--num_train_epochs", 2, "--warmup_epochs", 1, "--contrastive_start_epoch", 1),
        *("--dataloader_num_workers", 1, "--logging_steps", 1, "--checkpointing_steps", 2),
        *("--per_device_train_batch_size", 2),
    ]
    run_on_two_nodes(*flags, "--output_dir", whole)
    assert json.loads((whole / "arguments.json").read_text())["num_processes"] == 2

    def cut(name):
        """As if both had been killed after the fourth update."""
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        for checkpoint in ("checkpoint-6", "checkpoint-8"):
            shutil.rmtree(folder / checkpoint)
        (folder / "all_results.json").unlink()
        return [*flags, "--output_dir", folder, "--resume_from_checkpoint", "latest"]

    printed = run_on_two_nodes(*cut("resumed"))
    assert "Resuming from step 4" in printed
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    # On one node: only with the batch of both.
    settings = cut("alone")
    process = run_together("run_pretraining.py", *settings, num_processes=1)
    assert process.returncode == 1
    assert "total_batch_size was 4, is 2; the total batch is num_processes x" in process.stderr.splitlines()[-1]
    settings += ["--per_device_train_batch_size", 4]
    process = run_together("run_pretraining.py", *settings, num_processes=1)
    assert process.returncode == 0, process.stderr
    assert "The batch of 4 is divided differently now: 1 (was 2) processes" in process.stderr
    assert json.loads((tmp_path / "alone" / "all_results.json").read_text())["num_steps"] == 8
