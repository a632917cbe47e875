"""Runs the examples and benchmarks: as a user does, in processes of their own, or inside the tests' process."""

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

from accelerate.state import AcceleratorState, GradientState, PartialState


EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# One process that asks nothing, as in the Makefile.
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}


def script_path(script: str) -> str:
    """Of a script, in whichever folder of examples/ it is, or in benchmarks/."""
    (path,) = [*EXAMPLES.glob(f"*/{script}"), *BENCHMARKS.glob(script)]
    return str(path)


def command(script: str, *flags: str, launcher: list[str] = ACCELERATE) -> list[str]:
    return [sys.executable, *launcher, script_path(script), *map(str, flags)]


def run(script: str, *flags: str, launcher: list[str] = ACCELERATE) -> subprocess.CompletedProcess:
    """Runs a script to its end; stdout and stderr are text."""
    return subprocess.run(
        command(script, *flags, launcher=launcher), env=environment(), capture_output=True, text=True, timeout=300
    )


def run_here(script: str, *flags) -> subprocess.CompletedProcess:
    """As `run`, but in this process: seconds less for each. For what the launcher has no part in."""
    stdout, stderr = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    # Accelerate keeps one state a process, which the test before may have left.
    forget_accelerate()
    try:
        with (
            mock.patch.object(sys, "argv", [script, *map(str, flags)]),
            mock.patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}),
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
        ):
            runpy.run_path(script_path(script), run_name="__main__")
        returncode = 0
    except SystemExit as error:
        returncode = error.code or 0
    finally:
        root.handlers = handlers
        forget_accelerate()
    return subprocess.CompletedProcess([script, *flags], returncode, stdout.getvalue(), stderr.getvalue())


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
