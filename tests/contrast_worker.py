"""
Two updates of the training loop with a contrastive loss across its batches: the first before the loss counts, the
second with it. As a script, one of the CPU processes of `pretraining/test_contrast.py`.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from launching import forget_accelerate
from tiny_models import shake, tiny_config

from vicmae_hf import ViCMAEForPreTraining, ViCMAEImageProcessor
from vicmae_hf.pretraining.contrast import look_ahead
from vicmae_hf.pretraining.objective import Objective
from vicmae_hf.training.arguments import TrainingArguments
from vicmae_hf.training.loop import Updates
from vicmae_hf.training.optimization import plan_run


RANDOM = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "drop_path_rate": 0.3}
OBJECTIVES = {
    "info_nce": {"contrastive_loss": "info_nce"},
    "info_nce_both": {"contrastive_loss": "info_nce", "reconstruct": "both", "learnable_temperature": True},
    "nt_xent": {"contrastive_loss": "nt_xent", "learnable_temperature": True},
    "nt_xent_both": {"contrastive_loss": "nt_xent", "reconstruct": "both"},
    "simsiam": {"contrastive_loss": "simsiam"},
    "simsiam_both": {"contrastive_loss": "simsiam", "reconstruct": "both"},
    "vicreg": {"contrastive_loss": "vicreg"},
    "vicreg_both": {"contrastive_loss": "vicreg", "reconstruct": "both"},
}
ACCUMULATION, BATCH_SIZE, SEED, WEIGHT = 3, 2, 11, 0.7


def build(settings: dict, dtype: torch.dtype = torch.float64) -> ViCMAEForPreTraining:
    torch.manual_seed(0)
    config = tiny_config(**{"contrastive_weight": WEIGHT, **settings})
    return shake(ViCMAEForPreTraining(config).to(dtype)).train()


def make_batch(micro_step: int, rank: int = 0) -> dict[str, torch.Tensor]:
    """Batches that differ in mean and contrast, so that statistics of one alone would be seen to be wrong."""
    number = 10 * rank + micro_step
    generator = torch.Generator().manual_seed(number)
    pixel_values = torch.randint(0, 60 + 15 * number % 180, (BATCH_SIZE, 2, 3, 16, 16), generator=generator)
    noise = torch.rand(BATCH_SIZE, 2, 16, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixel_values.byte(), "noise": noise}


def train(
    model: ViCMAEForPreTraining, accelerator: Accelerator, start_epoch: float = 1.0
) -> tuple[dict, list[dict[str, float]]]:
    """Makes two updates that change no weight. Returns what the second left, and the losses of each."""
    num_steps, rank = 2, accelerator.process_index
    arguments = TrainingArguments(
        train_data=["none"],
        output_dir="none",
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        max_train_steps=num_steps,
        warmup_epochs=0,
        seed=SEED,
    )
    schedule = plan_run(arguments, accelerator.num_processes, BATCH_SIZE * ACCUMULATION * accelerator.num_processes)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0, fused=True))
    gradients = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: parameter.grad.clone() for parameter, name in names.items()})
    )
    objective = Objective(prepared, model, ViCMAEImageProcessor(), start_epoch)
    batches = [make_batch(micro_step, rank) for micro_step in range(num_steps * ACCUMULATION)]
    compute_losses, batches = look_ahead(accelerator, objective, batches, schedule, SEED)
    updates = Updates(accelerator, prepared, optimizer, batches, compute_losses, schedule, arguments)
    losses = []
    for step in range(num_steps):
        updates.make(step)
        losses.append(updates.read_losses())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"gradients": gradients, "buffers": buffers, "output": objective.output}, losses


def cpu_accelerator(**settings) -> Accelerator:
    kwargs = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, kwargs_handlers=kwargs, **settings)


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    outcomes = {}
    for name, settings in OBJECTIVES.items():
        forget_accelerate()
        accelerator = cpu_accelerator()
        outcome, losses = train(build(settings | RANDOM), accelerator)
        del outcome["output"]
        outcomes[name] = (outcome, losses)
    torch.save(outcomes, output_dir / f"rank_{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
