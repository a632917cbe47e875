"""Learning rates and weight decay."""

import math

import pytest
import torch

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.training.optimization import learning_rate_factor, parameter_groups, scaled_learning_rate


def test_learning_rate_follows_table_1():
    factors = [learning_rate_factor(step, num_warmup_steps=4, num_steps=12) for step in range(13)]
    assert factors[:5] == [0, 0.25, 0.5, 0.75, 1]
    expected = [(1 + math.cos(math.pi * (step - 4) / 8)) / 2 for step in range(4, 13)]
    assert factors[4:] == pytest.approx(expected)
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate_factor(0, num_warmup_steps=0, num_steps=10) == 1


def test_linear_scaling():
    assert scaled_learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_weight_decay_is_on_matrices_only():
    config = ViCMAEConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        learnable_temperature=True,
    )
    model = ViCMAEForPreTraining(config)
    model.vicmae.layers[0].mlp.fc1.weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, weight_decay=0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    plain_names = {names[id(parameter)] for parameter in plain["params"]}
    # Matrices are the weights of linear layers and of the patch embedding, found here by module type.
    matrices = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }
    frozen = {"vicmae.layers.0.mlp.fc1.weight"}
    assert decayed_names == matrices - frozen
    assert plain_names == set(names.values()) - matrices
    assert {"vicmae.embeddings.cls_token", "decoder.mask_token", "logit_scale"} <= plain_names
