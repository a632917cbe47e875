"""Every recipe parses, and builds the model that it names."""

from pathlib import Path

import pytest
import torch
from launching import EXAMPLES

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.training.arguments import PretrainingArguments, parse_arguments, parse_config_overrides
from vicmae_hf.training.session import build_model


PATHS = ["--train_data", "data", "--output_dir", "out"]


def recipe(name: str) -> PretrainingArguments:
    return parse_arguments(PretrainingArguments, [str(EXAMPLES / "configs" / f"{name}.yaml"), *PATHS])


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_builds_its_model(path: Path):
    arguments = parse_arguments(PretrainingArguments, [str(path), *PATHS])
    with torch.device("meta"):
        model = build_model(ViCMAEForPreTraining, arguments)
    assert model.config.hidden_size > 0


# Encoders of Dosovitskiy et al., Table 1; recipes of the supplement's Table 1.
@pytest.mark.parametrize(("size", "width", "layers", "heads"), [("base", 768, 12, 12), ("large", 1024, 24, 16)])
@pytest.mark.parametrize("suffix", ["", "_released"])
def test_recipes_hold_the_figures_of_table_1(size, width, layers, heads, suffix):
    arguments = recipe(f"pretrain_vit_{size}{suffix}")
    assert 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 4096
    assert arguments.base_learning_rate == 1.5e-4
    assert (arguments.num_train_epochs, arguments.warmup_epochs, arguments.weight_decay) == (800, 40, 0.05)
    config = ViCMAEConfig(**parse_config_overrides(ViCMAEConfig, arguments.config_overrides))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (width, layers, heads)
    assert config.intermediate_size == 4 * width
    if suffix:
        assert (config.mask_ratio, config.reconstruct, config.contrastive_loss) == (0.5, "both", "nt_xent")
        assert (config.projector_hidden_size, config.projector_output_size) == (4096, 128)
        assert config.contrastive_weight == pytest.approx(0.03 / 0.97)
        assert arguments.contrastive_start_epoch == 0
        assert arguments.color_augmentation
    else:
        assert (config.contrastive_weight, config.reconstruct, config.contrastive_loss) == (0.025, "first", "info_nce")
        assert arguments.contrastive_start_epoch == 200
        assert not arguments.color_augmentation
