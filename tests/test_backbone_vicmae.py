"""The backbone: feature maps, and models of Transformers on them."""

import pytest
import torch
from test_hub import MODEL_CODE
from tiny_models import random_tensor, shake, tiny_config
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

from vicmae_hf import ViCMAEBackbone, ViCMAEForPreTraining, ViCMAEModel


def saved(folder, **settings):
    model = shake(ViCMAEForPreTraining(tiny_config(num_hidden_layers=3, **settings))).eval()
    model.save_pretrained(folder)
    return model


def test_feature_maps_are_the_normalised_tokens_of_the_chosen_layers(tmp_path):
    encoder = saved(tmp_path).vicmae
    backbone, loading = ViCMAEBackbone.from_pretrained(tmp_path, out_indices=[0, 2, 3], output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert backbone.out_features == ["stem", "stage2", "stage3"]
    assert backbone.channels == [16, 16, 16]
    images = random_tensor(2, 3, 24, 36)  # another size than the checkpoint's 16 x 16
    with torch.no_grad():
        outputs = backbone(images)
        expected = encoder(images, output_hidden_states=True)
        last = expected.last_hidden_state[:, 1:].reshape(2, 6, 9, 16)
        second = encoder.layernorm(expected.hidden_states[2][:, 1:]).reshape(2, 6, 9, 16)
    assert [tuple(feature_map.shape) for feature_map in outputs.feature_maps] == [(2, 16, 6, 9)] * 3
    torch.testing.assert_close(outputs.feature_maps[2].permute(0, 2, 3, 1), last, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs.feature_maps[1].permute(0, 2, 3, 1), second, atol=1e-5, rtol=1e-4)
    assert outputs.hidden_states is None


def test_clips_have_a_map_for_each_tubelet(tmp_path):
    saved(tmp_path)
    backbone = ViCMAEBackbone.from_pretrained(tmp_path)  # by default the last layer
    model = ViCMAEModel.from_pretrained(tmp_path).eval()
    clips = random_tensor(2, 4, 3, 16, 20)
    with torch.no_grad():
        (feature_map,) = backbone(clips).feature_maps
        tokens = model(clips).last_hidden_state[:, 1:].reshape(2, 2, 4, 5, 16)
    torch.testing.assert_close(feature_map.permute(0, 2, 3, 4, 1), tokens, atol=1e-5, rtol=1e-4)


def test_the_backbone_is_found_by_the_auto_class_and_carries_its_code(tmp_path):
    config = tiny_config(out_features=["stage1", "stage2"])
    backbone = AutoBackbone.from_config(config)
    assert type(backbone) is ViCMAEBackbone
    backbone.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == MODEL_CODE
    again = ViCMAEBackbone.from_pretrained(tmp_path)
    assert again.out_indices == [1, 2]
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        tiny_config(out_features=["stage3"])


def test_upernet_learns_on_the_backbone(tmp_path):
    """The left half is one class, the right half another, told by their brightness."""
    torch.manual_seed(0)
    saved(tmp_path / "encoder")
    config = UperNetConfig(
        backbone_config=tiny_config(num_hidden_layers=3, out_indices=[0, 1, 2, 3]),
        hidden_size=8,
        pool_scales=[1, 2],
        num_labels=2,
        auxiliary_in_channels=16,
        auxiliary_channels=8,
    )
    model = UperNetForSemanticSegmentation(config).train()
    model.backbone.load_state_dict(ViCMAEBackbone.from_pretrained(tmp_path / "encoder").state_dict())
    labels = torch.zeros(4, 24, 32, dtype=torch.int64)
    labels[:, :, 16:] = 1
    images = labels[:, None].float().expand(-1, 3, -1, -1) + 0.1 * random_tensor(4, 3, 24, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())
    model.save_pretrained(tmp_path / "upernet")
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "upernet").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model.eval()(images).logits)
