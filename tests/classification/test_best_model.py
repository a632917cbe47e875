"""The best model of a run, kept beside the checkpoints and in them."""

import json
import math

from accelerate import Accelerator

from vicmae_hf.classification.best_model import BestModel


class Counter:
    """Writes how often it was saved."""

    def __init__(self):
        self.value = 0

    def save(self, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_text(str(self.value))


def test_the_best_model_is_kept_and_goes_with_checkpoints(tmp_path):
    counter = Counter()
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    best = BestModel(Accelerator(cpu=True), output_dir, counter.save)

    def kept():
        return (output_dir / "model.safetensors").read_text()

    for counter.value, top1 in enumerate([10.0, 30.0, 30.0, 20.0]):
        best.update({"eval_top1": top1, "best_step": counter.value})
    assert kept() == "1"
    assert best.figures == {"eval_top1": 30.0, "best_step": 1}
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    best.save(checkpoint)
    assert json.loads((checkpoint / "best.json").read_text()) == best.figures
    counter.value = 4
    best.update({"eval_top1": 40.0, "best_step": 4})
    assert kept() == "4"
    # What the checkpoint holds was not written over.
    assert (checkpoint / "best" / "model.safetensors").read_text() == "1"

    resumed = BestModel(Accelerator(cpu=True), output_dir, counter.save)
    resumed.load(checkpoint)
    assert kept() == "1"
    counter.value = 5
    resumed.update({"eval_top1": 29.0, "best_step": 5})
    assert kept() == "1"
    resumed.update({"eval_top1": 31.0, "best_step": 5})
    assert kept() == "5"
    assert (checkpoint / "best" / "model.safetensors").read_text() == "1"
    assert sorted(path.name for path in output_dir.iterdir()) == ["model.safetensors"]


def test_any_figure_is_better_than_none(tmp_path):
    """Of a first evaluation in which no file that could be read has a label, also after an interruption."""
    counter, output_dir, checkpoint = Counter(), tmp_path / "run", tmp_path / "checkpoint-1"
    output_dir.mkdir()
    checkpoint.mkdir()
    best = BestModel(Accelerator(cpu=True), output_dir, counter.save)
    kept = []
    for counter.value, mean_average_precision in enumerate([math.nan, math.nan, 5.0, math.nan, 4.0, 6.0]):
        if counter.value == 1:
            best.save(checkpoint)
            best = BestModel(Accelerator(cpu=True), output_dir, counter.save)
            best.load(checkpoint)
        best.update({"eval_map": mean_average_precision})
        kept.append((output_dir / "model.safetensors").read_text())
    assert kept == ["0", "0", "2", "2", "2", "5"]
    assert best.figures == {"eval_map": 6.0}
