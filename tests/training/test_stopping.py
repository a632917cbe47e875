"""Requests to stop, received at awkward moments. Whole runs are stopped in tests/examples/pytorch/test_resuming.py."""

import os
import signal

import torch.distributed as dist
from accelerate import Accelerator

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
