"""The command `vicmae`: its help, several processes by Accelerate's launcher, how it fails and stops."""

import configparser
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from launching import run_here
from PIL import Image
from tiny_models import tiny_overrides

import vicmae_command
from vicmae_command import COMMANDS, hand_on, take_num_processes


VICMAE = [sys.executable, "-m", "vicmae_command"]
HEAVY = {"torch", "transformers", "datasets", "accelerate", "numpy", "pyarrow", "yaml", "psutil", "vicmae_hf"}


def start(*flags, **options) -> subprocess.Popen:
    return subprocess.Popen([*VICMAE, *map(str, flags)], stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def run_flags(tmp_path):
    """A pretraining of a tiny model on 16 pictures, by flags."""
    (tmp_path / "images").mkdir()
    for index in range(16):
        Image.effect_noise((32, 32), 20 * index).save(tmp_path / "images" / f"{index}.png")
    flags = ["pretrain", tmp_path / "images", "-o", tmp_path / "out", "--image_size", 32]
    flags += ["--config_overrides", tiny_overrides(), "--per_device_train_batch_size", 4, "--warmup_epochs", 0]
    return [*flags, "--contrastive_start_epoch", 1, "--dataloader_num_workers", 0]


def test_setup_installs_the_command():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert setup["options.entry_points"]["console_scripts"].split() == ["vicmae", "=", "vicmae_command:main"]
    assert setup["options"]["py_modules"] == vicmae_command.__name__


@pytest.mark.parametrize("flags", [[], ["--help"], *([name, "--help"] for name in COMMANDS), ["pretrain", "-h"]])
def test_help_imports_nothing_that_takes_long(flags):
    command = [sys.executable, "-X", "importtime", "-m", "vicmae_command", *flags]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0
    assert process.stdout.startswith(f"usage: vicmae {flags[0] if len(flags) == 2 else 'COMMAND'} ")
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "argparse" not in HEAVY and imported & HEAVY == set()


@pytest.mark.parametrize("flags", [["--help"], ["pretrain", "--help"], ["--version"]])
def test_whoever_reads_may_stop_before_the_end(flags):
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run([*VICMAE, *flags], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_command_goes_on_when_nobody_reads_it_any_more(monkeypatch, name):
    def main(argv):
        for number in range(3):
            print(number, file=getattr(sys, name), flush=True)  # as with PYTHONUNBUFFERED
            done.append(number)

    done, (reading, writing) = [], os.pipe()
    os.close(reading)
    monkeypatch.setitem(sys.modules, "printing", SimpleNamespace(main=main))
    monkeypatch.setitem(COMMANDS, "plan", ("printing", ""))
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        vicmae_command.run("plan", [])
        assert getattr(sys, name) is stream
    assert done == [0, 1, 2]


def test_an_interrupt_while_the_program_is_loaded_is_one_word(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(vicmae_command.importlib, "import_module", interrupted)
    with pytest.raises(SystemExit) as ended:
        vicmae_command.run("features", ["clips"])
    assert ended.value.code == 130 and capsys.readouterr().err == "Interrupted.\n"


def test_torch_and_torchvision_of_different_builds_are_one_line(monkeypatch, capsys):
    def fail_to_import(name):
        cause = RuntimeError("operator torchvision::nms does not exist")
        raise ModuleNotFoundError("Could not import module 'AutoImageProcessor'.") from cause

    monkeypatch.setattr(vicmae_command.importlib, "import_module", fail_to_import)
    with pytest.raises(SystemExit):
        vicmae_command.run("features", ["data"])
    assert "Install both from one index" in capsys.readouterr().err


def test_a_misspelt_command_gets_the_nearest_name():
    process = start("pretrian", "clips")
    assert process.stderr.read() == "error: there is no `vicmae pretrian`. Did you mean `vicmae pretrain`?\n"
    assert process.wait() == 2


@pytest.mark.parametrize(
    ("argv", "expected", "left"),
    [
        (["a", "--num_processes", "2", "-o", "b"], 2, ["a", "-o", "b"]),
        (["--num_processes=3"], 3, []),
        (["a", "--num_proc", "2"], None, ["a", "--num_proc", "2"]),
    ],
)
def test_the_number_of_processes_is_taken_out(argv, expected, left):
    assert take_num_processes(argv) == expected
    assert argv == left


@pytest.mark.parametrize("argv", [["--num_processes"], ["--num_processes", "two"], ["--num_processes=0"]])
def test_a_wrong_number_of_processes_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        take_num_processes(argv)
    assert capsys.readouterr().err.startswith("error: --num_processes must be at least 1, got ")


def test_a_signal_reaches_the_others_when_one_process_has_just_ended(monkeypatch):
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    workers = [psutil.Process(process.pid) for process in processes]
    processes[0].kill()
    processes[0].wait()
    monkeypatch.setattr(psutil.Process, "children", lambda process: workers)
    hand_on(signal.SIGTERM, None)
    assert processes[1].wait(timeout=10) == -signal.SIGTERM


@pytest.mark.slow
def test_the_error_of_several_processes_is_said_once_and_last(tmp_path, run_flags):
    process = start(*run_flags, "--train_data_weights", 1, 2, "--num_processes", 2)
    *before, line = process.stderr.read().splitlines()
    assert process.wait() == 1
    assert line == "error: Expected one positive weight for each of 1 sources, got [1.0, 2.0]."
    assert not [other for other in before if "Traceback" in other or "error: " in other]


def stop(process: subprocess.Popen, folder: Path, number: int, first_step: int) -> str:
    """Sends the launcher, and it alone, a signal once updates after `first_step` are logged; returns its last line."""
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) > first_step + 1:
            process.send_signal(number)
            break
        time.sleep(0.2)
    line = process.stderr.read().splitlines()[-1]
    assert process.wait() == 75, line
    return line


@pytest.mark.slow
def test_several_processes_stop_with_a_checkpoint_and_go_on(tmp_path, run_flags):
    folder, step = tmp_path / "out", 0
    flags = [*run_flags, "--num_train_epochs", 100_000, "--logging_steps", 1, "--num_processes", 2]
    for number in (signal.SIGTERM, signal.SIGINT):
        line = stop(start(*flags), folder, number, step)
        before, step = step, json.loads((folder / "stopped.json").read_text())["step"]
        assert step > before and (folder / f"checkpoint-{step}").is_dir()
        assert line.startswith(f"Stopped by {number.name} after update {step} of ")
        assert line.endswith(" --num_processes 2 --resume_from_checkpoint latest")
        flags += ["--resume_from_checkpoint", "latest"]
    assert json.loads((folder / "arguments.json").read_text())["num_processes"] == 2
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 1))


def test_one_process_is_this_one(tmp_path, run_flags):
    process = run_here(vicmae_command.__file__, *run_flags, "--max_train_steps", 5)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("5 updates, ") and process.stdout.endswith(f"pictures: {tmp_path / 'out'}\n")
    assert json.loads((tmp_path / "out" / "arguments.json").read_text())["num_processes"] == 1
    process = run_here(vicmae_command.__file__, *run_flags)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: --output_dir {tmp_path / 'out'} already holds a run.")
    process = run_here(vicmae_command.__file__, "pretrain", "images", "--outputdir", "out")
    assert process.returncode == 2
    assert process.stderr == (
        "usage: vicmae pretrain [settings.yaml|settings.json] DATA -o OUTPUT [--flag value ...]\n"
        "error: unknown flag --outputdir. Did you mean --output_dir?\n"
    )
