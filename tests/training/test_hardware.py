"""Threads, waiting for data, memory and utilisation in the log, compiled layers."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_config
from torch import nn

from vicmae_hf import ViCMAEForPreTraining, ViCMAEForVideoClassification
from vicmae_hf.training import reporting
from vicmae_hf.training.devices import hardware
from vicmae_hf.training.devices.hardware import (
    choose_precision_of_products,
    compile_layers,
    fitting_threads,
    read_cpu_quota,
    set_threads,
    usable_cores,
)
from vicmae_hf.training.devices.peaks import peak_flops
from vicmae_hf.training.loop import Stopwatch
from vicmae_hf.training.reporting import MetricsLog


def test_a_small_model_leaves_cores_to_loading():
    assert fitting_threads(16, num_workers=4, num_parameters=112_000_000) == 16
    assert fitting_threads(16, num_workers=4, num_parameters=1_000_000) == 12
    assert fitting_threads(2, num_workers=4, num_parameters=1_000_000) == 1
    assert fitting_threads(0, num_workers=0, num_parameters=112_000_000) == 1  # more processes than cores


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def threads_of(monkeypatch, num_threads=None, launcher=None, environment=(), launcher_environment=()):
    monkeypatch.setattr(hardware, "launching_command", lambda script: launcher)
    parent = SimpleNamespace(environ=lambda: dict(launcher_environment))
    monkeypatch.setattr(hardware.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(hardware, "read_cpu_quota", lambda folder: None)
    monkeypatch.setattr(hardware.os, "environ", dict(environment))
    torch.set_num_threads(1)
    set_threads(num_threads, 3, nn.Linear(2, 2))
    return torch.get_num_threads()


def test_the_users_number_of_threads_counts_and_the_launchers_does_not(monkeypatch, threads):
    one = {"OMP_NUM_THREADS": "1"}
    launcher = ["python", "accelerate", "launch", "script.py"]
    assert threads_of(monkeypatch) == 5
    assert threads_of(monkeypatch, num_threads=2) == 2
    assert threads_of(monkeypatch, environment=one) == 1  # the user's own
    assert threads_of(monkeypatch, launcher=launcher, environment=one) == 5  # the launcher's
    assert threads_of(monkeypatch, launcher=launcher, environment=one, launcher_environment=one) == 1
    flagged = [*launcher[:3], "--num_cpu_threads_per_process", "1", "script.py"]
    assert threads_of(monkeypatch, launcher=flagged, environment=one) == 1
    assert threads_of(monkeypatch, launcher=launcher, environment=one | {"LOCAL_WORLD_SIZE": "4"}) == 1
    assert threads_of(monkeypatch, num_threads=3, environment=one) == 3


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_limits_the_cores(files, quota, tmp_path, monkeypatch):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_cpu_quota(tmp_path) == quota
    monkeypatch.setattr(hardware, "CGROUPS", tmp_path)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert usable_cores() == {2.5: 2, 0.5: 1, None: 8}[quota]


def test_products_in_float32_are_rounded_in_runs_in_float32_alone():
    before = torch.get_float32_matmul_precision()
    try:
        choose_precision_of_products("no")
        assert torch.get_float32_matmul_precision() == "high"
        choose_precision_of_products("bf16")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


class Device:
    """The time line of a GPU: it is busy until some time, and an event happens when all before it is done."""

    def __init__(self):
        self.now = self.busy_until = 0.0  # ms, of the program and of the device

    def compute(self, milliseconds):
        self.busy_until = max(self.now, self.busy_until) + milliseconds

    def record_event(self, event):
        happens = max(self.now, self.busy_until)
        return SimpleNamespace(happens=happens, elapsed_time=lambda other: other.happens - happens)


@pytest.mark.parametrize(("loading", "idle"), [(50, 0.0), (90, 0.0), (150, 0.05)])
def test_on_a_gpu_only_its_idle_time_is_waiting(loading, idle, monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: device)
    monkeypatch.setattr(torch.cuda, "Event", lambda timing: None)
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(3):
        with watch.waiting_for_data():
            device.now += loading
        device.compute(100)  # launched in no time
    # The first batch is waited for; then loading goes on while the device computes.
    assert watch.waiting == pytest.approx(loading / 1000 + 2 * idle)
    assert watch.waiting == pytest.approx(loading / 1000 + 2 * idle)  # each wait is counted once


def test_on_a_cpu_waiting_is_the_programs(monkeypatch):
    times = iter([0.0, 1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr("vicmae_hf.training.loop.time.perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.waiting_for_data():
            pass
    assert watch.waiting == 2.75


def test_utilisation_and_memory_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "peak_flops", lambda device: 1e12)
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=4, flops_per_sample=2e9)
    log.write({"loss": 1.0}, 2, 1.0, 0.1, num_samples=600, elapsed_seconds=4.0, wait_seconds=1.0)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["mfu"] == pytest.approx(600 * 2e9 / 4 / 1e12)
    assert line["peak_memory_mib"] > 10


def test_peaks_are_those_of_known_devices(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    peaks = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L4": 121e12, "NVIDIA L40": 181e12}
    peaks |= {"NVIDIA GeForce RTX 3090": 71e12, "NVIDIA GeForce RTX 3090 Ti": None, "Some GPU": None}
    peaks |= {"NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None}
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak


@pytest.mark.slow  # compiles
def test_compiled_layers_compute_the_same():
    torch._dynamo.reset()  # other tests of this process compile, too, and are counted
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.manual_seed(0)
    model = ViCMAEForPreTraining(tiny_config()).train()
    inputs = {"pixel_values": torch.randn(4, 2, 3, 16, 16), "noise": torch.rand(4, 2, 16)}
    results = []
    for compiled in (False, True):
        if compiled:
            compile_layers(model)
        for weight in (0.0, 0.025):  # what changes when the contrast starts compiles nothing again
            model.contrastive_weight = weight
            model.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(results[2:], results[:2], rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]  # encoder and decoder
    # With stochastic depth each layer has a rate of its own.
    config = tiny_config(num_hidden_layers=10, drop_path_rate=0.2)
    classifier = ViCMAEForVideoClassification(config).train()
    compile_layers(classifier)
    classifier(torch.randn(2, 4, 3, 16, 16), torch.tensor([0, 1])).loss.backward()
    assert counters["stats"]["unique_graphs"] == 12
