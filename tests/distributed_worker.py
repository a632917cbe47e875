"""One of the CPU processes of `test_distributed.py`: a training step on its share of a batch, its outcome saved."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import random_tensor, shake, tiny_config
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from vicmae_hf import ViCMAEForPreTraining


OBJECTIVES = {
    "info_nce": {"contrastive_loss": "info_nce"},
    "info_nce_learned_temperature": {"contrastive_loss": "info_nce", "learnable_temperature": True},
    "nt_xent": {"contrastive_loss": "nt_xent", "reconstruct": "both"},
    "simsiam": {"contrastive_loss": "simsiam"},
    "vicreg": {"contrastive_loss": "vicreg"},
}


def seeded_model(objective: str) -> ViCMAEForPreTraining:
    torch.manual_seed(0)
    config = tiny_config(contrastive_weight=1.0, **OBJECTIVES[objective])
    return shake(ViCMAEForPreTraining(config).double()).train()


def joined_batch() -> dict[str, torch.Tensor]:
    """Samples that differ in mean and scale, so that statistics of half a batch would be seen to be wrong."""
    scale = torch.linspace(0.5, 3, 6, dtype=torch.float64).reshape(6, 1, 1, 1, 1)
    pixel_values = scale * random_tensor(6, 2, 3, 16, 16, dtype=torch.float64) + scale
    return {"pixel_values": pixel_values, "noise": random_tensor(6, 2, 16, seed=1, dtype=torch.float64)}


def outcome(model: ViCMAEForPreTraining, loss: torch.Tensor) -> dict:
    return {
        "loss": loss.detach(),
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def count_exchanges(model: ViCMAEForPreTraining, share: dict[str, torch.Tensor]) -> int:
    """How often the processes exchange tensors in a forward and backward pass, besides averaging gradients."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(**share).loss.backward()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("c10d::"))


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    share = {name: tensor.chunk(size)[rank] for name, tensor in joined_batch().items()}
    outcomes = {}
    for objective in OBJECTIVES:
        model = DistributedDataParallel(seeded_model(objective))
        loss = model(**share).loss
        loss.backward()
        exchanges = count_exchanges(seeded_model(objective), share)
        outcomes[objective] = outcome(model.module, loss) | {"exchanges": exchanges}
    torch.save(outcomes, output_dir / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
