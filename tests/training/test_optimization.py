"""Learning rates and weight decay."""

import math

import pytest
import torch
from tiny_models import tiny_config

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining, ViCMAEForVideoClassification
from vicmae_hf.classification.classification import layer_decay_scale
from vicmae_hf.training.optimization import (
    learning_rate_factor,
    parameter_groups,
    scaled_learning_rate,
    set_learning_rate,
)


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


def test_layer_decay_of_a_base_model():
    """Exponents as in BEiT and MAE: 13 for the embeddings of 12 layers, 12 to 1 for the layers, 0 above."""
    exponents = {
        "vicmae.embeddings.cls_token": 13,
        "vicmae.embeddings.temporal_position_embeddings": 13,
        "vicmae.embeddings.patch_embeddings.projection.weight": 13,
        "vicmae.layers.0.attention.q_proj.weight": 12,
        "vicmae.layers.1.layernorm_before.bias": 11,
        "vicmae.layers.11.mlp.fc2.bias": 1,
        "vicmae.layernorm.weight": 0,
        "classifier.weight": 0,
    }
    for name, exponent in exponents.items():
        assert layer_decay_scale(name, 12, 0.65) == pytest.approx(0.65**exponent), name


def test_an_update_moves_each_depth_at_its_own_rate():
    """Adam's first step moves every parameter by its learning rate, whatever the gradient."""
    model = ViCMAEForVideoClassification(tiny_config(num_hidden_layers=3))
    groups = parameter_groups(model, 0.05, lambda name: layer_decay_scale(name, 3, 0.5))
    assert len(groups) == 2 * 5
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = torch.optim.AdamW([{**group, "weight_decay": 0.0} for group in groups], lr=0.0)
    set_learning_rate(optimizer, peak=0.01, factor=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: (before[name] - parameter.detach()).mean().item() for name, parameter in model.named_parameters()}
    for name, distance in moved.items():
        if name.startswith("vicmae.layers."):
            exponent = 3 - int(name.split(".")[2])
        else:
            exponent = 4 if "embeddings" in name else 0
        assert distance == pytest.approx(0.005 * 0.5**exponent, rel=1e-3), name


def test_groups_without_a_scale_get_the_whole_rate():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    set_learning_rate(optimizer, peak=0.2, factor=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_learned_positions_and_tokens_do_not_decay():
    model = ViCMAEForVideoClassification(tiny_config())
    groups = parameter_groups(model, 0.05)
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    found = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert found == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d))
    }
    assert model.vicmae.embeddings.temporal_position_embeddings.shape == (1, 2, 16)
