"""Runs a command with settings from the command line, or from keyword arguments in a program or notebook."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from ...command_line import parse_arguments, parse_keywords
from ...settings import Settings
from ..stopping import RunStopped
from .output_folder import release_output_dir
from .scripts import run_script, said_once


Data = str | os.PathLike  # a path, or the name of a dataset or a model on the Hub
Arguments = TypeVar("Arguments", bound=Settings)
Run = Callable[[Arguments], dict[str, Any]]


def start(arguments_class: type[Arguments], run: Run, argv: Sequence[str] | None = None) -> None:
    """Runs a command as a script: errors that the user can mend are one line, and end the process."""
    run_script(lambda: run(parse_arguments(arguments_class, argv)))


def call(arguments_class: type[Arguments], run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """
    Runs a command inside of a program or notebook, which may do so several times.

    Raises:
        ArgumentsError: if a setting is unknown, missing or wrong.
        InputError, NonFiniteError, RunStopped: as `run` does.
    """
    arguments = parse_keywords(arguments_class, settings)
    if not dist.is_initialized():
        # Accelerate keeps one state a process, and would refuse another precision than that of the call before.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    with speaking(), as_before():
        try:
            return run(arguments)
        except RunStopped as stopped:
            raise RunStopped(f'{stopped}. Resume with resume_from_checkpoint="latest".') from None
        finally:
            release_output_dir()


@contextmanager
def speaking() -> Iterator[None]:
    """Shows what a command says, where the program has set up logging, or on stderr. A level that it set stays."""
    logger, own = logging.getLogger("vicmae_hf"), logging.StreamHandler()
    own.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    own.addFilter(said_once)
    level = logger.level
    if level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        logger.addHandler(own)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(own)


@contextmanager
def as_before() -> Iterator[None]:
    """Gives back what a command sets for its whole process: threads, precision of products, progress bars."""
    has_bars, num_threads = is_progress_bar_enabled(), torch.get_num_threads()
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    precisions = [backend.fp32_precision for backend in backends]
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch has no single word for it after `fp32_precision` was set
        precision = None
    disable_progress_bar()  # of Transformers, one for every file that it writes or reads
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, value in zip(backends, precisions, strict=True):
            backend.fp32_precision = value
        if has_bars:
            enable_progress_bar()
