import copy
import subprocess
import sys

import numpy as np
import numpy_vicmae
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_tensor, shake, tiny_config
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForPreTraining

from vicmae_hf import (
    ViCMAEConfig,
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEForVideoClassification,
    ViCMAEModel,
)
from vicmae_hf.modeling_vicmae import patchify, resample_positions, sincos_positions
from vicmae_hf.reports.reconstructions import unpatchify


ALL_CLASSES = [ViCMAEModel, ViCMAEForPreTraining, ViCMAEForImageClassification, ViCMAEForVideoClassification]


def views(batch_size: int = 3, height: int = 16, width: int = 16, **kwargs) -> torch.Tensor:
    return random_tensor(batch_size, 2, 3, height, width, **kwargs)


# Positions and patches


@pytest.mark.parametrize(("height", "width", "size"), [(14, 14, 768), (10, 6, 16), (1, 3, 4), (3, 1, 8)])
def test_positions_equal_their_definition(height, width, size):
    positions = sincos_positions(height, width, size)
    assert positions.shape == (1, height, width, size)
    expected = numpy_vicmae.positions(height, width, size)
    np.testing.assert_allclose(positions.reshape(-1, size).numpy(), expected, atol=1e-6)


def test_positions_encode_the_column_first_and_the_row_second():
    positions = sincos_positions(5, 7, 16)[0]
    assert (positions[:, :, :8] == positions[:1, :, :8]).all()
    assert (positions[:, :, 8:] == positions[:, :1, 8:]).all()
    torch.testing.assert_close(positions[0, :, 0], torch.arange(7.0).sin())
    torch.testing.assert_close(positions[:, 0, 8], torch.arange(5.0).sin())


def build_from_config(model_class, config, path):
    return model_class(config)


def build_with_auto_class(model_class, config, path):
    auto_class = {ViCMAEModel: AutoModel, ViCMAEForPreTraining: AutoModelForPreTraining}[model_class]
    return auto_class.from_config(config)


def build_saved_and_loaded(model_class, config, path):
    model_class(config).save_pretrained(path)
    return model_class.from_pretrained(path)


def build_saved_and_loaded_with_auto_class(model_class, config, path):
    model_class(config).save_pretrained(path)
    auto_class = {ViCMAEModel: AutoModel, ViCMAEForPreTraining: AutoModelForPreTraining}[model_class]
    return auto_class.from_pretrained(path)


def build_from_a_checkpoint_without_positions(model_class, config, path):
    """The model is built on the meta device, and no weight of the file can make up for a lost table."""
    model_class(config).save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "position" not in k}, path / "model.safetensors", {"format": "pt"})
    return model_class.from_pretrained(path)


def build_on_meta_and_initialise(model_class, config, path):
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    model.init_weights()
    return model


@pytest.mark.parametrize("model_class", [ViCMAEModel, ViCMAEForPreTraining])
@pytest.mark.parametrize(
    "build",
    [
        build_from_config,
        build_with_auto_class,
        build_saved_and_loaded,
        build_saved_and_loaded_with_auto_class,
        build_from_a_checkpoint_without_positions,
        build_on_meta_and_initialise,
    ],
)
def test_positions_are_held_after_every_way_of_building(build, model_class, tmp_path):
    config = tiny_config(image_size=(16, 24))
    model = build(model_class, config, tmp_path)
    modules = [model.vicmae.embeddings, model.decoder] if model_class is ViCMAEForPreTraining else [model.embeddings]
    for module in modules:
        size = module.position_embeddings.shape[-1]
        expected = numpy_vicmae.positions(4, 6, size)
        np.testing.assert_allclose(module.position_embeddings.reshape(-1, size).numpy(), expected, atol=1e-6)
        assert (module.cls_position_embedding == 0).all()
        assert not module.position_embeddings.requires_grad


def test_positions_that_a_checkpoint_brings_are_kept(tmp_path):
    model = ViCMAEForPreTraining(tiny_config())
    for module in (model.vicmae.embeddings, model.decoder):
        module.position_embeddings.copy_(random_tensor(*module.position_embeddings.shape))
        module.cls_position_embedding.fill_(3.0)
    model.save_pretrained(tmp_path)
    loaded = ViCMAEForPreTraining.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def cubic_matrix(length: int, new_length: int) -> np.ndarray:
    """Keys' cubic convolution with a = -0.75, pixel centres aligned, edges repeated: (new_length, length)."""
    matrix = np.zeros((new_length, length))
    for row in range(new_length):
        centre = (row + 0.5) * length / new_length - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            distance = abs(centre - tap)
            if distance <= 1:
                weight = 1.25 * distance**3 - 2.25 * distance**2 + 1
            else:
                weight = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            matrix[row, min(max(tap, 0), length - 1)] += weight
    return matrix


def test_positions_are_resampled_in_two_dimensions():
    positions = random_tensor(1, 6, 4, 8)
    resampled = resample_positions(positions, 12, 5)
    expected = np.einsum("yh,xw,hwd->yxd", cubic_matrix(6, 12), cubic_matrix(4, 5), positions[0].numpy())
    np.testing.assert_allclose(resampled[0].numpy(), expected, atol=1e-5)
    assert resample_positions(positions, 6, 4) is positions


def test_patches_are_cut_row_by_row_and_put_back():
    frames = random_tensor(2, 3, 3, 8, 12)
    patches = patchify(frames, 4)
    assert patches.shape == (2, 3, 6, 3, 4, 4)
    assert torch.equal(patches[1, 2, 4], frames[1, 2, :, 4:8, 4:8])
    pixels_last = patches.movedim(-3, -1).flatten(-3)
    assert torch.equal(pixels_last[0, 1, 2, 5 * 3 + 1], frames[0, 1, 1, 1, 9])
    assert torch.equal(unpatchify(pixels_last, 8, 12, 3), frames)


def test_linear_layers_and_the_patch_embedding_start_xavier_uniform():
    torch.manual_seed(0)
    model = ViCMAEForPreTraining(tiny_config(hidden_size=64, intermediate_size=256))
    fan_in_and_out = {
        model.vicmae.embeddings.patch_embeddings.projection: (3 * 4 * 4, 64),
        model.vicmae.layers[0].mlp.fc1: (64, 256),
        model.vicmae.layers[1].attention.q_proj: (64, 64),
        model.decoder.prediction: (8, 48),
        model.projector[0]: (64, 20),
    }
    for module, (fan_in, fan_out) in fan_in_and_out.items():
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.9 * bound < module.weight.abs().max() <= bound
        torch.testing.assert_close(module.weight.std().item(), bound / 3**0.5, rtol=0.1, atol=0)
        assert (module.bias == 0).all()
    assert 0.01 < model.vicmae.embeddings.cls_token.std() < 0.03


# Masking


def test_the_smallest_noise_is_kept():
    model = ViCMAEForPreTraining(tiny_config(mask_ratio=0.7)).eval()
    noise = random_tensor(3, 2, 16, seed=1)
    with torch.no_grad():
        output = model(views(), noise=noise)
    num_visible = 5  # of 4.8
    ranks = noise.argsort(-1).argsort(-1)
    assert torch.equal(output.ids_restore, ranks)
    assert torch.equal(output.mask, (ranks >= num_visible).float())
    assert (output.mask == 0).sum(-1).eq(num_visible).all()
    assert output.logits.shape == (3, 1, 16, 48)


def test_hidden_patches_do_not_reach_the_encoder():
    model = shake(ViCMAEForPreTraining(tiny_config())).eval()
    pixel_values, noise = views(), random_tensor(3, 2, 16, seed=1)
    with torch.no_grad():
        hidden_states, mask, _ = model.encode_views(pixel_values, noise)
        hidden_pixels = unpatchify(mask.unsqueeze(-1).expand(-1, -1, -1, 48), 16, 16, 3).bool()
        changed = torch.where(hidden_pixels, 100.0, pixel_values)
        assert torch.equal(model.encode_views(changed, noise)[0], hidden_states)
        changed = torch.where(hidden_pixels, pixel_values, 100.0)
        assert not torch.equal(model.encode_views(changed, noise)[0], hidden_states)


def test_masks_are_random_without_noise_and_follow_the_seed():
    model = ViCMAEForPreTraining(tiny_config()).eval()
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(model(views(8)).mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][:, 0], masks[0][:, 1]), "the views of a sample are masked independently"


def test_the_encoder_sees_every_patch_and_is_deterministic_in_eval_mode():
    model = ViCMAEModel(tiny_config(mask_ratio=0.9, hidden_dropout_prob=0.5, drop_path_rate=0.5)).eval()
    images = random_tensor(2, 3, 16, 16)
    with torch.no_grad():
        first, second = (model(images).last_hidden_state for _ in range(2))
    assert first.shape == (2, 17, 16)
    assert torch.equal(first, second)


# The forward passes against the NumPy transcription


@pytest.mark.parametrize("size", [(16, 16), (24, 12)])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_image_features_equal_the_transcription(size, pooling):
    config = tiny_config(image_size=size, pooling=pooling)
    model = shake(ViCMAEForImageClassification(config)).eval()
    images = random_tensor(2, 3, *size)
    weights = numpy_vicmae.to_numpy(model.state_dict())
    with torch.no_grad():
        output = model.vicmae(images)
    for index, image in enumerate(images.double().numpy()):
        cls_token, tokens = numpy_vicmae.embed(image, weights, config, "vicmae.")
        expected = numpy_vicmae.encode(np.stack([cls_token, *tokens]), weights, config, "vicmae.")
        np.testing.assert_allclose(output.last_hidden_state[index].numpy(), expected, atol=2e-5)
        pooled = expected[0] if pooling == "cls" else expected[1:].mean(0)
        np.testing.assert_allclose(output.pooler_output[index].numpy(), pooled, atol=2e-5)


def test_video_features_equal_the_transcription():
    config = tiny_config(num_frames=6)
    model = shake(ViCMAEModel(config)).eval()
    clip = random_tensor(1, 6, 3, 16, 16)
    weights = numpy_vicmae.to_numpy(model.state_dict())
    kernel = weights["embeddings.patch_embeddings.projection.weight"]
    tokens = [weights["embeddings.cls_token"][0]]
    for tubelet in range(3):
        cut = [numpy_vicmae.patches(clip[0, 2 * tubelet + offset].double().numpy(), 4) for offset in range(2)]
        embedded = sum(np.einsum("lijc,dcij->ld", part, kernel[:, :, time]) for time, part in enumerate(cut))
        embedded = embedded + weights["embeddings.patch_embeddings.projection.bias"]
        embedded = embedded + numpy_vicmae.positions(4, 4, 16)
        tokens.append(embedded + weights["embeddings.temporal_position_embeddings"][0, tubelet])
    expected = numpy_vicmae.encode(np.concatenate(tokens), weights, config, "")
    with torch.no_grad():
        np.testing.assert_allclose(model(clip).last_hidden_state[0].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reconstruct": "both", "contrastive_loss": "nt_xent", "mask_ratio": 0.5},
        {"contrastive_loss": "simsiam", "norm_pix_loss": False},
        {"contrastive_loss": "vicreg", "temperature": 0.3},
        {"contrastive_loss": "none", "reconstruct": "both"},
        {"image_size": (12, 20), "temperature": 0.5, "contrastive_weight": 2.0},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()) or "paper",
)
def test_pretraining_equals_the_transcription(settings):
    config = tiny_config(**settings)
    model = shake(ViCMAEForPreTraining(config)).train()
    height, width = config.image_height_and_width
    pixel_values = views(4, height, width)
    noise = random_tensor(4, 2, height * width // 16, seed=1)
    weights = numpy_vicmae.to_numpy(model.state_dict())
    output = model(pixel_values, noise=noise)
    expected = numpy_vicmae.pretraining(pixel_values.double().numpy(), noise.numpy(), weights, config)
    np.testing.assert_array_equal(output.mask.numpy(), expected["mask"])
    np.testing.assert_allclose(output.logits.detach().numpy(), expected["logits"], atol=2e-5)
    np.testing.assert_allclose(output.reconstruction_loss.item(), expected["reconstruction_loss"], rtol=1e-5)
    np.testing.assert_allclose(output.loss.item(), expected["loss"], rtol=2e-5)
    if config.contrastive_loss == "none":
        assert output.contrastive_loss is None
        assert not any(name.startswith("projector") for name in weights)
    else:
        np.testing.assert_allclose(output.contrastive_loss.item(), expected["contrastive_loss"], rtol=2e-5)


def test_the_contrastive_weight_may_change_on_the_way():
    model = ViCMAEForPreTraining(tiny_config()).train()
    arguments = {"pixel_values": views(), "noise": random_tensor(3, 2, 16, seed=1)}
    for weight in (0.0, 0.025, 7.0):
        model.contrastive_weight = weight
        output = model(**arguments)
        torch.testing.assert_close(output.loss, output.reconstruction_loss + weight * output.contrastive_loss)


def test_pretraining_at_another_size_than_the_config_s():
    model = shake(ViCMAEForPreTraining(tiny_config())).eval()
    with torch.no_grad():
        output = model(views(2, 40, 24))
    assert output.logits.shape == (2, 1, 60, 48)
    assert output.mask.sum(-1).eq(45).all()
    assert output.loss.isfinite()


# Steps, views, gradients


def test_the_forward_pass_is_its_steps_one_by_one():
    model = shake(ViCMAEForPreTraining(tiny_config(reconstruct="both"))).train()
    pixel_values, noise = views(), random_tensor(3, 2, 16, seed=1)
    output = model(pixel_values, noise=noise)
    hidden_states, mask, ids_restore = model.encode_views(pixel_values, noise)
    logits = model.reconstruct(hidden_states, ids_restore, pixel_values.shape[-2:])
    contrastive_loss = model.contrast(model.pool_views(hidden_states))[1]
    assert torch.equal(logits, output.logits)
    assert torch.equal(model.reconstruction_loss(pixel_values, logits, mask), output.reconstruction_loss)
    assert torch.equal(contrastive_loss, output.contrastive_loss)


def test_both_views_in_one_pass_equal_each_by_itself():
    model = shake(ViCMAEForPreTraining(tiny_config())).eval()
    pixel_values, noise = views(), random_tensor(3, 2, 16, seed=1)
    with torch.no_grad():
        together = model.encode_views(pixel_values, noise)[0]
        ids_keep = noise.argsort(-1)[..., :4]
        for view in range(2):
            embedded = model.vicmae.embeddings(pixel_values[:, view], ids_keep[:, view])
            torch.testing.assert_close(together[:, view], model.vicmae.encode(embedded), atol=1e-5, rtol=1e-5)


def test_batch_statistics_are_taken_per_view():
    model = shake(ViCMAEForPreTraining(tiny_config())).train()
    hidden_states = random_tensor(5, 2, 5, 16)
    hidden_states[:, 1] += 3.0
    weights = numpy_vicmae.to_numpy(model.state_dict())
    pooled = hidden_states[:, :, 1:].mean(2).double().numpy()
    projections = model.contrast(model.pool_views(hidden_states))[0].detach().numpy()
    for view in range(2):
        np.testing.assert_allclose(projections[:, view], numpy_vicmae.project(pooled[:, view], weights), atol=1e-4)
    first, second = (
        pooled[:, view] @ weights["projector.0.weight"].T + weights["projector.0.bias"] for view in (0, 1)
    )
    running_mean = 0.9 * (0.1 * first.mean(0)) + 0.1 * second.mean(0)
    np.testing.assert_allclose(model.projector[1].running_mean.numpy(), running_mean, atol=1e-5)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_gradient_checkpointing_leaves_the_gradients_as_they_are(model_class):
    plain = shake(model_class(tiny_config())).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    gradients = []
    for model in (plain, checkpointed):
        if model_class is ViCMAEForPreTraining:
            model(views(), noise=random_tensor(3, 2, 16, seed=1)).loss.backward()
        else:
            output = model(random_tensor(2, 3, 16, 16))
            (output.pooler_output if model_class is ViCMAEModel else output.logits).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    without_gradient = {name for name, gradient in gradients[0].items() if gradient is None}
    assert without_gradient == set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_eager_attention_equals_sdpa(pooling):
    model = shake(ViCMAEForVideoClassification(tiny_config(pooling=pooling))).eval()
    pretraining = shake(ViCMAEForPreTraining(tiny_config())).eval()
    clip = random_tensor(2, 4, 3, 16, 16)
    outputs = {}
    with torch.no_grad():
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            pretraining.set_attn_implementation(implementation)
            reconstruction = pretraining(views(), noise=random_tensor(3, 2, 16, seed=1)).logits
            outputs[implementation] = (model(clip).logits, reconstruction)
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], atol=1e-5, rtol=1e-5)
    assert not torch.equal(outputs["eager"][1], outputs["sdpa"][1]), "the decoder follows the setting, too"


# Recorded hidden states and attentions


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_recorded_states_are_those_of_the_encoder_s_layers(model_class):
    config = tiny_config(num_hidden_layers=3, _attn_implementation="eager")
    model = shake(model_class(config)).eval()
    encoder = model if model_class is ViCMAEModel else model.vicmae
    settings = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        if model_class is ViCMAEForPreTraining:
            pixel_values, noise = views(), random_tensor(3, 2, 16, seed=1)
            output = model(pixel_values, noise=noise, **settings)
            hidden_states = encoder.embeddings(pixel_values.flatten(0, 1), noise.argsort(-1)[..., :4].flatten(0, 1))
        else:
            images = random_tensor(2, 3, 16, 16)
            output = model(images, **settings)
            hidden_states = encoder.embeddings(images)
        expected = [hidden_states]
        for layer in encoder.layers:
            expected.append(layer(expected[-1]))
    assert len(output.hidden_states) == 4
    for recorded, state in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(recorded, state)

    weights = numpy_vicmae.to_numpy(encoder.state_dict())
    length = 5 if model_class is ViCMAEForPreTraining else 17
    assert [attention.shape for attention in output.attentions] == [(len(hidden_states), 2, length, length)] * 3
    for index, attention in enumerate(output.attentions):
        for sample in range(len(hidden_states)):
            tokens = expected[index][sample].double().numpy()
            normed = numpy_vicmae.layer_norm(tokens, weights, f"layers.{index}.layernorm_before")
            _, maps = numpy_vicmae.attention(normed, weights, f"layers.{index}.attention", 2)
            np.testing.assert_allclose(attention[sample].numpy(), maps, atol=1e-5)


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_outputs_as_tuples_and_nothing_recorded_unasked(model_class):
    model = shake(model_class(tiny_config())).eval()
    inputs = views() if model_class is ViCMAEForPreTraining else random_tensor(2, 3, 16, 16)
    noise = {"noise": random_tensor(3, 2, 16, seed=1)} if model_class is ViCMAEForPreTraining else {}
    output = model(inputs, **noise)
    assert output.hidden_states is None
    assert output.attentions is None
    as_tuple = model(inputs, **noise, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for left, right in zip(as_tuple, output.to_tuple(), strict=True):
        torch.testing.assert_close(left, right)


# Stochastic depth


def test_drop_path_grows_linearly_and_keeps_the_expectation():
    model = ViCMAEModel(tiny_config(num_hidden_layers=5, drop_path_rate=0.4))
    assert [layer.drop_path.drop_path_rate for layer in model.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert ViCMAEModel(tiny_config(num_hidden_layers=1, drop_path_rate=0.4)).layers[0].drop_path.drop_path_rate == 0

    drop_path = model.layers[-1].drop_path.train()
    torch.manual_seed(0)
    branch = torch.ones(20000, 2, 3)
    dropped = drop_path(branch)
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped)), "a sample's branch goes or stays as a whole"
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert drop_path.eval()(branch) is branch


def test_drop_path_drops_branches_in_training_only():
    model = ViCMAEModel(tiny_config(drop_path_rate=0.9))
    images = random_tensor(1, 3, 16, 16).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    features = model.train()(images).pooler_output
    assert len(torch.unique(features.detach().round(decimals=3), dim=0)) > 1
    features = model.eval()(images).pooler_output
    torch.testing.assert_close(features, features[:1].expand_as(features))


# Heads


@pytest.mark.parametrize("model_class", [ViCMAEForImageClassification, ViCMAEForVideoClassification])
def test_classification_losses_equal_those_of_torch(model_class):
    inputs = random_tensor(4, 3, 16, 16) if model_class is ViCMAEForImageClassification else views(4)

    def loss_and_logits(labels, **settings):
        model = shake(model_class(tiny_config(**settings))).eval()
        output = model(inputs, labels=labels)
        assert output.logits.shape == (4, model.config.num_labels)
        return output.loss, output.logits

    indices = torch.tensor([2, 0, 1, 2])
    loss, logits = loss_and_logits(indices)
    expected = -logits.log_softmax(-1)[torch.arange(4), indices].mean()
    torch.testing.assert_close(loss, expected)

    probabilities = random_tensor(4, 3).softmax(-1)
    loss, logits = loss_and_logits(probabilities)
    torch.testing.assert_close(loss, -(probabilities * logits.log_softmax(-1)).sum(-1).mean())

    several = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    loss, logits = loss_and_logits(several, problem_type="multi_label_classification")
    torch.testing.assert_close(loss, F.binary_cross_entropy(logits.sigmoid(), several.float()))

    numbers = random_tensor(4, seed=3)
    loss, logits = loss_and_logits(numbers, num_labels=1)
    torch.testing.assert_close(loss, (logits[:, 0] - numbers).square().mean())
    loss, logits = loss_and_logits(random_tensor(4, 3, seed=4), problem_type="regression")
    torch.testing.assert_close(loss, (logits - random_tensor(4, 3, seed=4)).square().mean())


@pytest.mark.parametrize("model_class", [ViCMAEForImageClassification, ViCMAEForVideoClassification])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    "shape", [(3, 16, 16), (2, 3, 16, 16), (6, 3, 16, 16), (16, 3, 16, 16), (3, 160, 96), (2, 3, 96, 160)]
)
def test_images_and_clips_of_any_length_and_size_reach_the_classifier(model_class, pooling, shape):
    model = shake(model_class(tiny_config(pooling=pooling, patch_size=8))).eval()
    pixel_values = random_tensor(2, *shape)
    with torch.no_grad():
        output = model.vicmae(pixel_values)
        logits = model(pixel_values).logits
    length = 1 if len(shape) == 3 else shape[0] // 2
    assert output.last_hidden_state.shape == (2, 1 + length * (shape[-2] // 8) * (shape[-1] // 8), 16)
    tokens = output.last_hidden_state
    pooled = tokens[:, 0] if pooling == "cls" else tokens[:, 1:].mean(1)
    torch.testing.assert_close(output.pooler_output, pooled)
    torch.testing.assert_close(logits, model.classifier(pooled))


@pytest.mark.parametrize("model_class", [ViCMAEForImageClassification, ViCMAEForVideoClassification])
@pytest.mark.parametrize(("shape", "length"), [((6, 3, 16, 24), 3), ((4, 3, 16, 16), 2), ((3, 16, 16), 1)])
def test_means_of_tubelets_are_in_the_order_of_time(model_class, shape, length):
    """A clip of another length is resampled to that of the config, as temporal positions are."""
    model = shake(model_class(tiny_config(pooling="tubelets", num_frames=6))).eval()
    assert model.classifier.in_features == 3 * 16
    pixel_values = random_tensor(2, *shape)
    with torch.no_grad():
        output = model.vicmae(pixel_values)
        logits = model(pixel_values).logits
    num_patches = (shape[-2] // 4) * (shape[-1] // 4)
    tokens = output.last_hidden_state[:, 1:].numpy().reshape(2, length, num_patches, 16)
    means = tokens.mean(2)
    # Linear between the middles of tubelets; constant before the first and after the last.
    places = (np.arange(3) + 0.5) / 3 * length - 0.5
    resampled = [[np.interp(places, np.arange(length), row) for row in clip.T] for clip in means]  # (2, 16, 3)
    expected = np.swapaxes(resampled, 1, 2).reshape(2, 48)
    np.testing.assert_allclose(output.pooler_output.numpy(), expected, atol=1e-5)
    torch.testing.assert_close(logits, model.classifier(output.pooler_output))


def test_the_final_norm_may_come_after_pooling():
    config = tiny_config(pooling="mean", norm_after_pooling=True)
    model = shake(ViCMAEForImageClassification(config)).eval()
    with torch.no_grad():
        output = model(random_tensor(2, 3, 16, 16), output_hidden_states=True)
        pooled = model.vicmae.layernorm(output.hidden_states[-1][:, 1:].mean(1))
        torch.testing.assert_close(output.logits, model.classifier(pooled))
    with pytest.raises(ValueError, match="norm_after_pooling=False, got True"):
        ViCMAEForPreTraining(config)


# Loading across classes and sizes


@pytest.fixture
def pretrained(tmp_path):
    model = shake(ViCMAEForPreTraining(tiny_config())).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_frame_encoder_becomes_a_video_model(pretrained):
    model, path = pretrained
    video_model, report = ViCMAEForVideoClassification.from_pretrained(
        path, tubelet_size=2, num_frames=16, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {
        "classifier.weight",
        "classifier.bias",
        "vicmae.embeddings.temporal_position_embeddings",
    }
    assert not report["mismatched_keys"]
    assert not report["unexpected_keys"]

    weight = video_model.vicmae.embeddings.patch_embeddings.projection.weight
    frame_weight = model.vicmae.embeddings.patch_embeddings.projection.weight
    assert weight.shape == (16, 3, 2, 4, 4)
    assert torch.equal(weight[:, :, 0], frame_weight / 2)
    assert torch.equal(weight[:, :, 1], frame_weight / 2)
    assert video_model.vicmae.embeddings.temporal_position_embeddings.shape == (1, 8, 16)
    for name, tensor in model.vicmae.state_dict().items():
        if "projection.weight" not in name:
            assert torch.equal(video_model.vicmae.state_dict()[name], tensor), name

    frame = random_tensor(2, 3, 16, 16)
    still_video = frame.unsqueeze(1).expand(-1, 16, -1, -1, -1)
    with torch.no_grad():
        frame_embeddings = model.vicmae.embeddings(frame)
        video_embeddings = video_model.vicmae.embeddings(still_video)
        torch.testing.assert_close(video_embeddings[:, :1], frame_embeddings[:, :1])
        torch.testing.assert_close(
            video_embeddings[:, 1:].unflatten(1, (8, 16)), frame_embeddings[:, None, 1:].expand(-1, 8, -1, -1)
        )
        # An image is its still video of one tubelet, and has the features that pretraining gave it.
        pair = frame.unsqueeze(1).expand(-1, 2, -1, -1, -1)
        features = video_model.vicmae(frame).last_hidden_state
        torch.testing.assert_close(features, video_model.vicmae(pair).last_hidden_state, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features, model.vicmae(frame).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_a_video_model_gives_back_its_frame_embedding(pretrained, tmp_path):
    model, path = pretrained
    video_model = ViCMAEModel.from_pretrained(path)
    video_model.save_pretrained(tmp_path / "video")
    image_model, report = ViCMAEForImageClassification.from_pretrained(tmp_path / "video", output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(
        image_model.vicmae.embeddings.patch_embeddings.projection.weight,
        model.vicmae.embeddings.patch_embeddings.projection.weight,
    )


@pytest.mark.parametrize(
    ("model_class", "missing"),
    [
        (ViCMAEForPreTraining, set()),
        (ViCMAEModel, set()),
        (ViCMAEForImageClassification, {"classifier.weight", "classifier.bias"}),
    ],
)
def test_a_pretraining_checkpoint_opens_as_every_class(pretrained, model_class, missing):
    model, path = pretrained
    loaded, report = model_class.from_pretrained(path, output_loading_info=True)
    assert set(report["missing_keys"]) == missing
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    encoder = loaded if model_class is ViCMAEModel else loaded.vicmae
    images = random_tensor(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.vicmae(images).last_hidden_state
        torch.testing.assert_close(encoder(images).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_other_sizes_and_clip_lengths_are_resampled_and_saved(pretrained, tmp_path):
    model, path = pretrained
    larger, report = ViCMAEForPreTraining.from_pretrained(path, image_size=(24, 40), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    for module, source in ((larger.vicmae.embeddings, model.vicmae.embeddings), (larger.decoder, model.decoder)):
        expected = F.interpolate(source.position_embeddings.permute(0, 3, 1, 2), size=(6, 10), mode="bicubic")
        torch.testing.assert_close(module.position_embeddings, expected.permute(0, 2, 3, 1))
    # The same as a model of the old size computes on the fly for frames of the new size.
    arguments = {"pixel_values": views(2, 24, 40), "noise": random_tensor(2, 2, 60, seed=1)}
    with torch.no_grad():
        torch.testing.assert_close(larger(**arguments).logits, model(**arguments).logits, atol=1e-5, rtol=1e-5)

    video_model = shake(ViCMAEForVideoClassification(tiny_config()))
    video_model.save_pretrained(tmp_path / "short")
    longer = ViCMAEForVideoClassification.from_pretrained(tmp_path / "short", num_frames=12, image_size=(24, 16))
    source = video_model.vicmae.embeddings.temporal_position_embeddings
    expected = F.interpolate(source.transpose(1, 2), size=6, mode="linear").transpose(1, 2)
    torch.testing.assert_close(longer.vicmae.embeddings.temporal_position_embeddings, expected)
    longer.save_pretrained(tmp_path / "long")
    again = ViCMAEForVideoClassification.from_pretrained(tmp_path / "long")
    assert again.config.patch_grid == (6, 4)
    assert again.config.num_frames == 12
    for name, tensor in longer.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_settings_changed_on_loading_are_validated(pretrained):
    _, path = pretrained
    assert ViCMAEForPreTraining.from_pretrained(path, mask_ratio=0.5).config.mask_ratio == 0.5
    with pytest.raises(ValueError, match=r"mask_ratio.*got 1\.5"):
        ViCMAEForPreTraining.from_pretrained(path, mask_ratio=1.5)
    with pytest.raises(ValueError, match="num_frames must be a multiple of tubelet_size=3, got 4"):
        ViCMAEModel.from_pretrained(path, tubelet_size=3)


def test_a_checkpoint_that_does_not_fit_is_refused(pretrained):
    _, path = pretrained
    with pytest.raises(RuntimeError, match="mismatch"):
        ViCMAEForPreTraining.from_pretrained(path, hidden_size=32)


def test_half_precision_weights_load_and_run(pretrained):
    model, path = pretrained
    noise = random_tensor(3, 2, 16, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        half = ViCMAEForPreTraining.from_pretrained(path, dtype=dtype)
        assert {parameter.dtype for parameter in half.parameters()} == {dtype}
        for mode in (False, True):
            with torch.no_grad():
                output = half.train(mode)(views(), noise=noise)
                expected = copy.deepcopy(model).train(mode)(views(), noise=noise)
            assert output.logits.dtype == dtype
            torch.testing.assert_close(output.logits.float(), expected.logits, atol=0.1, rtol=0.1)
            torch.testing.assert_close(output.loss.float(), expected.loss, atol=0.1, rtol=0.1)
        encoder = ViCMAEModel.from_pretrained(path, dtype=dtype).eval()
        with torch.no_grad():
            features = encoder(random_tensor(2, 4, 3, 16, 16)).last_hidden_state
        assert features.dtype == dtype
        assert features.isfinite().all()


def test_autocast_keeps_losses_and_batch_statistics_in_float32():
    model = shake(ViCMAEForPreTraining(tiny_config())).train()
    reference = copy.deepcopy(model)
    arguments = {"pixel_values": views(8), "noise": random_tensor(8, 2, 16, seed=1)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**arguments)
    expected = reference(**arguments)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == output.contrastive_loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, atol=0.05, rtol=0.05)
    assert model.projector[1].running_mean.dtype == torch.float32


@pytest.mark.slow  # tests/test_hub.py opens a whole folder so
def test_auto_classes_in_a_fresh_process(pretrained):
    model, path = pretrained
    script = f"""
import torch
import vicmae_hf
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
from transformers import AutoModelForVideoClassification
path = {str(path)!r}
assert type(AutoConfig.from_pretrained(path)).__name__ == "ViCMAEConfig"
for auto_class, missing in [
    (AutoModel, []),
    (AutoModelForPreTraining, []),
    (AutoModelForImageClassification, ["classifier.bias", "classifier.weight"]),
    (AutoModelForVideoClassification, ["classifier.bias", "classifier.weight",
                                       "vicmae.embeddings.temporal_position_embeddings"]),
]:
    model, report = auto_class.from_pretrained(path, output_loading_info=True)
    assert sorted(report["missing_keys"]) == missing, (auto_class, report)
    assert not report["unexpected_keys"] and not report["mismatched_keys"], report
    print(type(model).__name__, model(torch.ones(1, 2, 3, 16, 16))[0].double().sum().item())
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    lines = dict(line.split() for line in finished.stdout.splitlines())
    assert list(lines) == [model_class.__name__ for model_class in ALL_CLASSES]
    with torch.no_grad():
        expected = model.vicmae(torch.ones(1, 2, 3, 16, 16)).last_hidden_state.double().sum().item()
    assert float(lines["ViCMAEModel"]) == pytest.approx(expected, abs=1e-3)


# Compiled and exported


@pytest.mark.slow
def test_the_compiled_encoder_gives_the_same_numbers():
    model = shake(ViCMAEModel(tiny_config())).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for inputs in (random_tensor(2, 3, 16, 16), random_tensor(2, 4, 3, 16, 16)):
            expected = model(inputs)
            output = compiled(inputs)
            torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 4, 3, 16, 16)])
def test_the_exported_encoder_gives_the_same_numbers(shape):
    model = shake(ViCMAEForVideoClassification(tiny_config())).eval()
    inputs = random_tensor(*shape)
    program = torch.export.export(model, args=(), kwargs={"pixel_values": inputs}, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixel_values=inputs).logits, model(inputs).logits)


# Bad input


@pytest.mark.parametrize("model_class", [ViCMAEModel, ViCMAEForImageClassification, ViCMAEForVideoClassification])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 16), r"\(3, 16, 16\)"),
        ((1, 1, 2, 3, 16, 16), r"\(1, 1, 2, 3, 16, 16\)"),
        ((2, 1, 16, 16), "Expected 3 channels, got 1"),
        ((2, 2, 4, 16, 16), "Expected 3 channels, got 4"),
        ((2, 3, 16, 18), "multiples of patch_size=4, got 16 x 18"),
        ((2, 3, 15, 16), "multiples of patch_size=4, got 15 x 16"),
        ((2, 3, 0, 16), "multiples of patch_size=4, got 0 x 16"),
        ((2, 3, 3, 16, 16), "multiple of tubelet_size=2, got 3"),
        ((2, 0, 3, 16, 16), "multiple of tubelet_size=2, got 0"),
    ],
)
def test_encoders_refuse_shapes_that_do_not_fit(model_class, shape, message):
    with pytest.raises(ValueError, match=message):
        model_class(tiny_config())(torch.zeros(shape))


@pytest.mark.parametrize("model_class", ALL_CLASSES)
def test_pixel_values_are_required(model_class):
    with pytest.raises(ValueError, match="pixel_values"):
        model_class(tiny_config())()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 16, 16), r"two views.*got \(2, 3, 16, 16\)"),
        ((2, 1, 3, 16, 16), r"two views.*got \(2, 1, 3, 16, 16\)"),
        ((2, 3, 3, 16, 16), r"two views.*got \(2, 3, 3, 16, 16\)"),
        ((2, 2, 1, 16, 16), "Expected 3 channels, got 1"),
        ((2, 2, 3, 16, 10), "multiples of patch_size=4, got 16 x 10"),
        ((2, 2, 3, 4, 4), "mask_ratio=0.75 leaves 0 of 1 patches visible"),
    ],
)
def test_pretraining_refuses_shapes_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        ViCMAEForPreTraining(tiny_config()).train()(torch.zeros(shape))


def test_the_number_of_visible_patches_is_rounded():
    """100 * (1 - 0.9) is 9.99... in floating point."""
    model = ViCMAEForPreTraining(tiny_config(mask_ratio=0.9, image_size=40)).eval()
    assert (model(random_tensor(2, 2, 3, 40, 40)).mask == 0).sum(-1).tolist() == [[10, 10]] * 2


def test_a_batch_of_one_sample_trains_the_reconstruction_alone():
    model = shake(ViCMAEForPreTraining(tiny_config())).train()
    output = model(views(1), noise=random_tensor(1, 2, 16))
    assert output.contrastive_loss is None and output.projections is None
    assert output.loss is output.reconstruction_loss
    output.loss.backward()
    assert model.decoder.prediction.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.contrastive_parameters())


def test_one_sample_is_enough_where_no_batch_statistics_are_taken():
    assert ViCMAEForPreTraining(tiny_config()).eval()(views(1)).loss.isfinite()
    assert ViCMAEForPreTraining(tiny_config(contrastive_loss="none")).train()(views(1)).loss.isfinite()


@pytest.mark.parametrize("model_class", ALL_CLASSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_no_numbers_are_refused(model_class, value):
    pixel_values = views(2)
    pixel_values[1, 0, 2, 3, 4:6] = value
    with pytest.raises(ValueError, match="Expected finite pixel_values, got 2 NaN or infinite of 3072 values"):
        model_class(tiny_config())(pixel_values)


@pytest.mark.parametrize("shape", [(3, 2, 15), (2, 2, 16), (3, 1, 16), (3, 16)])
def test_noise_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"noise must have shape \(3, 2, 16\).*got"):
        ViCMAEForPreTraining(tiny_config())(views(), noise=torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({}, torch.zeros(2, 3, dtype=torch.long), r"expected|must have shape \(2,\), got \(2, 3\)"),
        ({}, torch.zeros(3, dtype=torch.long), r"must have shape \(2,\), got \(3,\)"),
        ({}, torch.zeros(2, 4), r"must have shape \(2, 3\), got \(2, 4\)"),
        ({"problem_type": "multi_label_classification"}, torch.zeros(2), r"must have shape \(2, 3\), got \(2,\)"),
        ({"problem_type": "regression"}, torch.zeros(2), r"must have shape \(2, 3\), got \(2,\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(settings, labels, message):
    model = ViCMAEForImageClassification(tiny_config(**settings))
    with pytest.raises(ValueError, match=message):
        model(random_tensor(2, 3, 16, 16), labels=labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 18}, "multiple of 4.*got 18"),
        ({"decoder_hidden_size": 10}, "multiple of 4.*got 10"),
        ({"num_attention_heads": 3}, "3 attention heads must divide the width, got 16"),
        ({"decoder_num_attention_heads": 3}, "3 attention heads must divide the width, got 8"),
    ],
)
def test_widths_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ViCMAEForPreTraining(tiny_config(**settings))


def test_a_config_without_overrides_builds_vit_b16():
    with torch.device("meta"):
        model = ViCMAEForPreTraining(ViCMAEConfig(contrastive_loss="none"))
    encoder, decoder = (sum(p.numel() for p in module.parameters()) for module in (model.vicmae, model.decoder))
    # ViT-B/16 without a head and without its (fixed) positions; MAE's decoder, counted by hand.
    assert encoder == 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768) + 769 * 768 + 3 * 768
    assert decoder == (
        8 * (4 * (512 * 512 + 512) + 2 * 512 * 2048 + 2048 + 512 + 4 * 512)
        + (768 * 512 + 512)
        + 512
        + 2 * 512
        + (512 * 768 + 768)
    )
