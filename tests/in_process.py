"""Runs the example scripts inside the tests' own process: seconds less than a process of their own for each."""

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


def run_here(script: str, *flags) -> subprocess.CompletedProcess:
    """Runs `examples/pytorch/script` with `flags` on the CPU to its end; stdout and stderr are text."""
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
            runpy.run_path(str(EXAMPLES / "pytorch" / script), run_name="__main__")
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
