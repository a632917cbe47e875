"""The loop: what stops it, and what it leaves of the weights then."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from launching import forget_accelerate
from safetensors.torch import save_file
from torch import nn

from vicmae_hf import ViCMAEConfig, ViCMAEModel
from vicmae_hf.errors import NonFiniteError
from vicmae_hf.training.arguments import TrainingArguments
from vicmae_hf.training.checkpointing import Checkpoints, TrainedModule
from vicmae_hf.training.loop import Losses, Updates, train
from vicmae_hf.training.optimization import plan_run
from vicmae_hf.training.resuming import CheckpointError
from vicmae_hf.training.run_folder import RunFolder


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 16}


class Line(TrainedModule):
    """Its root has a finite value at 0, and an infinite slope."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, values):
        return (self.weight * values).abs().sqrt().sum()

    def save_checkpoint(self, folder):
        save_file(self.state_dict(), folder / "line.safetensors")


def run(output_dir, values, **settings):
    """Trains a line on one value an update, at a constant learning rate."""
    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    arguments = TrainingArguments(
        train_data=["none"],
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        max_train_steps=len(values),
        warmup_epochs=0,
        base_learning_rate=1.0,
        seed=7,
        **settings,
    )
    model = Line()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True))
    schedule = plan_run(arguments, 1, num_samples=4)
    batches = [
        {"values": torch.tensor([value, 1.0]), "name": [f"{step}a", f"{step}b"]} for step, value in enumerate(values)
    ]
    seen = []

    def compute_losses(batch, epoch):
        seen.append(model.weight.detach().clone())
        return {"loss": model(batch["values"])}

    folder = RunFolder(accelerator, arguments, "samples")
    folder.begin(schedule, ViCMAEModel(ViCMAEConfig(**TINY)), {})
    try:
        with folder.logging(schedule):
            train(Updates(accelerator, model, optimizer, batches, compute_losses, schedule, arguments), folder)
    finally:
        forget_accelerate()
        seen.append(model.weight.detach().clone())
        (output_dir / "seen.json").write_text(json.dumps([weight.tolist() for weight in seen]))


def test_an_infinite_gradient_under_a_finite_loss_stops_at_the_next_line(tmp_path):
    with pytest.raises(NonFiniteError, match=r"not finite at step 3 \(loss 1\.\d+, gradient_norm (nan|inf)") as raised:
        run(tmp_path, [1.0, 1.0, 0.0, 1.0, 1.0, 1.0], logging_steps=5, checkpointing_steps=0)
    assert "there is no checkpoint yet" in str(raised.value) and "non_finite.json" in str(raised.value)
    weights = torch.tensor(json.loads((tmp_path / "seen.json").read_text()))
    # One more than updates were tried: five, up to the line. From the bad one on the weights are those of the second.
    assert len(weights) == 6 and weights.isfinite().all()
    assert not torch.equal(weights[1], weights[2])
    assert all(torch.equal(after, weights[2]) for after in weights[3:])
    kept = json.loads((tmp_path / "non_finite.json").read_text())
    assert kept["step"] == 3 and kept["seed"] == 7 and kept["samples"] == ["2a", "2b"]
    assert float(kept["losses"]["loss"]) == pytest.approx(weights[2, 1].abs().sqrt().item(), rel=1e-5)


def test_a_checkpoint_is_not_written_after_a_bad_update(tmp_path):
    with pytest.raises(NonFiniteError, match=r"at step 3 .* the last checkpoint is .*checkpoint-2"):
        run(tmp_path, [1.0, 1.0, 0.0, 1.0], logging_steps=100, checkpointing_steps=2)
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Line())
    with torch.no_grad():
        model.weight[1] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 1 weights are not finite, the first: weight"):
        Checkpoints(accelerator, tmp_path, None, run_settings={}).save(5)
    assert list(tmp_path.iterdir()) == []
    forget_accelerate()


def test_the_mean_of_a_line_is_that_of_its_updates():
    losses = Losses(torch.device("cpu"))
    for step, value in enumerate([1.0, 2.0, 6.0], 1):
        assert losses.add({"loss": torch.tensor(value), "norm": torch.tensor(-value)}, step) == 0
    assert losses.read() == {"loss": 3.0, "norm": -3.0}
    losses.add({"loss": torch.tensor(5.0), "norm": torch.tensor(0.0)}, 4)
    assert losses.read() == {"loss": 5.0, "norm": 0.0}


def test_a_gradient_scaler_may_skip_some_updates_in_a_row():
    losses = Losses(torch.device("cpu"), max_skipped=2)
    values = [1.0, torch.inf, torch.nan, 3.0, torch.inf, torch.inf]
    is_bad = [losses.add({"loss": torch.tensor(value)}, step).item() for step, value in enumerate(values, 1)]
    assert is_bad == [0, 1, 1, 0, 1, 1]
    assert losses.read() == {"loss": 2.0}  # without those that were skipped
    losses.add({"loss": torch.tensor(torch.inf)}, 7)
    losses.add({"loss": torch.tensor(1.0)}, 8)
    with pytest.raises(NonFiniteError, match=r"at step 5 \(loss inf\)") as raised:
        losses.read()
    assert raised.value.step == 5


def test_an_optimizer_that_cannot_pass_over_an_update_is_refused(tmp_path):
    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model := Line(), torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="must be a fused one"):
        Updates(accelerator, model, optimizer, [], None, None, None)
    forget_accelerate()


def test_a_disk_without_room_for_a_checkpoint_is_told_before_any_update(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))
    with pytest.raises(CheckpointError, match="the disk has 0 MiB left, and the model with its checkpoint needs"):
        run(tmp_path, [1.0], logging_steps=1, checkpointing_steps=1)
    assert not (tmp_path / "metrics.jsonl").exists()
