"""The log of metrics."""

import io
import logging
import shutil
import sys
import time
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vicmae_hf.errors import InputError
from vicmae_hf.reports.film import write_film
from vicmae_hf.training import reporting
from vicmae_hf.training.arguments import TrainingArguments
from vicmae_hf.training.reporting import (
    MetricsLog,
    Progress,
    finish_trackers,
    read_metrics,
    start_trackers,
    track_pictures,
)


def write(log, step, loss):
    log.advance()
    log.write({"loss": loss}, step, step / 10, 0.1, 4 * step, 0.5 * step, 0.1 * step)


def test_rates_are_of_the_time_since_the_line_before(tmp_path):
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=4)
    log.write({"loss": 2.0}, 2, 0.2, 0.1, num_samples=8, elapsed_seconds=1.0, wait_seconds=0.2)
    log.write({"loss": 7.0, "eval_top1": 40.0}, 4, 0.4, 0.1, num_samples=32, elapsed_seconds=3.0, wait_seconds=1.2)
    log.__exit__()
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["loss"]) == (2, 2.0)
    assert (second["step"], second["loss"], second["eval_top1"]) == (4, 7.0, 40.0)
    assert (first["pairs_per_second"], first["data_wait_share"]) == pytest.approx((8, 0.2))
    assert (second["pairs_per_second"], second["data_wait_share"]) == pytest.approx((12, 0.5))


def test_a_resumed_log_drops_what_was_done_after_the_checkpoint(tmp_path):
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=9)
    for step in range(1, 7):
        write(log, step, float(step))
    log.__exit__()
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=9, start_step=4)
    write(log, 5, 50.0)
    log.__exit__()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        *((step, float(step)) for step in range(1, 5)),
        (5, 50.0),
    ]


def test_half_a_line_of_a_killed_run_is_passed_over(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=9, start_step=1)
    write(log, 2, 3.0)
    log.__exit__()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert "skipped a line" in caplog.text and "metrics.jsonl" in caplog.text


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path, capsys):
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=100)
    write(log, 10, 1.0)
    assert capsys.readouterr().err == ""  # a minute has not passed
    log.last_progress = time.monotonic() - reporting.PROGRESS_SECONDS
    write(log, 20, 1.0)
    write(log, 30, 1.0)
    # 80 updates are left, and 20 took 10 seconds.
    assert capsys.readouterr().err == "step 20 of 100, loss 1.0000, pairs/s 8, waiting for data 20%, 00:40 left\n"
    write(log, 100, 1.0)
    assert capsys.readouterr().err.startswith("step 100 of 100")
    log.__exit__()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_with_a_terminal_progress_is_a_bar(tmp_path):
    with (
        mock.patch("sys.stderr", Terminal()) as stderr,
        MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", 2) as log,
    ):
        write(log, 1, 1.0)
        write(log, 2, 1.0)
    assert "2/2" in stderr.getvalue() and "step 2 of 2" not in stderr.getvalue()


def test_in_a_notebook_progress_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    with MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", 2) as log:
        write(log, 2, 1.0)
        assert log.has_bar
    assert "step 2 of 2" not in capsys.readouterr().err


def test_progress_of_work_is_a_line_now_and_then_of_the_main_process(capsys):
    times = iter([100.0, 104.0, 130.0, 131.0, 140.0])  # the start, and the ends of four pieces of work
    with mock.patch("time.monotonic", lambda: next(times)), Progress("packing", 40, "boxes") as progress:
        for count in (4, 6, 20, 15):  # five more than there are, as with processes of unequal shares
            progress.advance(count)
    # A line at most every ten seconds: after 30 seconds 10 were done, and 30 were left.
    assert capsys.readouterr().err == "packing: 10 of 40 boxes, 01:30 left\npacking: 40 of 40 boxes, 00:00 left\n"
    times = iter([100.0, 200.0])
    with mock.patch("time.monotonic", lambda: next(times)), Progress("packing", 2, "boxes", is_shown=False) as other:
        other.advance()
    assert capsys.readouterr().err == ""
    with mock.patch("sys.stderr", Terminal()) as stderr, Progress("packing", 2, "boxes") as progress:
        progress.advance(2)
    assert "packing:   0%|" in stderr.getvalue() and "packing: 2 of 2" not in stderr.getvalue()


class Tracker(GeneralTracker):
    requires_logging_directory = False
    main_process_only = False
    tracker = None

    def __init__(self, name, is_broken=False):
        self.name = name
        self.is_broken = is_broken
        self.lines = []
        super().__init__()

    def log(self, values, step, **kwargs):
        self.lines.append((step, values["loss"]))
        if self.is_broken:
            raise ConnectionError("the server is gone")


def test_a_tracker_that_fails_warns_once_and_the_others_go_on(tmp_path, caplog):
    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [broken, sound] = [Tracker("broken", is_broken=True), Tracker("sound")]
    log = MetricsLog(accelerator, tmp_path, "pairs", num_steps=9)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            write(log, step, float(step))
    log.__exit__()
    assert broken.lines == [(1, 1.0)]
    assert sound.lines == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert caplog.text.count("tracker broken failed") == 1 and "the server is gone" in caplog.text
    assert len(read_metrics(tmp_path)) == 3


def test_trackers_get_the_names_of_project_and_run(tmp_path):
    accelerator = mock.Mock()
    first = TrainingArguments(train_data=["data"], output_dir=str(tmp_path / "first"), project="birds")
    second = TrainingArguments(train_data=["data"], output_dir=str(tmp_path), run_name="second")
    for arguments in (first, second):
        start_trackers(accelerator, arguments, {"seed": 3, "train_data": ["data"], "learning_rate": 0.5})
    for call, project, run_name in zip(
        accelerator.init_trackers.call_args_list, ["birds", "vicmae"], ["first", "second"], strict=True
    ):
        assert call.args == (project,)
        assert call.kwargs["config"] == {"seed": 3, "learning_rate": 0.5}
        assert call.kwargs["init_kwargs"]["wandb"] == call.kwargs["init_kwargs"]["trackio"] == {"name": run_name}
        assert call.kwargs["init_kwargs"]["mlflow"] == {"run_name": run_name}


def test_the_pictures_of_a_run_go_to_the_trackers_that_show_them(tmp_path, monkeypatch):
    (tmp_path / "plots").mkdir()
    Image.new("RGB", (5, 4), (255, 0, 10)).save(tmp_path / "plots" / "losses.png")
    frames, colours = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.rand(3, 4, 3)
    write_film(frames, [colours, colours], (2, 2), 5.0, tmp_path / "plots" / "features.webp")
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    accelerator = Accelerator(cpu=True)
    board, weights = TensorBoardTracker("birds", tmp_path), Tracker("wandb")
    board.start()
    weights.log_images, weights.log, videos = mock.Mock(), mock.Mock(), mock.Mock()
    videos.Video = lambda path: Image.open(path).n_frames
    monkeypatch.setitem(sys.modules, "wandb", videos)
    accelerator.trackers = [board, weights, Tracker("one that shows none")]
    track_pictures(accelerator, tmp_path)
    assert len(accelerator.trackers) == 3
    finish_trackers(accelerator)
    events = EventAccumulator(str(tmp_path / "birds"), size_guidance={"images": 0}).Reload()
    (image,) = events.Images("plots/losses")
    assert (image.step, image.width, image.height) == (7, 5, 4)
    assert Image.open(io.BytesIO(image.encoded_image_string)).getpixel((0, 0)) == (255, 0, 10)
    (film,) = events.Images("plots/features")
    gif = Image.open(io.BytesIO(film.encoded_image_string))
    assert (film.step, (film.width, film.height)) == (7, gif.size)
    assert (gif.format, gif.n_frames, gif.info["duration"]) == ("GIF", 3, 200)
    assert weights.log.call_args == mock.call({"plots/features": 3}, step=7)
    ((values,), settings) = weights.log_images.call_args
    assert settings == {"step": 7} and values["plots/losses"][0].size == (5, 4)


def test_a_folder_that_was_removed_meanwhile_is_named_in_one_line(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    log = MetricsLog(Accelerator(cpu=True), folder, "pairs", num_steps=9)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(No such file or directory\)"):
        write(log, 1, 1.0)
    log.__exit__()
