"""The linear classifier: batch norm that is folded away, what learns, checkpoints."""

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_models import random_tensor, shake, tiny_config

from vicmae_hf import ViCMAEForImageClassification
from vicmae_hf.classification.linear import LinearClassifier


def trained_linear_classifier(dtype=torch.float32):
    torch.manual_seed(0)
    model = shake(ViCMAEForImageClassification(tiny_config(drop_path_rate=0.5, hidden_dropout_prob=0.5)))
    module = LinearClassifier(model.to(dtype)).to(dtype).train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    for step in range(5):
        pixel_values = 2 + 3 * random_tensor(6, 3, 16, 16, seed=step, dtype=dtype)
        module(pixel_values, labels=torch.arange(6) % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval()


def test_batch_norm_is_folded_into_the_classifier_exactly():
    module = trained_linear_classifier()
    module.norm.double()
    module.model.classifier.double()
    features = random_tensor(50, 16, seed=9, dtype=torch.float64) * 4 + 1
    expected = module(features=features).logits
    folded = module.folded_classifier()
    found = features @ folded["weight"].T + folded["bias"]
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-12)
    # Not by accident: without the fold the logits are others.
    assert (module.model.classifier(features) - expected).abs().max() > 0.1


def test_what_is_saved_is_a_plain_model(tmp_path):
    module = trained_linear_classifier()
    module.save_pretrained(tmp_path)
    model, info = ViCMAEForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixel_values = random_tensor(4, 3, 16, 16, seed=20)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(pixel_values).logits, module(pixel_values).logits, atol=1e-5, rtol=1e-5
        )
    assert not any("norm.running" in name for name in load_file(tmp_path / "model.safetensors"))


def test_only_the_classifier_of_a_linear_classifier_learns():
    module = trained_linear_classifier()
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trainable == {"model.classifier.weight", "model.classifier.bias"}
    module.train()
    assert module.norm.training and not any(layer.training for layer in module.model.vicmae.modules())
    torch.manual_seed(0)
    untouched = shake(ViCMAEForImageClassification(tiny_config(drop_path_rate=0.5, hidden_dropout_prob=0.5)))
    for name, tensor in untouched.vicmae.state_dict().items():
        assert torch.equal(module.model.vicmae.state_dict()[name], tensor), name


def test_the_running_statistics_are_those_of_the_features():
    module = LinearClassifier(shake(ViCMAEForImageClassification(tiny_config()))).train()
    features = random_tensor(64, 16, seed=3) * 5 + 2
    with torch.no_grad():
        logits = module(features=features).logits
    values = features.numpy().astype(np.float64)
    normalized = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    weight = module.model.classifier.weight.detach().numpy()
    np.testing.assert_allclose(logits, normalized @ weight.T, atol=1e-5)
    np.testing.assert_allclose(module.norm.running_var, 0.9 + 0.1 * values.var(0, ddof=1), rtol=1e-5)


def test_a_linear_checkpoint_restores_what_is_not_folded(tmp_path):
    module = trained_linear_classifier()
    module.save_checkpoint(tmp_path)
    other = LinearClassifier(ViCMAEForImageClassification(tiny_config()))
    other.load_checkpoint(tmp_path)
    expected = module.state_dict()
    assert other.state_dict().keys() == expected.keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
