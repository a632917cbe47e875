import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from tiny_models import tiny_config
from transformers import AutoConfig

from vicmae_hf import ViCMAEConfig


def test_the_defaults_are_vit_b16_with_the_paper_s_objective():
    config = ViCMAEConfig()
    encoder = [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size]
    decoder = [
        config.decoder_hidden_size,
        config.decoder_num_hidden_layers,
        config.decoder_num_attention_heads,
        config.decoder_intermediate_size,
    ]
    assert encoder == [768, 12, 12, 3072]
    assert decoder == [512, 8, 16, 2048]
    assert (config.image_size, config.patch_size, config.num_frames, config.tubelet_size) == (224, 16, 16, 2)
    assert (config.mask_ratio, config.norm_pix_loss, config.reconstruct) == (0.75, True, "first")
    assert (config.contrastive_loss, config.contrastive_weight, config.temperature) == ("info_nce", 0.025, 0.1)
    assert (config.pooling, config.drop_path_rate, config.layer_norm_eps) == ("cls", 0.0, 1e-6)


def test_projector_widths_follow_the_encoder_unless_given():
    config = ViCMAEConfig()
    assert (config.projector_hidden_size, config.projector_output_size) == (1536, 1536)
    config = ViCMAEConfig(projector_hidden_size=4096, projector_output_size=128)
    assert (config.projector_hidden_size, config.projector_output_size) == (4096, 128)
    assert ViCMAEConfig(contrastive_loss="simsiam").projector_output_size == 768


def test_image_size_may_be_one_number_or_height_and_width():
    assert ViCMAEConfig(image_size=224).patch_grid == (14, 14)
    config = ViCMAEConfig(image_size=(160, 96))
    assert config.image_height_and_width == (160, 96)
    assert config.patch_grid == (10, 6)


def test_a_saved_config_comes_back_equal(tmp_path):
    config = tiny_config(
        image_size=(16, 24),
        contrastive_loss="vicreg",
        vicreg_variance_weight=10,
        id2label={0: "runs", 1: "sits", 2: "jumps"},
        problem_type="multi_label_classification",
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ViCMAEConfig
    assert loaded.patch_grid == (4, 6)
    assert (loaded.num_labels, loaded.id2label) == (3, {0: "runs", 1: "sits", 2: "jumps"})
    assert json.loads(loaded.to_json_string()) == json.loads(config.to_json_string())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0}, r"mask_ratio.*got 0\..*ViCMAEModel"),
        ({"mask_ratio": 1.0}, r"mask_ratio.*got 1\.0\."),
        ({"mask_ratio": -0.5}, r"mask_ratio.*got -0\.5"),
        ({"mask_ratio": float("nan")}, r"mask_ratio.*got nan"),
        ({"hidden_size": 0}, "hidden_size must be positive, got 0"),
        ({"decoder_num_hidden_layers": -1}, "decoder_num_hidden_layers must be positive, got -1"),
        ({"temperature": 0.0}, r"temperature must be positive, got 0\.0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate.*less than 1, got 1\.0"),
        ({"hidden_dropout_prob": -0.1}, r"hidden_dropout_prob.*got -0\.1"),
        ({"contrastive_weight": -1}, "contrastive_weight must not be negative, got -1"),
        ({"image_size": 18}, "multiple of patch_size=4.*got 18 x 18"),
        ({"image_size": (16, 18)}, "multiple of patch_size=4.*got 16 x 18"),
        ({"image_size": [16, 16, 16]}, r"\(height, width\), got \[16, 16, 16\]"),
        ({"num_frames": 5}, "num_frames must be a multiple of tubelet_size=2, got 5"),
        ({"contrastive_loss": "simsiam", "projector_output_size": 8}, "projector_output_size must be hidden_size=16"),
        ({"norm_after_pooling": True}, "pooling='mean', got 'cls'"),
    ],
)
def test_settings_out_of_range_raise_with_what_was_expected(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mask_ratio", "most"),
        ("hidden_size", None),
        ("pooling", "max"),
        ("contrastive_loss", "clip"),
        ("reconstruct", "second"),
    ],
)
def test_values_of_the_wrong_kind_raise_and_name_the_field(name, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"{name}(.|\n)*{value}"):
        tiny_config(**{name: value})
