"""The log of metrics."""

import pytest
from accelerate import Accelerator

from vicmae_hf.training.reporting import MetricsLog, read_metrics


def update(log, step, loss, *, write):
    log.update(
        {"loss": loss, "reconstruction_loss": 2 * loss},
        step=step,
        epoch=step / 10,
        learning_rate=0.1,
        num_samples=4 * step,
        elapsed_seconds=0.5 * step,
        wait_seconds=0.1 * step,
        figures={"eval_top1": 10.0 * step} if step == 4 else {},
        write=write,
    )


def test_lines_average_what_came_since_the_line_before(tmp_path):
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=4)
    for step, loss in enumerate([1.0, 3.0, 5.0, 9.0], start=1):
        update(log, step, loss, write=step % 2 == 0)
    log.__exit__()
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["loss"], first["reconstruction_loss"]) == (2, 2.0, 4.0)
    assert (second["step"], second["loss"], second["reconstruction_loss"]) == (4, 7.0, 14.0)
    assert "eval_top1" not in first
    assert second["eval_top1"] == 40
    for line in (first, second):
        assert line["pairs_per_second"] == pytest.approx(8)
        assert line["data_wait_share"] == pytest.approx(0.2)


def test_a_resumed_log_drops_what_was_done_after_the_checkpoint(tmp_path):
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=9)
    for step in range(1, 7):
        update(log, step, float(step), write=True)
    log.__exit__()
    log = MetricsLog(Accelerator(cpu=True), tmp_path, "pairs", num_steps=9, start_step=4)
    update(log, 5, 50.0, write=True)
    log.__exit__()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        *((step, float(step)) for step in range(1, 5)),
        (5, 50.0),
    ]
