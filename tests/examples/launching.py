"""Runs the example scripts as a user does: in their own processes."""

import os
import subprocess
import sys
from pathlib import Path


EXAMPLES = Path(__file__).parents[2] / "examples" / "pytorch"
# One process that asks nothing, as in the Makefile.
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def command(script: str, *flags: str, launcher: list[str] = ACCELERATE) -> list[str]:
    return [sys.executable, *launcher, str(EXAMPLES / script), *map(str, flags)]


def run(script: str, *flags: str, launcher: list[str] = ACCELERATE) -> subprocess.CompletedProcess:
    """Runs a script to its end; stdout and stderr are text."""
    return subprocess.run(
        command(script, *flags, launcher=launcher), env=environment(), capture_output=True, text=True, timeout=300
    )
