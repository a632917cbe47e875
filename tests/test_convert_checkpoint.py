"""Conversion against a plain transcription of the released formulas, and against Transformers' own ViTMAE."""

import argparse
import logging
import math
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from local_hub import hub_of_this_process, run_local_hub
from tiny_models import tiny_config
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from vicmae_hf import ViCMAEForImageClassification, ViCMAEForPreTraining, ViCMAEModel
from vicmae_hf.convert_checkpoint import (
    convert_checkpoint,
    convert_state_dict,
    main,
    own_checkpoint,
    revert_state_dict,
)
from vicmae_hf.errors import InputError
from vicmae_hf.image_processing_vicmae import ViCMAEImageProcessor
from vicmae_hf.video_processing_vicmae import ViCMAEVideoProcessor


WIDTH, HEADS, DECODER_WIDTH, DECODER_HEADS = 24, 3, 16, 2
PATCH, GRID = 4, 4
IMAGE = PATCH * GRID
HEAD_COUNTS = {"num_attention_heads": HEADS, "decoder_num_attention_heads": DECODER_HEADS}


# ---------------------------------------------------------------------------------------------------------------------
# Files with random weights, under the names in method.md
# ---------------------------------------------------------------------------------------------------------------------


def linear_tensors(name: str, in_width: int, out_width: int) -> dict:
    return {f"{name}.weight": torch.randn(out_width, in_width) / in_width**0.5, f"{name}.bias": torch.randn(out_width)}


def norm_tensors(name: str, width: int) -> dict:
    return {f"{name}.weight": 1 + 0.3 * torch.randn(width), f"{name}.bias": 0.3 * torch.randn(width)}


def block_tensors(name: str, width: int) -> dict:
    return {
        **norm_tensors(f"{name}.norm1", width),
        **linear_tensors(f"{name}.attn.qkv", width, 3 * width),
        **linear_tensors(f"{name}.attn.proj", width, width),
        **norm_tensors(f"{name}.norm2", width),
        **linear_tensors(f"{name}.mlp.fc1", width, 2 * width),
        **linear_tensors(f"{name}.mlp.fc2", 2 * width, width),
    }


def encoder_tensors(width: int = WIDTH, depth: int = 2, num_patches: int = GRID**2, norm: str = "norm") -> dict:
    tensors = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 1 + num_patches, width),
        "patch_embed.proj.weight": torch.randn(width, 3, PATCH, PATCH) / (3 * PATCH**2) ** 0.5,
        "patch_embed.proj.bias": torch.randn(width),
        **norm_tensors(norm, width),
    }
    for index in range(depth):
        tensors.update(block_tensors(f"blocks.{index}", width))
    return tensors


def decoder_tensors(encoder_width: int = WIDTH, width: int = DECODER_WIDTH, num_patches: int = GRID**2) -> dict:
    return {
        **linear_tensors("decoder_embed", encoder_width, width),
        "mask_token": torch.randn(1, 1, width),
        "decoder_pos_embed": torch.randn(1, 1 + num_patches, width),
        **block_tensors("decoder_blocks.0", width),
        **norm_tensors("decoder_norm", width),
        **linear_tensors("decoder_pred", width, 3 * PATCH**2),
    }


def projector_tensors(width: int = WIDTH, hidden_width: int = 20, output_width: int = 10) -> dict:
    tensors = {
        **linear_tensors("projector.0", width, hidden_width),
        **linear_tensors("projector.3", hidden_width, hidden_width),
        **linear_tensors("projector.6", hidden_width, output_width),
    }
    for index in (1, 4):
        tensors.update(norm_tensors(f"projector.{index}", hidden_width))
        tensors[f"projector.{index}.running_mean"] = torch.randn(hidden_width)
        tensors[f"projector.{index}.running_var"] = torch.rand(hidden_width) + 0.5
        tensors[f"projector.{index}.num_batches_tracked"] = torch.tensor(7)
    return tensors


def pretraining_tensors() -> dict:
    return {**encoder_tensors(), **decoder_tensors(), **projector_tensors()}


def finetuned_tensors(norm: str) -> dict:
    return {**encoder_tensors(norm=norm), **linear_tensors("head", WIDTH, 5)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------------------------
# The released formulas, one image at a time, on the file's own tensors
# ---------------------------------------------------------------------------------------------------------------------


def apply_norm(tokens, tensors, name):
    centred = tokens - tokens.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def apply_linear(tokens, tensors, name):
    return tokens @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def apply_block(tokens, tensors, name, heads):
    """Tokens (N, D) of one image."""
    width = tokens.shape[-1]
    fused = apply_linear(apply_norm(tokens, tensors, f"{name}.norm1"), tensors, f"{name}.attn.qkv")
    query, key, value = fused[:, :width], fused[:, width : 2 * width], fused[:, 2 * width :]
    outputs = []
    for channels in torch.arange(width).chunk(heads):
        scores = query[:, channels] @ key[:, channels].T / math.sqrt(width // heads)
        outputs.append(scores.softmax(-1) @ value[:, channels])
    tokens = tokens + apply_linear(torch.cat(outputs, -1), tensors, f"{name}.attn.proj")
    hidden = apply_linear(apply_norm(tokens, tensors, f"{name}.norm2"), tensors, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return tokens + apply_linear(hidden, tensors, f"{name}.mlp.fc2")


def cut_patches(image):
    """(3, H, W) -> (L, 3, p, p), row by row."""
    return torch.stack(
        [
            image[:, row : row + PATCH, column : column + PATCH]
            for row in range(0, image.shape[1], PATCH)
            for column in range(0, image.shape[2], PATCH)
        ]
    )


def encode_image(image, tensors, kept=None):
    """Tokens before the final norm (1 + K, D)."""
    patches = cut_patches(image).flatten(1)
    tokens = patches @ tensors["patch_embed.proj.weight"].flatten(1).T + tensors["patch_embed.proj.bias"]
    tokens = tokens + tensors["pos_embed"][0, 1:]
    tokens = tokens if kept is None else tokens[kept]
    tokens = torch.cat([tensors["cls_token"][0] + tensors["pos_embed"][0, :1], tokens])
    for index in range(2):
        tokens = apply_block(tokens, tensors, f"blocks.{index}", HEADS)
    return tokens


def pretraining_view(image, noise, tensors, mask_ratio):
    """Pixel loss, and the mean of the visible patch tokens, of one image."""
    num_patches = len(noise)
    order = noise.argsort()
    num_kept = int(num_patches * (1 - mask_ratio))
    kept, hidden = order[:num_kept], order[num_kept:]
    encoded = apply_norm(encode_image(image, tensors, kept), tensors, "norm")

    embedded = apply_linear(encoded, tensors, "decoder_embed")
    tokens = tensors["mask_token"][0].repeat(num_patches, 1)
    tokens[kept] = embedded[1:]
    tokens = torch.cat([embedded[:1], tokens]) + tensors["decoder_pos_embed"][0]
    tokens = apply_block(tokens, tensors, "decoder_blocks.0", DECODER_HEADS)
    predicted = apply_linear(apply_norm(tokens, tensors, "decoder_norm"), tensors, "decoder_pred")[1:]

    target = cut_patches(image).permute(0, 2, 3, 1).flatten(1)
    target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
    return (predicted - target)[hidden].square().mean(), encoded[1:].mean(0)


def project_view(features, tensors):
    """The projector on one view's batch (B, D), with batch statistics."""
    for index in (0, 3):
        hidden = apply_linear(features, tensors, f"projector.{index}")
        scale = (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        hidden = (hidden - hidden.mean(0)) / scale * tensors[f"projector.{index + 1}.weight"]
        features = (hidden + tensors[f"projector.{index + 1}.bias"]).clamp(min=0)
    return apply_linear(features, tensors, "projector.6")


def nt_xent(first, second, temperature):
    projections = [projection / projection.norm() for projection in [*first, *second]]
    losses = []
    for anchor_index, anchor in enumerate(projections):
        positive = math.exp(anchor @ projections[(anchor_index + len(first)) % len(projections)] / temperature)
        others = sum(
            math.exp(anchor @ other / temperature) for index, other in enumerate(projections) if index != anchor_index
        )
        losses.append(-math.log(positive / others))
    return sum(losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------------------
# What is recognised
# ---------------------------------------------------------------------------------------------------------------------


def save_file(tensors: dict, path, **rest) -> str:
    torch.save({"model": tensors, **rest}, path)
    return str(path)


def load_strictly(model_class, config, state_dict, **kwargs):
    model = model_class(config, **kwargs)
    model.load_state_dict(state_dict, strict=True)
    return model


def test_pretraining_file_has_the_released_losses(tmp_path):
    tensors = pretraining_tensors()
    arguments = argparse.Namespace(lr=1e-3, device=torch.device("cuda"), data_path="x", resume=None)
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    path = save_file(tensors, tmp_path / "vicmae.pth", optimizer=optimizer, epoch=3, args=arguments)
    model = convert_checkpoint(path, tmp_path / "out", **HEAD_COUNTS).train()
    config = model.config
    assert (config.contrastive_loss, config.reconstruct, config.mask_ratio) == ("nt_xent", "both", 0.5)
    assert (config.projector_hidden_size, config.projector_output_size, config.temperature) == (20, 10, 0.1)
    assert (config.image_size, config.patch_size, config.norm_pix_loss) == (IMAGE, PATCH, True)
    assert (config.num_hidden_layers, config.decoder_num_hidden_layers) == (2, 1)

    pixel_values, noise = torch.randn(3, 2, 3, IMAGE, IMAGE), torch.rand(3, 2, GRID**2)
    outputs = model(pixel_values, noise=noise)
    pixel_losses, features = [], ([], [])
    for images, ranks in zip(pixel_values, noise, strict=True):
        for view in range(2):
            pixel_loss, feature = pretraining_view(images[view], ranks[view], tensors, mask_ratio=0.5)
            pixel_losses.append(pixel_loss)
            features[view].append(feature)
    pixel = sum(pixel_losses) / len(pixel_losses)
    contrastive = nt_xent(*(project_view(torch.stack(view), tensors) for view in features), temperature=0.1)
    assert outputs.reconstruction_loss.item() == pytest.approx(pixel.item(), abs=1e-5)
    assert outputs.contrastive_loss.item() == pytest.approx(contrastive, abs=1e-5)
    assert 0.97 * outputs.loss.item() == pytest.approx(0.97 * pixel.item() + 0.03 * contrastive, abs=1e-5)


def test_mae_file_has_the_pixel_loss():
    tensors = {**encoder_tensors(), **decoder_tensors()}
    config, state_dict = convert_state_dict({"model": tensors}, **HEAD_COUNTS)
    assert (config.contrastive_loss, config.mask_ratio) == ("none", 0.75)
    model = load_strictly(ViCMAEForPreTraining, config, state_dict)
    pixel_values, noise = torch.randn(2, 2, 3, IMAGE, IMAGE), torch.rand(2, 2, GRID**2)
    outputs = model(pixel_values, noise=noise)
    expected = [
        pretraining_view(image, ranks, tensors, mask_ratio=0.75)[0]
        for image, ranks in zip(pixel_values.flatten(0, 1), noise.flatten(0, 1), strict=True)
    ]
    assert outputs.contrastive_loss is None
    assert outputs.loss.item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-5)


@pytest.mark.parametrize("pooled", [False, True])
def test_finetuned_file_has_the_logits(tmp_path, pooled):
    tensors = finetuned_tensors("fc_norm" if pooled else "norm")
    path = save_file(tensors, tmp_path / "finetuned.pth")
    convert_checkpoint(path, tmp_path / "out", num_attention_heads=HEADS)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert isinstance(model, ViCMAEForImageClassification)
    assert model.config.pooling == ("mean" if pooled else "cls")

    images = torch.randn(3, 3, IMAGE, IMAGE)
    expected = []
    for image in images:
        tokens = encode_image(image, tensors)
        if pooled:
            feature = apply_norm(tokens[1:].mean(0), tensors, "fc_norm")
        else:
            feature = apply_norm(tokens[0], tensors, "norm")
        expected.append(apply_linear(feature, tensors, "head"))
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, torch.stack(expected), atol=1e-5, rtol=1e-5)
    if pooled:
        # Its norm belongs to the pooled feature: neither the tokens of pretraining nor the class token can use it.
        with pytest.raises(ValueError, match="norm_after_pooling"):
            ViCMAEForPreTraining(model.config)
        with pytest.raises(ValueError, match="norm_after_pooling"):
            convert_state_dict(tensors, num_attention_heads=HEADS, pooling="cls")


def test_file_with_an_encoder_alone(tmp_path):
    tensors = encoder_tensors()
    config, state_dict = convert_state_dict(tensors, num_attention_heads=HEADS)
    load_strictly(ViCMAEModel, config, state_dict, video=False)

    # As MAE publishes its models: without a decoder.
    convert_checkpoint(save_file(tensors, tmp_path / "mae.pth"), tmp_path / "out", num_attention_heads=HEADS)
    images = torch.randn(2, 3, IMAGE, IMAGE)
    expected = torch.stack([apply_norm(encode_image(image, tensors), tensors, "norm") for image in images])
    encoder = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    model, info = AutoModelForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"decoder", "projector"}
    assert torch.equal(model.vicmae.layers[1].mlp.fc1.weight, tensors["blocks.1.mlp.fc1.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Transformers' ViTMAE
# ---------------------------------------------------------------------------------------------------------------------


def make_vit_mae() -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        image_size=IMAGE,
        patch_size=PATCH,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=DECODER_HEADS,
        decoder_intermediate_size=2 * DECODER_WIDTH,
        mask_ratio=0.6,
        norm_pix_loss=True,
    )
    model = ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_a_checkpoint_of_another_kind_is_converted_for_as_long_as_it_is_needed(tmp_path):
    theirs, tensors = make_vit_mae(), {**encoder_tensors(), **decoder_tensors()}
    theirs.save_pretrained(tmp_path / "vit_mae")
    torch.save({"model": tensors}, tmp_path / "mae.pth")
    expected = {"vit_mae": theirs.vit.layers[1].mlp.fc1.weight, "mae.pth": tensors["blocks.1.mlp.fc1.weight"]}
    for name, weight in expected.items():
        with own_checkpoint(str(tmp_path / name), {**HEAD_COUNTS, "mask_ratio": 0.5}) as folder:
            model = ViCMAEForPreTraining.from_pretrained(folder)
            assert AutoImageProcessor.from_pretrained(folder).crop_size == {"height": IMAGE, "width": IMAGE}
        assert not Path(folder).exists()
        assert torch.equal(model.vicmae.layers[1].mlp.fc1.weight, weight)
        assert (model.config.num_attention_heads, model.config.contrastive_loss) == (HEADS, "none")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_of_the_hub_is_converted_too(tmp_path, monkeypatch, weights):
    theirs = make_vit_mae()
    theirs.save_pretrained(tmp_path / "vit_mae")
    if weights.endswith(".bin"):
        (tmp_path / "vit_mae" / "model.safetensors").unlink()
        torch.save(hub_names(theirs.state_dict()), tmp_path / "vit_mae" / weights)
    files = {path.name: path.read_bytes() for path in (tmp_path / "vit_mae").iterdir()}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with run_local_hub() as hub, hub_of_this_process(hub.url):
        hub.repositories["someone/vit-mae"] = files
        with own_checkpoint("someone/vit-mae") as folder:
            model = ViCMAEForPreTraining.from_pretrained(folder)
    assert torch.equal(model.vicmae.layers[1].mlp.fc1.weight, theirs.vit.layers[1].mlp.fc1.weight)


def test_a_checkpoint_of_this_package_stays_where_it_is(tmp_path):
    ViCMAEModel(tiny_config()).save_pretrained(tmp_path)
    with own_checkpoint(str(tmp_path)) as folder:
        assert folder == str(tmp_path)
    with pytest.raises(OSError, match="nothing"), own_checkpoint(str(tmp_path / "nothing")):
        pass
    (tmp_path / "broken.pth").write_bytes(b"no file of PyTorch")
    ViCMAEForPreTraining(tiny_config()).save_pretrained(tmp_path / "own")
    weights = str(tmp_path / "own" / "model.safetensors")
    with pytest.raises(InputError, match=r"give its folder, .*/own, whose"), own_checkpoint(weights):
        pass
    with pytest.raises(InputError, match=r"broken\.pth: "), own_checkpoint(str(tmp_path / "broken.pth")):
        pass


def hub_names(state_dict: dict) -> dict:
    """The names in facebook/vit-mae-base on the Hub."""
    renamed = {}
    for name, tensor in state_dict.items():
        name = name.replace("vit.layers.", "vit.encoder.layer.")
        for letter, word in [("q", "query"), ("k", "key"), ("v", "value")]:
            name = name.replace(f"attention.{letter}_proj", f"attention.attention.{word}")
        name = name.replace("attention.o_proj", "attention.output.dense")
        renamed[name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")] = tensor
    return renamed


@pytest.mark.parametrize("kind", ["one file", "shards", "safetensors, Hub's names", "bin, Hub's names"])
def test_vit_mae_folder_is_the_same_model(tmp_path, kind):
    theirs = make_vit_mae()
    folder = tmp_path / "vit_mae"
    theirs.save_pretrained(folder, max_shard_size="10KB" if kind == "shards" else "1GB")
    if "Hub" in kind:
        tensors = {name: tensor.clone() for name, tensor in hub_names(theirs.state_dict()).items()}
        assert "vit.encoder.layer.1.attention.attention.query.weight" in tensors
        (folder / "model.safetensors").unlink()
        if kind.startswith("bin"):
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            safetensors.torch.save_file(tensors, folder / "model.safetensors")
    assert (folder / "model.safetensors.index.json").exists() == (kind == "shards")

    convert_checkpoint(folder, tmp_path / "out")
    ours = AutoModelForPreTraining.from_pretrained(tmp_path / "out").eval()
    pixel_values, noise = torch.randn(2, 2, 3, IMAGE, IMAGE), torch.rand(2, 2, GRID**2)
    with torch.no_grad():
        outputs = ours(pixel_values, noise=noise)
        expected = theirs(pixel_values.flatten(0, 1), noise=noise.flatten(0, 1))
    torch.testing.assert_close(outputs.logits.flatten(0, 1), expected.logits, atol=1e-5, rtol=1e-5)
    assert outputs.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    assert torch.equal(outputs.mask.flatten(0, 1), expected.mask)


def test_folder_of_another_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vicmae"}')
    with pytest.raises(InputError, match="is a checkpoint of this package; there is nothing to convert"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="expected model_type 'vit_mae', got 'bert'"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"expected a folder with config\.json"):
        convert_checkpoint(tmp_path, tmp_path / "out")


def test_shard_that_lacks_a_tensor(tmp_path):
    make_vit_mae().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    tensors = safetensors.torch.load_file(shard)
    lost = min(tensors)
    del tensors[lost]
    safetensors.torch.save_file(tensors, shard)
    with pytest.raises(ValueError, match=f"its files lack {lost}"):
        convert_checkpoint(tmp_path, tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Nothing lost, nothing invented
# ---------------------------------------------------------------------------------------------------------------------


def without_qkv_bias(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if "qkv.bias" not in name}


def in_half_precision(tensors: dict) -> dict:
    return {name: tensor.half() for name, tensor in tensors.items()}


def vit_mae_saved_names() -> dict:
    return {
        name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer."): tensor
        for name, tensor in hub_names(make_vit_mae().state_dict()).items()
    }


@pytest.mark.parametrize(
    ("keys", "make_tensors"),
    [
        pytest.param("released", pretraining_tensors, id="vicmae"),
        pytest.param("released", lambda: {**encoder_tensors(), **decoder_tensors()}, id="mae"),
        pytest.param("released", lambda: finetuned_tensors("norm"), id="finetuned"),
        pytest.param("pooled", lambda: finetuned_tensors("fc_norm"), id="pooled"),
        pytest.param("released", encoder_tensors, id="encoder"),
        pytest.param("released", lambda: without_qkv_bias(encoder_tensors()), id="no_qkv_bias"),
        pytest.param("released", lambda: in_half_precision(encoder_tensors()), id="half_precision"),
        pytest.param("vit_mae", lambda: hub_names(make_vit_mae().state_dict()), id="vit_mae"),
        pytest.param("vit_mae_saved", vit_mae_saved_names, id="vit_mae_saved"),
        pytest.param("vit_mae_in_memory", lambda: make_vit_mae().state_dict(), id="vit_mae_in_memory"),
    ],
)
def test_reverting_is_bitwise(keys, make_tensors):
    tensors = make_tensors()
    _, converted = convert_state_dict(tensors, **HEAD_COUNTS)
    reverted = revert_state_dict(converted, keys)
    assert set(reverted) == set(tensors)
    for name, tensor in tensors.items():
        assert reverted[name].dtype == tensor.dtype
        assert torch.equal(reverted[name], tensor), name


def test_reverting_what_has_no_name_there():
    _, converted = convert_state_dict(pretraining_tensors(), **HEAD_COUNTS)
    with pytest.raises(ValueError, match=r"key table 'vit_mae': .*projector\.0\.weight"):
        revert_state_dict(converted, "vit_mae")
    del converted["vicmae.layers.1.attention.k_proj.bias"]
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.bias can't be put together: missing vicmae\.layers"):
        revert_state_dict(converted)


def test_missing_and_unexpected_keys_are_all_listed():
    tensors = pretraining_tensors()
    missing = ["cls_token", "blocks.0.attn.qkv.weight", "decoder_blocks.0.mlp.fc2.bias", "projector.4.running_var"]
    for name in missing:
        del tensors[name]
    unexpected = ["rope.freqs", "blocks.1.ls1.gamma", "head.weight"]
    for name in unexpected:
        tensors[name] = torch.zeros(3)
    with pytest.raises(ValueError, match="does not hold a whole ViCMAEForPreTraining") as error:
        convert_state_dict(tensors, **HEAD_COUNTS)
    listed_missing, listed_unexpected = str(error.value).split("Unexpected keys: ")
    listed_missing = listed_missing.split("Missing keys: ")[1]
    assert sorted(listed_missing.rstrip(". ").split(", ")) == sorted(missing)
    assert sorted(listed_unexpected.rstrip(". ").split(", ")) == sorted(unexpected)
    with pytest.raises(ValueError, match=r"Missing keys: none. Unexpected keys: register_tokens\."):
        convert_state_dict({**pretraining_tensors(), "register_tokens": torch.zeros(1, 4, WIDTH)}, **HEAD_COUNTS)


def test_a_layer_in_the_middle_is_missing():
    tensors = {name: tensor for name, tensor in encoder_tensors(depth=3).items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"Missing keys: .*blocks\.1\.norm1\.weight.*blocks\.1\.mlp\.fc2\.bias"):
        convert_state_dict(tensors, num_attention_heads=HEADS)


def test_overrides_never_bring_new_tensors():
    tensors = {**encoder_tensors(), **decoder_tensors()}
    with pytest.raises(ValueError, match=r"Missing keys: projector\.0\.weight.*projector\.6\.bias"):
        convert_state_dict(tensors, contrastive_loss="info_nce", **HEAD_COUNTS)
    with pytest.raises(ValueError, match="Missing keys: logit_scale"):
        convert_state_dict(pretraining_tensors(), learnable_temperature=True, **HEAD_COUNTS)
    with pytest.raises(ValueError, match="no field mask_ration"):
        convert_state_dict(tensors, mask_ration=0.5, **HEAD_COUNTS)


def test_shapes_that_do_not_fit_are_listed():
    tensors = pretraining_tensors()
    tensors["blocks.1.attn.proj.weight"] = torch.zeros(WIDTH, WIDTH + 1)
    tensors["decoder_pred.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight .*\(24, 24\), got \(24, 25\)") as error:
        convert_state_dict(tensors, **HEAD_COUNTS)
    assert "decoder_pred.bias (as decoder.prediction.bias: expected (48,), got (7,))" in str(error.value)
    tensors = encoder_tensors()
    tensors["patch_embed.proj.weight"] = torch.zeros(WIDTH, 3, 2, PATCH, PATCH)
    with pytest.raises(ValueError, match=r"single frames.*got shape \(24, 3, 2, 4, 4\)"):
        convert_state_dict(tensors, num_attention_heads=HEADS)


def test_single_numbers_in_place_of_weights_are_listed(tmp_path, monkeypatch):
    # A part of a fused tensor, one that tells a width, and one that does neither.
    names = ["blocks.0.attn.qkv.bias", "projector.0.weight", "norm.weight"]
    tensors = {name: torch.tensor(1.0) if name in names else value for name, value in pretraining_tensors().items()}
    path = save_file(tensors, tmp_path / "numbers.pth")
    monkeypatch.setattr(sys, "argv", ["convert", "--checkpoint", path, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as error:
        main()
    start, listed = str(error.value).split(" got a number under ")
    assert start == f"error: {path}: Expected weights of one dimension or more,"
    assert sorted(listed.rstrip(".").split(", ")) == sorted(names)


def test_another_checkpoint_is_not_recognised():
    with pytest.raises(ValueError, match=r"no key is known among conv1\.weight, fc\.bias"):
        convert_state_dict({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})
    with pytest.raises(ValueError, match="something else under epoch"):
        convert_state_dict({"cls_token": torch.zeros(1, 1, 8), "epoch": 3})


# ---------------------------------------------------------------------------------------------------------------------
# What weights don't tell
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "heads", "decoder_width", "decoder_heads"),
    [(384, 6, 256, 8), (768, 12, 512, 16), (1024, 16, 512, 16), (1280, 16, 512, 16)],
)
def test_heads_of_known_widths(caplog, width, heads, decoder_width, decoder_heads):
    tensors = {**encoder_tensors(width, depth=1), **decoder_tensors(width, decoder_width)}
    config, _ = convert_state_dict(tensors)
    assert (config.num_attention_heads, config.decoder_num_attention_heads) == (heads, decoder_heads)
    assert not caplog.records


def test_heads_of_other_widths(caplog):
    config, _ = convert_state_dict({**encoder_tensors(128), **decoder_tensors(128, 96)})
    assert (config.num_attention_heads, config.decoder_num_attention_heads) == (2, 3)
    assert "taking 2 heads of 64 channels" in caplog.text
    assert "taking 3 heads of 32 channels" in caplog.text
    with pytest.raises(ValueError, match="num_attention_heads can't be read off the weights, and 24 channels"):
        convert_state_dict(encoder_tensors())


def test_positions_at_another_resolution(caplog):
    tensors = pretraining_tensors()
    ramp = torch.arange(GRID, dtype=torch.float32)
    grid = torch.zeros(GRID, GRID, WIDTH)
    grid[..., 0], grid[..., 1] = ramp[:, None], ramp[None, :]
    tensors["pos_embed"][0, 1:] = grid.flatten(0, 1)
    with caplog.at_level(logging.WARNING):
        config, state_dict = convert_state_dict(tensors, image_size=(2 * IMAGE, IMAGE), **HEAD_COUNTS)
    assert config.image_size == (2 * IMAGE, IMAGE)
    assert "resampled in two dimensions from 4 x 4 to 8 x 4 patches" in caplog.text
    load_strictly(ViCMAEForPreTraining, config, state_dict)
    positions = state_dict["vicmae.embeddings.position_embeddings"]
    assert positions.shape == (1, 2 * GRID, GRID, WIDTH)
    assert state_dict["decoder.position_embeddings"].shape == (1, 2 * GRID, GRID, DECODER_WIDTH)
    # Columns stay what they were; rows still grow, evenly about the middle.
    torch.testing.assert_close(positions[0, :, :, 1], grid[:, :, 1].repeat(2, 1), atol=1e-6, rtol=0)
    rows = positions[0, :, :, 0]
    torch.testing.assert_close(rows, rows[:, :1].expand(-1, GRID), atol=1e-6, rtol=0)
    assert (rows.diff(dim=0) > 0.2).all()
    torch.testing.assert_close(rows + rows.flip(0), torch.full_like(rows, GRID - 1), atol=1e-6, rtol=0)
    assert torch.equal(state_dict["vicmae.embeddings.cls_position_embedding"], tensors["pos_embed"][:, :1])


def test_the_same_resolution_is_left_alone(caplog):
    tensors = encoder_tensors()
    config, state_dict = convert_state_dict(tensors, image_size=IMAGE, num_attention_heads=HEADS)
    assert config.image_size == IMAGE
    assert torch.equal(state_dict["embeddings.position_embeddings"].flatten(1, 2), tensors["pos_embed"][:, 1:])
    assert not caplog.records


def test_positions_of_a_grid_that_is_not_square():
    tensors = encoder_tensors(num_patches=15)
    with pytest.raises(ValueError, match=r"15 positions of patches are no square grid.*--image_size"):
        convert_state_dict(tensors, num_attention_heads=HEADS)
    with pytest.raises(ValueError, match="15 positions of patches are no square grid"):
        convert_state_dict(tensors, image_size=(4 * PATCH, 4 * PATCH), num_attention_heads=HEADS)
    with pytest.raises(ValueError, match="multiple of the patch size 4, got 17"):
        convert_state_dict(tensors, image_size=17, num_attention_heads=HEADS)
    config, state_dict = convert_state_dict(tensors, image_size=(3 * PATCH, 5 * PATCH), num_attention_heads=HEADS)
    assert config.patch_grid == (3, 5)
    assert torch.equal(state_dict["embeddings.position_embeddings"][0, 1, 2], tensors["pos_embed"][0, 1 + 5 + 2])
    with pytest.raises(ValueError, match="as many positions of patches in the decoder"):
        convert_state_dict({**encoder_tensors(), **decoder_tensors(num_patches=9)}, **HEAD_COUNTS)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class WantsToRunCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_file_that_wants_to_run_code_is_refused(tmp_path, kind):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    contents = {"model": encoder_tensors(), "args": WantsToRunCode(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(contents, protocol=2))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ValueError, match=r"evil\.pth: refused") as error:
        convert_checkpoint(path, tmp_path / "out", num_attention_heads=HEADS)
    assert "\n" not in str(error.value)
    if kind != "pickle":
        assert "posix.mkdir" in str(error.value)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists(), "the file was harmless, so this test proved nothing"


def test_only_namespaces_are_allowed_beside_tensors(tmp_path):
    path = save_file(encoder_tensors(), tmp_path / "other.pth", args=Fraction(1, 2))
    with pytest.raises(ValueError, match=r"other\.pth: refused, because it wants to use fractions\.Fraction"):
        convert_checkpoint(path, tmp_path / "out", num_attention_heads=HEADS)
    with pytest.raises(pickle.UnpicklingError):
        # Namespaces are allowed for this one call, not for the whole process.
        torch.load(save_file({}, tmp_path / "args.pth", args=argparse.Namespace(lr=1)), weights_only=True)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "list", "cut.safetensors"])
def test_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / (kind if "." in kind else f"{kind}.pth")
    if kind == "list":
        torch.save([torch.ones(1)], path)
    elif kind == "cut.safetensors":
        path.write_bytes(safetensors.torch.save(encoder_tensors())[:-100])
    else:
        whole = tmp_path / "whole.pth"
        save_file(encoder_tensors(), whole)
        path.write_bytes({"empty": b"", "text": b"not a checkpoint", "cut": whole.read_bytes()[:5000]}[kind])
    with pytest.raises(ValueError, match=f"{path.name}: ") as error:
        convert_checkpoint(path, tmp_path / "out")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"nothing\.pth: no such file"):
        convert_checkpoint(tmp_path / "nothing.pth", tmp_path / "out")


def test_safetensors_file_and_overwriting_itself(tmp_path):
    tensors = encoder_tensors()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="would overwrite it"):
        convert_checkpoint(path, tmp_path, num_attention_heads=HEADS)
    model = convert_checkpoint(path, tmp_path / "out", num_attention_heads=HEADS)
    assert torch.equal(model.layernorm.weight, tensors["norm.weight"])


@pytest.mark.slow
def test_command_line_in_its_own_process(tmp_path):
    tensors = pretraining_tensors()
    path = save_file(tensors, tmp_path / "vicmae.pth", args=argparse.Namespace(epochs=800))
    command = [sys.executable, "-m", "vicmae_hf.convert_checkpoint", "--checkpoint", path]
    command += ["--output_dir", str(tmp_path / "out"), "--image_size", "32", "16"]
    command += ["--config_overrides", f"num_attention_heads={HEADS}, decoder_num_attention_heads={DECODER_HEADS}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"Recognised: ViC-MAE pretraining. Converted: {len(tensors) + 3 * 4 * 1 + 2}" in run.stdout
    assert "resampled in two dimensions from 4 x 4 to 8 x 4 patches" in run.stderr
    assert {entry.name for entry in (tmp_path / "out").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    }

    model, info = AutoModelForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.num_attention_heads == HEADS
    assert tuple(model.config.image_size) == (32, 16)
    state_dict = model.state_dict()
    keys = tensors["blocks.1.attn.qkv.weight"][WIDTH : 2 * WIDTH]
    assert torch.equal(state_dict["vicmae.layers.1.attention.k_proj.weight"], keys)
    assert torch.equal(state_dict["projector.4.running_var"], tensors["projector.4.running_var"])
    for processor_class in (ViCMAEImageProcessor, ViCMAEVideoProcessor):
        processor = processor_class.from_pretrained(tmp_path / "out")
        assert (processor.crop_size["height"], processor.crop_size["width"]) == (32, 16)


def test_command_line_errors_are_one_line(tmp_path, monkeypatch):
    path = save_file(encoder_tensors(), tmp_path / "mae.pth")
    for flags, message in [
        (["--checkpoint", str(tmp_path / "none.pth")], r"error: .*none\.pth: no such file"),
        (["--checkpoint", path], r"error: .*mae\.pth: num_attention_heads can't be read off the weights"),
        (["--checkpoint", path, "--config_overrides", "num_attention_heads"], "error: --config_overrides: expected"),
        (["--checkpoint", path, "--config_overrides", "num_attention_heads=x"], "error: .*num_attention_heads"),
    ]:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint", *flags, "--output_dir", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match=message) as error:
            main()
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()
