"""FLOPs from the config, against what PyTorch counts as it computes."""

import pytest
import torch
from tiny_models import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.pretraining.flops import update_flops
from vicmae_hf.pretraining.presets import freeze_layers


@pytest.mark.parametrize("reconstruct", ["first", "both"])
@pytest.mark.parametrize("objective", ["info_nce", "nt_xent", "simsiam", "vicreg", "none"])
def test_flops_against_the_counter_of_torch(objective, reconstruct):
    # Eager attention: for its fused kernels the counter adds what the backward pass computes again.
    config = tiny_config(contrastive_loss=objective, reconstruct=reconstruct, attn_implementation="eager")
    height, width = config.image_height_and_width
    model = ViCMAEForPreTraining(config).train()
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(6, 2, 3, height, width)).loss.backward()
    assert update_flops(config, 6) == counter.get_total_flops()


@pytest.mark.parametrize("num_frozen", [1, 3, 4])
def test_flops_of_frozen_layers_against_the_counter_of_torch(num_frozen):
    config = tiny_config(num_hidden_layers=4, attn_implementation="eager")
    model = ViCMAEForPreTraining(config).train()
    freeze_layers(model, num_frozen)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(6, 2, 3, 16, 16)).loss.backward()
    assert update_flops(config, 6, num_frozen) == counter.get_total_flops()


def test_flops_of_the_large_model():
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    assert update_flops(ViCMAEConfig(**sizes), 128) == pytest.approx(27.57e12, rel=1e-3)
