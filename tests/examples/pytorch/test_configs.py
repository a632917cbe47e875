"""Every recipe parses, builds the model that it names, and holds the figures of the paper's tables."""

from pathlib import Path

import pytest
import torch
from launching import EXAMPLES

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.classification.arguments import ClassificationArguments
from vicmae_hf.command_line import parse_arguments, parse_config_overrides
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.training.session.models import build_model


CONFIGS = EXAMPLES / "pytorch" / "configs"
STUDY_RECIPE = EXAMPLES / "study" / "study.yaml"
PATHS = ["--train_data", "data", "--output_dir", "out"]


def recipe(name: str) -> PretrainingArguments:
    return parse_arguments(PretrainingArguments, [str(CONFIGS / f"{name}.yaml"), *PATHS])


CLASSIFICATION_RECIPES = [
    *sorted(CONFIGS.glob("finetune_*.yaml")),
    *sorted(CONFIGS.glob("linear_*.yaml")),
]
DEMO_CLASSIFICATION_RECIPES = [CONFIGS / f"demo_{kind}.yaml" for kind in ("images", "motion")]


def classification_recipe(name: str) -> ClassificationArguments:
    path = CONFIGS / f"{name}.yaml"
    return parse_arguments(ClassificationArguments, [str(path), *PATHS, "--eval_data", "held_out"])


@pytest.mark.parametrize(
    "path",
    [*sorted({*CONFIGS.glob("*.yaml")} - {*CLASSIFICATION_RECIPES, *DEMO_CLASSIFICATION_RECIPES}), STUDY_RECIPE],
    ids=lambda path: path.stem,
)
def test_every_recipe_builds_its_model(path: Path):
    arguments = parse_arguments(PretrainingArguments, [str(path), *PATHS])
    with torch.device("meta"):
        model = build_model(ViCMAEForPreTraining, arguments)
    assert model.config.hidden_size > 0


def test_the_study_has_the_encoder_of_the_demo():
    """But for what the study itself decides: the pooling, as Table 4, and the weight, which it tunes."""
    study = parse_arguments(PretrainingArguments, [str(STUDY_RECIPE), *PATHS])
    fields, of_demo = (
        parse_config_overrides(ViCMAEConfig, arguments.config_overrides) for arguments in (study, recipe("demo"))
    )
    assert (fields.pop("pooling"), of_demo.pop("pooling")) == ("cls", "mean")
    assert of_demo.pop("contrastive_weight") == 0.1
    assert fields == of_demo
    assert study.image_size == recipe("demo").image_size


@pytest.mark.parametrize("path", DEMO_CLASSIFICATION_RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_demo_are_for_its_data(path: Path):
    arguments = parse_arguments(ClassificationArguments, [str(path), "--output_dir", "out"])
    kind = path.stem.removeprefix("demo_")
    assert arguments.task == {"images": "image", "motion": "video"}[kind]
    assert (arguments.train_data, arguments.eval_data) == (
        [f"data/demo_large/{kind}/train"],
        f"data/demo_large/{kind}/eval",
    )
    # A mirrored clip moves the other way.
    assert arguments.horizontal_flip == (kind == "images")


# Encoders of Dosovitskiy et al., Table 1; recipes of the supplement's Table 1.
@pytest.mark.parametrize(("size", "width", "layers", "heads"), [("base", 768, 12, 12), ("large", 1024, 24, 16)])
@pytest.mark.parametrize("suffix", ["", "_released"])
def test_recipes_hold_the_figures_of_table_1(size, width, layers, heads, suffix):
    arguments = recipe(f"pretrain_vit_{size}{suffix}")
    assert 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 4096
    assert arguments.contrast_across_accumulation == (suffix == "")
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


# Table 2, cell by cell; the single values under P65 and SSv2 for both encoders.
TABLE_2 = {
    ("in1k", "base"): (3e-3, 100),
    ("in1k", "large"): (0.5e-3, 50),
    ("p65", "base"): (2e-3, 60),
    ("p65", "large"): (2e-3, 50),
    ("k400", "base"): (1.6e-3, 150),
    ("k400", "large"): (4.8e-3, 100),
    ("ssv2", "base"): (1e-3, 40),
    ("ssv2", "large"): (1e-3, 40),
}
# Batch, layer-wise decay, drop path.
TABLE_2_BY_SIZE = {"base": (1024, 0.65, 0.1), "large": (768, 0.75, 0.2)}


def test_there_is_a_recipe_for_every_cell_of_tables_2_and_3():
    expected = {f"{method}_{data}_vit_{size}" for method in ("finetune", "linear") for data, size in TABLE_2}
    names = {path.stem for path in CLASSIFICATION_RECIPES}
    assert names == expected | {"finetune_in1k_vit_base_label_fraction"}


@pytest.mark.parametrize(("data", "size"), TABLE_2)
def test_recipes_hold_the_figures_of_table_2(data, size):
    arguments = classification_recipe(f"finetune_{data}_vit_{size}")
    assert arguments.method == "finetune"
    assert (arguments.base_learning_rate, arguments.num_train_epochs) == TABLE_2[data, size]
    total_batch = 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    assert (total_batch, arguments.layer_decay, arguments.drop_path_rate) == TABLE_2_BY_SIZE[size]
    assert (arguments.warmup_epochs, arguments.weight_decay) == (5, 0.05)
    assert (arguments.rand_augment_magnitude, arguments.rand_augment_std) == (9, 0.5)
    assert (arguments.label_smoothing, arguments.mixup, arguments.cutmix) == (0.1, 0.8, 0)
    check_task(arguments, data)
    assert arguments.horizontal_flip == (data != "ssv2")


@pytest.mark.parametrize(("data", "size"), TABLE_2)
def test_recipes_hold_the_figures_of_table_3(data, size):
    arguments = classification_recipe(f"linear_{data}_vit_{size}")
    assert arguments.method == "linear"
    assert 8 * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 4096
    assert (arguments.base_learning_rate, arguments.num_train_epochs) == (0.1, 90)
    assert (arguments.warmup_epochs, arguments.weight_decay) == (10, 0)
    # [CLS] of a frozen encoder is the same in any order of frames.
    assert arguments.config_overrides == ("pooling=tubelets" if data == "ssv2" else None)
    # RandomResizedCrop alone.
    assert arguments.train_augmentation
    assert not any([arguments.horizontal_flip, arguments.rand_augment_magnitude, arguments.random_erasing])
    assert not any([arguments.mixup, arguments.cutmix, arguments.label_smoothing, arguments.drop_path_rate])
    check_task(arguments, data)


def check_task(arguments: ClassificationArguments, data: str) -> None:
    assert arguments.task == ("video" if data in ("k400", "ssv2") else "image")
    if data == "k400":
        assert (arguments.num_frames, arguments.frames_per_second) == (16, 30 / 4)
    if data == "ssv2":
        assert (arguments.num_frames, arguments.frames_per_second) == (16, 0)


def test_the_recipe_of_table_5_is_table_2_without_randaugment_and_mixup():
    arguments = classification_recipe("finetune_in1k_vit_base_label_fraction")
    whole = classification_recipe("finetune_in1k_vit_base")
    differing = {name for name, value in vars(arguments).items() if value != getattr(whole, name)}
    assert differing == {"label_fraction", "rand_augment_magnitude", "mixup"}
    assert (arguments.rand_augment_magnitude, arguments.mixup) == (0, 0)


@pytest.mark.parametrize("path", CLASSIFICATION_RECIPES, ids=lambda path: path.stem)
def test_what_a_recipe_says_of_itself(path: Path):
    arguments = classification_recipe(path.stem)
    text = " ".join(line.removeprefix("# ") for line in path.read_text().splitlines())
    assert f"configs/{path.name}" in text
    per_device, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    assert f"Effective batch {8 * per_device * accumulation} = 8 GPUs x {per_device} x {accumulation};" in text
    assert f"on one GPU: --gradient_accumulation_steps {8 * accumulation}." in text
    assert "Reproduced here: no" in text
    if "p65" in path.stem or "ssv2" in path.stem:
        assert ("Table 2 has one" in text) == path.stem.startswith("finetune")
