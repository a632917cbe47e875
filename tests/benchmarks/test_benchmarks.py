"""Every benchmark runs, at its smallest size, and prints its tables; what it measures there means nothing."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import decoding
import pytest
import store_memory
import torch
from demo_data import write_demo_data
from launching import BENCHMARKS, Forked, run_here, script_path
from torch._subclasses.fake_tensor import FakeTensorMode

from vicmae_hf.data import load_frame_pairs


# Parts of gpu.py and step.py.
HELPERS_OF_BENCHMARKS = ["bare.py", "gpu_checks.py", "peers.py", "store_steps.py"]
needs_no_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is not None, reason="ffcv is installed")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight clips, one of each appearance."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo_data(folder, appearance_videos=(0, 1), motion_videos=(0, 0), images=(0, 0), num_workers=1)
    return folder


def run_benchmark(script: str, *flags) -> dict[str, list[list[str]]]:
    """
    Runs it, and returns the tables that it printed: title of the first column -> rows, the first of titles.

    In a process of its own: what they load beside the package (decord, OpenCV's libraries under it) breaks encoders of
    PyAV in the tests that come after.
    """
    process = Forked(script, *flags).finish()
    assert process.returncode == 0, process.stderr
    tables = {}
    for lines in re.findall(r"(?:^\|.*\|\n)+", process.stdout, re.MULTILINE):
        rows = [line.strip("|").split("|") for line in lines.splitlines()]
        rows = [[cell.strip() for cell in row] for row in rows]
        assert {len(row) for row in rows} == {len(rows[0])}
        tables[rows[0][0]] = [rows[0], *rows[2:]]
    return tables


def first_column(table: list[list[str]]) -> list[str]:
    return [row[0] for row in table[1:]]


def test_a_folder_without_videos_is_named(tmp_path):
    """Before a benchmark divides by their number, or goes through them again and again."""
    with pytest.raises(SystemExit, match=f"no readable video in {tmp_path}"):
        decoding.find_videos(tmp_path, ["pyav"], max_files=20)
    assert run_here("long_videos.py", "--videos", tmp_path).returncode == f"no H.264 clip in MP4 in {tmp_path}"


@pytest.mark.slow
def test_decoding(videos):
    tables = run_benchmark("decoding.py", "--videos", videos, "--max_files", 2, "--repeats", 1)
    assert {"naive decord", "decord", "pyav"} <= set(first_column(tables["backend"]))


@pytest.mark.slow
def test_decoding_over_many_opens(videos):
    tables = run_benchmark("decoding.py", "--videos", videos, "--max_files", 2, "--opens", 10)
    table = tables["opens by pyav"]
    assert first_column(table) == ["0", "2", "4", "6", "8", "10"]
    # As many open files as before.
    assert len({row[2] for row in table[1:]}) == 1


def test_image_steps(videos):
    tables = run_benchmark("image_steps.py", "--videos", videos, "--num_frames", 16, "--rounds", 1)
    decoding, resizing = tables.values()
    # Of all ways the differences from Pillow are known but for rounding: docs/data.md has them.
    differences = {row[0]: float(row[2].split(",")[0]) for row in decoding[1:] + resizing[1:]}
    for way in ("simplejpeg", "torchvision decode_jpeg", "torch bicubic, channels last", "torchvision resized_crop"):
        assert differences[way] < 0.1
    assert differences["torch bilinear, channels last"] > 0.1


def test_loading(videos):
    flags = ["--videos", videos, "--max_files", 2, "--rounds", 1, "--seconds", 0.1]
    tables = run_benchmark("loading.py", *flags)
    rates, clips, formats = tables["loader"], tables["clips"], tables["format"]  # "clip_loading.py" makes the second
    assert {"clips of the frame store", "clips of videos", "naive decord"} <= set(first_column(clips))
    assert all(float(row[2]) > 0 for row in clips[1:])
    assert [row[:2] for row in rates[1:]] == [[n, w] for w in "02" for n in ("frame store", "naive decord")]
    assert all(float(row[2]) > 0 for row in rates[1:])
    assert first_column(formats)[0] == "Arrow" and len(formats) == 1 + 4


@needs_no_ffcv
def test_an_interpreter_without_ffcv_is_left_out(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("""
import sys
from loading import Path, what_ffcv_lacks
print(what_ffcv_lacks(None))
print(what_ffcv_lacks(Path(sys.executable)))
""")
    first, second = Forked(str(program)).finish().stdout.splitlines()
    assert first == "no interpreter at --ffcv_python None"
    assert second.endswith("ModuleNotFoundError: No module named 'ffcv'")


def test_the_process_of_ffcv_ends_with_its_turns(tmp_path):
    """A program in its place answers as it does, and says which process it is."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho $$ > {tmp_path}/id\nwhile read number; do echo "turn $number 2 1"; done\n')
    python.chmod(0o755)
    program = tmp_path / "program.py"
    program.write_text(f"""
from types import SimpleNamespace
from loading import Path, ffcv_turns, measure, psutil
folder = Path({str(tmp_path)!r})
with ffcv_turns(SimpleNamespace(encoded=[]), folder / "python", folder / "ffcv") as turns:
    print(measure(turns, rounds=2)["ffcv", 2])
    number = int((folder / "id").read_text())
    print(psutil.pid_exists(number))
print(psutil.pid_exists(number))
""")
    process = Forked(str(program)).finish()
    turn = "Turn(pairs=2, seconds=2.0, cpu_seconds=1.0)"
    assert process.stdout.splitlines() == [f"[{turn}, {turn}]", "True", "False"], process.stderr


@needs_no_ffcv
def test_without_ffcv_its_part_says_so_in_one_line():
    process = subprocess.run([sys.executable, script_path("ffcv_pairs.py")], capture_output=True, text=True)
    assert process.returncode == 1
    expected = f"{sys.executable} has no ffcv (No module named 'ffcv'): `make bench-ffcv` builds one that has."
    assert process.stderr == f"{expected}\n"


def test_the_stores_whose_memory_is_measured(tmp_path):
    store_memory.write_store(tmp_path / "store", 600)
    pairs = load_frame_pairs(tmp_path / "store", 16)
    assert len(pairs) == 600
    assert pairs[599]["pixel_values"].shape == (2, 3, 16, 16)


# Starts a process for each store.
@pytest.mark.slow
def test_store_memory(tmp_path):
    flags = ["--folder", tmp_path / "stores", "--rows", 16, 600, "--reads", 100, "--num_workers", 1]
    (table,) = run_benchmark("store_memory.py", *flags).values()
    assert first_column(table) == ["16", "600"]
    assert not list((tmp_path / "stores").iterdir())


@pytest.mark.slow
def test_step():
    flags = ["--sizes", "small", "--pairs", 2, "--rounds", 1, "--no-compiled"]
    (table,) = run_benchmark("step.py", *flags).values()
    assert {"ours as MAE", "ours, recipe", "ViTMAE"} <= {row[1] for row in table[1:]}


def test_without_a_gpu_its_benchmark_says_so():
    process = Forked(BENCHMARKS / "gpu.py").finish()
    assert process.returncode == 1 and "no CUDA device" in process.stderr


@pytest.fixture
def gpu(monkeypatch):
    """The module, as if there were a GPU that measures every row alike."""
    import gpu  # here: it takes the place of readers that are not installed

    monkeypatch.setattr(gpu, "measure", lambda build, num_steps: (build(), []))
    monkeypatch.setattr(gpu, "start_anew", lambda: None)
    return gpu


def parse(gpu, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, flags)])
    return gpu.parse_arguments()


def test_the_authors_are_measured_without_other_peers_and_beside_the_same_work(gpu, monkeypatch, tmp_path):
    flags = ["--sizes", "small", "--batches", 4, 8, "--modes", "compiled", "--no-peers", "--authors", tmp_path]
    rows = [row[:3] for row in gpu.list_rows(parse(gpu, monkeypatch, *flags))]
    assert rows == [
        ("small, ours", "compiled", 4),
        ("small, ours, both", "compiled", 4),
        ("small, authors, fp16", "eager", 4),
        ("small, authors, fp16, their loop", "eager", 4),
        ("small, ours", "compiled", 8),
    ]


def test_a_folder_that_is_no_checkout_of_the_authors_is_refused_before_anything_is_measured(tmp_path):
    process = Forked(BENCHMARKS / "gpu.py", "--authors", tmp_path).finish()
    assert process.returncode == 1 and "no models_vicmae.py" in process.stderr


def test_a_store_that_is_not_there_is_refused_before_anything_is_measured(tmp_path):
    process = Forked(BENCHMARKS / "gpu.py", "--store", tmp_path / "nowhere").finish()
    assert process.returncode == 1 and "nowhere: there is no such folder or file" in process.stderr


def test_a_row_that_fails_leaves_the_others(gpu, monkeypatch, capsys, tmp_path):
    figures = {"ms": 2.0, "spread": 0.1, "GiB": 1.0, "attention": 0.5}

    def fail(error):
        raise error

    rows = {
        "first": lambda: figures,
        "second": lambda: fail(torch.OutOfMemoryError()),
        "third": lambda: fail(RuntimeError("an error\nof two lines")),
        "fourth": lambda: figures,
    }
    monkeypatch.setattr(gpu, "list_rows", lambda arguments: [(n, "eager", 4, build, 1e9) for n, build in rows.items()])
    arguments = parse(gpu, monkeypatch, "--output", tmp_path)
    measured = gpu.measure_steps(arguments, time.monotonic(), peak=1e12)
    first = next(measured)
    assert (first["model"], first["MFU"]) == ("first", 0.5)
    assert "| first |" in capsys.readouterr().out  # before the second is measured
    assert [row["model"] for row in measured] == ["fourth"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| second | eager | 4 | out of memory |"
    assert lines[1] == "| third | eager | 4 | RuntimeError: an error of two lines |"
    assert lines[2].startswith("| fourth | eager | 4 | 2.0 |")
    late = gpu.measure_steps(arguments, time.monotonic() - 1000, peak=1e12)
    assert list(late) == [] and capsys.readouterr().out.count("no time left") == 4


def test_peers_wait_for_nothing():
    """A peer that waits for the device would be measured as slower than it is."""
    pytest.importorskip("timm")
    import peers

    with FakeTensorMode():
        config = peers.small_config(reconstruct="both", contrastive_loss="none")
        peers.TimmPeer(config)(torch.randn(2, 2, 3, 64, 64)).backward()
        peers.ViTMAEPeer(config)(torch.randn(2, 2, 3, 64, 64)).backward()


def test_without_a_gpu_updates_from_a_store_are_measured(tmp_path):
    store_memory.write_store(tmp_path / "store", 8)
    flags = ["--sizes", "small", "--batches", 2, "--steps", 2, "--num_workers", 0, "--output", tmp_path / "rows"]
    (table,) = run_benchmark("gpu.py", "--store", tmp_path / "store", *flags).values()
    (row,) = table[1:]
    assert row[:4] == ["small", "eager", "2", "0"] and float(row[4]) > 0
    (kept,) = json.loads((tmp_path / "rows" / "rows.json").read_text())["rows"]
    assert f"{kept['pairs/s']:.1f}" == row[4] and 0 < kept["waiting"] < 1


def test_no_benchmark_is_left_out():
    text = Path(__file__).read_text(encoding="utf-8") + " ".join(HELPERS_OF_BENCHMARKS)
    assert [path.name for path in sorted(BENCHMARKS.glob("*.py")) if path.name not in text] == []


@pytest.mark.slow  # six processes that import torch
def test_long_videos(videos):
    (rows,) = run_benchmark("long_videos.py", "--videos", videos, "--hours", "0.05", "--pairs", "3").values()
    assert [(row[0], row[3]) for row in rows[1:]] == [
        (container, read) for container in ("mp4", "mkv", "ts") for read in ("in parts", "as a whole")
    ]


@pytest.mark.slow  # four processes that import torch
def test_contrastive_batch():
    (table,) = run_benchmark("contrastive_batch.py", "--pairs", 8, "--micro_batch", 2, "--size", "tiny").values()
    assert [row[:3] for row in table[1:]] == [
        ["8", "one batch", "8"],
        ["8", "accumulation, 4 x 2", "2"],
        ["8", "across accumulation, 4 x 2", "8"],
    ]
    assert all(float(row[4].replace(",", "")) > 0 for row in table[1:])
