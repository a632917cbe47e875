"""
Going on with a pretraining: from which checkpoints, with which settings, after which signals. That a killed run goes
on exactly is proved in test_run_pretraining.py and tests/faults.
"""

import json
import os
import shlex
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from launching import Forked, run_here, run_together, script_path
from safetensors.torch import load_file
from tiny_models import tiny_overrides
from video_files import numbered_frames, write_images, write_video

from vicmae_hf.training.checkpointing import find_damage
from vicmae_hf.training.session import output_folder


MODEL = tiny_overrides()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, 8)
    for index in range(8):
        write_video(folder / f"{index}.mp4", numbered_frames(12, 48, 48, seed=index), 10)
    return folder


def flags(data, output_dir, *others, batch_size=4):
    """Four updates an epoch."""
    return [
        *("--train_data", data, "--output_dir", output_dir, "--image_size", 32, "--config_overrides", MODEL),
        *("--num_train_epochs", 2, "--warmup_epochs", 1, "--contrastive_start_epoch", 1, "--base_learning_rate", 0.1),
        *("--dataloader_num_workers", 0, "--logging_steps", 1, "--checkpointing_steps", 2, "--save_total_limit", 9),
        *("--per_device_train_batch_size", batch_size, *others),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = run_here("run_pretraining.py", *flags(data, folder))
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of the run, as if it had been killed after the fifth update."""
    shutil.copytree(finished, tmp_path / "run")
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "all_results.json").unlink()
    return tmp_path / "run"


RESUME = ("--resume_from_checkpoint", "latest")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.endswith(("per_second", "wait_share", "memory_mib"))} for line in lines
    ]


def assert_same_losses(found, expected, tolerance):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "reconstruction_loss", "contrastive_loss", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), (ours["step"], name)


def error_line(process):
    assert process.returncode == 1, process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in process.stderr
    return line


@pytest.mark.slow  # two processes, beside those of the other tests
def test_another_division_of_the_same_batch_gives_the_same_losses(interrupted, finished, data, tmp_path):
    """From one process to two with half the samples each; from there to one again. The first is compared, too."""
    shutil.copytree(interrupted, tmp_path / "back")
    two = run_together("run_pretraining.py", *flags(data, interrupted, *RESUME, batch_size=2))
    assert two.returncode == 0, two.stderr
    assert "batch of 4 is divided differently now: 2 (was 1) processes, 2 (was 4) samples each" in two.stderr
    assert_same_losses(losses(interrupted), losses(finished), 1e-4)
    shutil.copytree(interrupted / "checkpoint-6", tmp_path / "back" / "checkpoint-6")
    one = run_here("run_pretraining.py", *flags(data, tmp_path / "back", *RESUME))
    assert one.returncode == 0, one.stderr
    assert "INFO: Resuming from step 6" in one.stderr and "1 (was 2) processes" in one.stderr
    assert_same_losses(losses(tmp_path / "back")[6:], losses(finished)[6:], 1e-4)


def test_accumulation_in_place_of_a_larger_batch_keeps_the_reconstruction(interrupted, finished, data):
    process = run_here(
        "run_pretraining.py", *flags(data, interrupted, *RESUME, "--gradient_accumulation_steps", 2, batch_size=2)
    )
    assert process.returncode == 0, process.stderr
    # It compares fewer samples with each other, and this is said.
    assert "The contrastive loss now compares 2 samples with each other (was 4)" in process.stderr
    fifth, expected = losses(interrupted)[4], losses(finished)[4]
    assert fifth["reconstruction_loss"] == pytest.approx(expected["reconstruction_loss"], rel=1e-5)
    assert fifth["contrastive_loss"] < expected["contrastive_loss"]


@pytest.mark.parametrize(
    ("launch", "batch_size"), [(run_here, 2), pytest.param(run_together, 1, marks=pytest.mark.slow)]
)
def test_accumulation_from_an_odd_update_on_gives_the_same_losses(data, tmp_path, launch, batch_size):
    """Without a contrastive loss, which would compare fewer samples: all losses are the same to rounding."""
    common = ["--config_overrides", MODEL + ",contrastive_loss=none", "--checkpointing_steps", 1]
    process = run_here("run_pretraining.py", *flags(data, tmp_path / "whole", *common))
    assert process.returncode == 0, process.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for step in range(4, 9):
        shutil.rmtree(tmp_path / "resumed" / f"checkpoint-{step}")
    resumed = launch(
        "run_pretraining.py",
        *flags(data, tmp_path / "resumed", *RESUME, batch_size=batch_size),
        *(*common, "--gradient_accumulation_steps", 2),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from step 3" in resumed.stderr
    for ours, theirs in zip(losses(tmp_path / "resumed"), losses(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_every_difference_from_the_run_is_listed(interrupted, data, tmp_path):
    process = run_here(
        "run_pretraining.py",
        *flags(data, interrupted, *RESUME, "--base_learning_rate", 0.2, "--frame_sampling", "same", batch_size=2),
        *("--config_overrides", MODEL + ",mask_ratio=0.5,hidden_size=32", "--train_data_weights", 1),
    )
    message = error_line(process)
    for difference in [
        "base_learning_rate was 0.1, is 0.2",
        "frame_sampling was 'distant', is 'same'",
        "model.mask_ratio was 0.75, is 0.5",
        "model.hidden_size was 16, is 32",
        "total_batch_size was 4, is 2",
        "x per_device_train_batch_size x gradient_accumulation_steps, it was 1 x 4 x 1, is 1 x 2 x 1",
        "train_data_weights was None, is [1.0]",
    ]:
        assert difference in message, message
    assert "num_workers" not in message
    # They follow from the batch.
    assert not any(name in message for name in ("; learning_rate", "steps_per_epoch", "num_steps"))


def test_other_files_of_equal_number_are_another_run_but_a_moved_folder_is_not(interrupted, finished, data, tmp_path):
    shutil.copytree(data, tmp_path / "others")
    (tmp_path / "others" / "3.png").rename(tmp_path / "others" / "33.png")
    process = run_here("run_pretraining.py", *flags(tmp_path / "others", interrupted, *RESUME))
    assert "data.file_names was '16 names, SHA-256 " in error_line(process)
    (tmp_path / "others" / "33.png").rename(tmp_path / "others" / "3.png")
    moved = run_here("run_pretraining.py", *flags(tmp_path / "others", interrupted, *RESUME))
    assert moved.returncode == 0, moved.stderr
    assert losses(interrupted) == losses(finished)


def test_what_changes_no_number_may_change(interrupted, finished, data):
    process = run_here(
        "run_pretraining.py",
        *flags(data, interrupted, *RESUME, "--logging_steps", 2, "--checkpointing_steps", 4, "--max_bad_files", 0.5),
        *("--dataloader_num_workers", 1, "--seconds_per_file", 9, "--save_total_limit", 1, "--gradient_checkpointing"),
    )
    assert process.returncode == 0, process.stderr
    expected, found = load_file(finished / "model.safetensors"), load_file(interrupted / "model.safetensors")
    assert all(torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6) for name, tensor in expected.items())


@pytest.mark.slow  # two trainings
def test_a_finished_run_goes_on_for_more_epochs_and_not_for_fewer(finished, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    fewer = run_here("run_pretraining.py", *flags(data, folder, *RESUME, "--max_train_steps", 6))
    assert "num_steps was 8, is 6: it can only become longer (--num_train_epochs or --max_train_steps)" in error_line(
        fewer
    )
    longer = run_here("run_pretraining.py", *flags(data, folder, *RESUME, "--num_train_epochs", 4))
    assert longer.returncode == 0, longer.stderr
    assert "The run is now 16 updates long (was 8)" in longer.stderr
    lines = losses(folder)
    assert [line["step"] for line in lines] == list(range(1, 17))
    # 4 updates of warmup, then half a cosine to the new end.
    peak = 0.1 * 4 / 256
    for line in lines[8:]:
        progress = (line["step"] - 1 - 4) / 12
        assert line["learning_rate"] == pytest.approx(peak * 0.5 * (1 + np.cos(np.pi * progress)))


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(flip_a_bit(path.read_bytes())),
}


def flip_a_bit(content):
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "training_state.json", "checksums.json"])
def test_every_damage_is_found_and_named(finished, tmp_path, name, damage):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoint-4", checkpoint)
    assert find_damage(checkpoint) is None
    DAMAGES[damage](checkpoint / name)
    # A bit of a checksum accuses the file that it is of.
    assert name in find_damage(checkpoint) or (name, damage) == ("checksums.json", "flipped")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "cut"),
        ("optimizer.bin", "flipped"),
        ("training_state.json", "empty"),
        ("checksums.json", "missing"),
    ],
)
def test_a_damaged_checkpoint_costs_one_interval(interrupted, finished, data, name, damage):
    DAMAGES[damage](interrupted / "checkpoint-4" / name)
    process = run_here("run_pretraining.py", *flags(data, interrupted, *RESUME))
    assert process.returncode == 0, process.stderr
    assert "Resuming from step 2" in process.stderr
    assert "checkpoint-4 is damaged, the one before it is used" in process.stderr
    assert name in process.stderr
    assert losses(interrupted) == losses(finished)


def test_damaged_checkpoints_only_are_refused(interrupted, data):
    for step in (2, 4):
        DAMAGES["cut"](interrupted / f"checkpoint-{step}" / "optimizer.bin")
    process = run_here("run_pretraining.py", *flags(data, interrupted, *RESUME))
    assert "all checkpoints in" in error_line(process)
    path = interrupted / "checkpoint-4"
    process = run_here("run_pretraining.py", *flags(data, interrupted, "--resume_from_checkpoint", path))
    assert "it is damaged: optimizer.bin has" in error_line(process)


def wait_for_lines(folder, num_lines, process):
    path = folder / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= num_lines):
        assert process.is_running()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGINT))],
)
def test_a_signal_saves_and_the_command_that_it_names_goes_on(data, tmp_path, number):
    folder = tmp_path / "run with space"
    long = ["--num_train_epochs", 20, "--checkpointing_steps", 0, "--dataloader_num_workers", 1]
    process = Forked("run_pretraining.py", *flags(data, folder, *long), "--overwrite_output_dir")
    wait_for_lines(folder, 3, process)
    os.kill(process.process.pid, number)
    stopped = process.finish()
    assert stopped.returncode == 75, stopped.stderr
    assert "Traceback" not in stopped.stderr
    (checkpoint,) = folder.glob("checkpoint-*")
    done = int(checkpoint.name.split("-")[1])
    assert losses(folder)[-1]["step"] == done
    assert json.loads((folder / "stopped.json").read_text()) == {"signal": number.name, "step": done}
    assert f"Stopped by {number.name} after update {done} of 80" in stopped.stderr
    command = shlex.split(stopped.stderr.strip().splitlines()[-1].split("Resume with: ")[1])
    assert command[:4] == ["env", "ACCELERATE_USE_CPU=true", "python", script_path("run_pretraining.py")]
    assert "--overwrite_output_dir" not in command
    resumed = run_here(*command[3:])
    assert resumed.returncode == 0, resumed.stderr
    assert losses(folder)[-1]["step"] == 80
    assert f"Resuming from step {done}" in resumed.stderr
    assert not (folder / "stopped.json").exists()


def test_two_runs_in_one_folder_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "LOCK_SECONDS", 0.1)
    folder = tmp_path / "run"
    first = Forked("run_pretraining.py", *flags(data, folder, "--num_train_epochs", 500, "--save_total_limit", 2))
    wait_for_lines(folder, 3, first)
    before = {path.name for path in folder.glob("checkpoint-*")}
    for choice in (RESUME, ["--overwrite_output_dir"]):
        second = run_here("run_pretraining.py", *flags(data, folder, *choice))
        message = error_line(second)
        assert (
            f"{folder}: another run is writing there (process {first.process.pid} on {os.uname().nodename})" in message
        )
    assert before and first.is_running()
    first.kill()  # leaves the file, but not the lock
    third = run_here("run_pretraining.py", *flags(data, folder, *RESUME, "--seed", 1))
    assert "is of another run: seed was 0, is 1" in error_line(third)


def test_one_of_two_processes_that_is_asked_stops_both(data, tmp_path):
    folder = tmp_path / "run"

    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, runpy, sys\n"
        f"if os.environ['RANK'] == '1': pathlib.Path({str(tmp_path / 'second')!r}).write_text(str(os.getpid()))\n"
        f"runpy.run_path({script_path('run_pretraining.py')!r}, run_name='__main__')\n"
    )

    def stop_the_second():
        path, end = folder / "metrics.jsonl", time.monotonic() + 120
        while time.monotonic() < end and not (path.exists() and path.read_text().count("\n") >= 3):
            time.sleep(0.01)
        os.kill(int((tmp_path / "second").read_text()), signal.SIGTERM)

    thread = threading.Thread(target=stop_the_second)
    thread.start()
    process = run_together(str(script), *flags(data, folder, "--num_train_epochs", 50, batch_size=2))
    thread.join()
    assert process.returncode == 75, process.stderr
    assert process.stderr.count("Stopped by SIGTERM") == 1
    assert "Traceback" not in process.stderr
    (newest,) = [path for path in folder.glob("checkpoint-*") if path.name == f"checkpoint-{len(losses(folder))}"]
    assert (newest / "checksums.json").exists()


def test_results_of_a_shorter_run_do_not_outlive_its_going_on(finished, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    longer = Forked("run_pretraining.py", *flags(data, folder, *RESUME, "--num_train_epochs", 500))
    while not (folder / "checkpoint-10").exists():
        assert longer.is_running()
        time.sleep(0.01)
    longer.kill()
    assert not (folder / "all_results.json").exists()


def test_a_run_that_was_killed_before_its_results_still_reports_them(finished, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "all_results.json").unlink()
    process = run_here("run_pretraining.py", *flags(data, folder, *RESUME))
    assert process.returncode == 0, process.stderr
    expected, found = (json.loads((path / "all_results.json").read_text()) for path in (finished, folder))
    last = losses(finished)[-1]
    for name in ("loss", "reconstruction_loss", "contrastive_loss", "gradient_norm"):
        assert found[name] == expected[name] == last[name]
    assert found["pairs_per_second"] > 0
    assert found.keys() == expected.keys()


def test_another_run_is_not_replaced_by_going_on_from_elsewhere(interrupted, finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    elsewhere = ["--resume_from_checkpoint", interrupted / "checkpoint-4"]
    process = run_here("run_pretraining.py", *flags(data, tmp_path / "other", *elsewhere))
    assert "already holds a run" in error_line(process)
    process = run_here("run_pretraining.py", *flags(data, tmp_path / "new", *elsewhere))
    assert process.returncode == 0, process.stderr
    assert losses(tmp_path / "new") == losses(finished)[4:]


def test_checkpoints_after_the_one_that_a_run_goes_on_from_are_removed(finished, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    older = ["--resume_from_checkpoint", folder / "checkpoint-2", "--save_total_limit", 1, "--checkpointing_steps", 3]
    process = run_here("run_pretraining.py", *flags(data, folder, *older))
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("is removed: the run goes on from before it") == 3
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]
    assert [line["loss"] for line in losses(folder)] == [line["loss"] for line in losses(finished)]
