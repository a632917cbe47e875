"""The loop: what stops it, and what it leaves of the weights then."""

import pytest
import torch
from accelerate import Accelerator
from launching import forget_accelerate
from torch import nn

from vicmae_hf.training.arguments import TrainingArguments
from vicmae_hf.training.checkpointing import Checkpoints, TrainedModule
from vicmae_hf.training.loop import NonFiniteLossError, train
from vicmae_hf.training.optimization import plan_run
from vicmae_hf.training.reporting import MetricsLog


class Line(TrainedModule):
    """Its root has a finite value at 0, and an infinite slope."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, values):
        return (self.weight * values).abs().sqrt().sum()


def test_an_infinite_gradient_under_a_finite_loss_stops_before_the_update(tmp_path):
    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    arguments = TrainingArguments(
        train_data=["none"],
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_train_steps=5,
        warmup_epochs=0,
        base_learning_rate=1.0,
        logging_steps=1,
        checkpointing_steps=0,
    )
    model = Line()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True))
    schedule = plan_run(arguments, 1, num_samples=4)
    batches = [{"values": torch.tensor([float(step != 2), 1.0])} for step in range(5)]
    seen = []

    def compute_losses(batch, epoch):
        seen.append(model.weight.detach().clone())
        return {"loss": model(batch["values"])}

    checkpoints = Checkpoints(accelerator, tmp_path, None, run_settings={})
    with (
        MetricsLog(accelerator, tmp_path, "samples", 5) as log,
        pytest.raises(NonFiniteLossError, match=r"not finite at step 3 \(loss 1\.\d+, gradient_norm (nan|inf)\)"),
    ):
        train(accelerator, model, optimizer, batches, compute_losses, schedule, log, checkpoints, arguments)
    assert len(seen) == 3
    # The weights are those of the second update.
    assert torch.equal(model.weight, seen[2])
    assert model.weight.isfinite().all() and not torch.equal(seen[1], seen[2])
    forget_accelerate()
