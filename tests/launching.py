"""
Runs the examples and benchmarks, in one of three ways:

- `run` as a user does, with a launcher: where the launcher is what is tested. Its processes import for seconds.
- `Forked`, `Together` and `run_together` in processes that fork from a server which has imported everything: where it
  matters that they are processes, because they are killed or work together.
- `run_here` in the tests' process: everything else.
"""

import contextlib
import io
import logging
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from pictures import are_blank, blank
from torch.distributed import TCPStore
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from vicmae_hf.data.loading.loader import end_workers


EXAMPLES = Path(__file__).parents[1] / "examples"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# One process that asks nothing, as in the Makefile; and two. Without "--multi_gpu" it starts one on a CPU.
ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]
TWO_PROCESSES = [*ACCELERATE, "--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]
ON_CPU = {"ACCELERATE_USE_CPU": "true"}

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "vicmae_hf.pretraining.run",
        "vicmae_hf.classification.classification",
        "vicmae_hf.evaluation.results",
        "vicmae_hf.evaluation.features",
        "vicmae_hf.data.preparing.packing",
    ]
)


def script_path(script: str) -> str:
    """Of a script, in whichever folder of examples/ it is, or in benchmarks/. A whole path is returned as it is."""
    if os.path.isabs(script):
        return script
    (path,) = [*EXAMPLES.glob(f"*/{script}"), *BENCHMARKS.glob(script)]
    return str(path)


def run(script: str, *flags, launcher: list[str] = ACCELERATE) -> subprocess.CompletedProcess:
    """Runs a script to its end; stdout and stderr are text."""
    command = [sys.executable, *launcher, script_path(script), *map(str, flags)]
    return subprocess.run(command, env={**os.environ, **ON_CPU}, capture_output=True, text=True, timeout=300)


class Forked:
    """A script in a process of its own, beside the test. It has the tests' environment variables, and those given."""

    def __init__(self, script: str, *flags, **environment: str):
        self.logs = tempfile.TemporaryDirectory()
        for name in ("stdout", "stderr"):  # also where it is killed before it can make them
            Path(self.logs.name, name).touch()
        arguments = ([script_path(script), *map(str, flags)], ON_CPU | environment, self.logs.name, are_blank())
        self.process = FORKS.Process(target=_run_forked, args=arguments)
        self.process.start()

    def is_running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """At once, with all processes that it started in its group."""
        self.send_kill()
        self.process.join()

    def send_kill(self) -> None:
        """As `kill`, but does not wait for its end."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet, so it has started no process either
            self.process.kill()

    def finish(self) -> subprocess.CompletedProcess:
        """Waits for its end, for five minutes at most."""
        self.process.join(300)
        if self.is_running():
            self.kill()
        stdout, stderr = (Path(self.logs.name, name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([], self.process.exitcode, stdout, stderr)


def _run_forked(command: list[str], environment: dict[str, str], logs: str, without_pictures: bool) -> None:
    os.setsid()
    for descriptor, name in [(1, "stdout"), (2, "stderr")]:
        with Path(logs, name).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    # The platform's own, as in any new process, for the workers of a loader; here it is that of FORKS.
    multiprocessing.set_start_method(None, force=True)
    os.environ.update(environment)
    sys.argv = command
    try:
        with blank() if without_pictures else contextlib.nullcontext():
            runpy.run_path(command[0], run_name="__main__")
    except Exception:
        # Here `atexit` is not called, and this process would wait for its workers before it shows the error.
        traceback.print_exc()
        end_workers()
        sys.exit(1)


class Together:
    """A script in processes that find each other, as those of torchrun do, beside the test."""

    def __init__(self, script: str, *flags, num_processes: int = 2, **environment: str):
        # They meet at a store of this process, so that no port is chosen which something else could take meanwhile.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        world = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            **environment,
        }
        self.command = [script, *flags]
        self.ranks = [
            Forked(script, *flags, **world, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(num_processes)
        ]

    def is_running(self) -> bool:
        return all(process.is_running() for process in self.ranks)

    def kill(self) -> None:
        """All at once: none is left to notice that another is gone."""
        for process in self.ranks:
            process.send_kill()
        for process in self.ranks:
            process.process.join()

    def finish(self) -> subprocess.CompletedProcess:
        """Waits for their end. What they print is joined, by rank."""
        finished = [process.finish() for process in self.ranks]
        returncode = next((process.returncode for process in finished if process.returncode), 0)
        stdout, stderr = ("".join(getattr(process, name) for process in finished) for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.command, returncode, stdout, stderr)


def run_together(script: str, *flags, num_processes: int = 2, **environment: str) -> subprocess.CompletedProcess:
    """As torchrun, in processes that find each other, to their end."""
    return Together(script, *flags, num_processes=num_processes, **environment).finish()


def run_here(script: str, *flags) -> subprocess.CompletedProcess:
    """As `run`, but in this process. What the script leaves behind is undone."""
    stdout, stderr = io.StringIO(), io.StringIO()
    returncode = 0
    with (
        undone(),
        mock.patch.object(sys, "argv", [script_path(script), *map(str, flags)]),
        mock.patch.dict(os.environ, ON_CPU),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            runpy.run_path(script_path(script), run_name="__main__")
        except SystemExit as error:
            returncode = error.code or 0
    return subprocess.CompletedProcess([script, *flags], returncode, stdout.getvalue(), stderr.getvalue())


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Restores what scripts change in their process: logging, progress bars, threads, random numbers, accelerate."""
    root, package = logging.getLogger(), logging.getLogger("vicmae_hf")
    libraries = {name: logging.getLogger(name).propagate for name in ("datasets", "huggingface_hub")}
    package_level = package.level
    handlers, level, bars, threads = root.handlers, root.level, is_progress_bar_enabled(), torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # A script configures logging only where nobody has.
    root.handlers = []
    forget_accelerate()
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        package.setLevel(package_level)
        for name, propagate in libraries.items():
            logging.getLogger(name).propagate = propagate
        (enable_progress_bar if bars else disable_progress_bar)()
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        forget_accelerate()


def forget_accelerate() -> None:
    """Accelerate keeps one state a process, which the run before may have left."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
