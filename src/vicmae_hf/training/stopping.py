"""Lets a run that is asked to stop finish its update, so that it can continue later."""

import os
import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import Accelerator

from ..data.loading.loader import STOP_SIGNALS


# "Temporary failure, try again" in sysexits.h: a job script sees that the run is to be started once more.
STOPPED_EXIT_STATUS = 75


class RunStopped(Exception):
    """A run was asked to stop, and did after it wrote a checkpoint. The message names the signal and the update."""


class StopRequest:
    """
    Watches for `STOP_SIGNALS` inside its `with` block. The first one only sets a mark. A second Ctrl-C ends the
    process at once.
    """

    def __init__(self, accelerator: Accelerator):
        # A group of its own for numbers in main memory: asking GPUs would make the processes wait for them.
        self.group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.signal: signal.Signals | None = None
        self.was_interrupted = False
        self.handlers = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self.handlers = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.was_interrupted:
            os.write(2, b"\nEnded at once. Checkpoints that were written are whole.\n")
            os._exit(128 + signal.SIGINT)
        self.was_interrupted |= number == signal.SIGINT
        self.signal = signal.Signals(number)

    def is_agreed(self) -> bool:
        """Whether any process was asked to stop. All processes call it after every update, and get the same answer."""
        if self.group is None:
            return self.signal is not None
        # The signal need not reach all processes, nor in the same update.
        asked = torch.tensor(0 if self.signal is None else int(self.signal))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        if asked > 0:  # else a signal may have come meanwhile; it counts the next time
            self.signal = signal.Signals(asked.item())
        return asked.item() > 0
