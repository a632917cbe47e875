import math

import numpy as np
import numpy_vicmae
import pytest
import torch
from tiny_models import random_tensor, shake, tiny_config
from torch.nn import functional as F

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.modeling_vicmae import info_nce_loss, nt_xent_loss, simsiam_loss, vicreg_loss


def projections(batch_size: int = 6, size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Two related views, neither normalised nor centred."""
    first = random_tensor(batch_size, size, dtype=torch.float64)
    return first + 0.3, 3 * first + random_tensor(batch_size, size, seed=1, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_info_nce_is_algorithm_1(temperature):
    first, second = projections()
    expected = numpy_vicmae.info_nce(first.numpy(), second.numpy(), temperature)
    assert info_nce_loss(first, second, 1 / temperature).item() == pytest.approx(expected, rel=1e-12)
    assert info_nce_loss(second, first, 1 / temperature).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_nt_xent_is_simclr_s_loss(temperature):
    first, second = projections()
    expected = numpy_vicmae.nt_xent(first.numpy(), second.numpy(), temperature)
    assert nt_xent_loss(first, second, 1 / temperature).item() == pytest.approx(expected, rel=1e-12)


def test_contrastive_losses_of_known_similarities():
    """Identical views of N orthogonal samples: similarity 1 with the positive, 0 with everything else."""
    identity = torch.eye(4, dtype=torch.float64)
    assert info_nce_loss(identity, 5 * identity, 10.0).item() == pytest.approx(4 * math.log(1 + 3 * math.exp(-10)))
    assert nt_xent_loss(identity, 5 * identity, 10.0).item() == pytest.approx(math.log(1 + 6 * math.exp(-10)))
    collapsed = torch.ones(4, 4, dtype=torch.float64)
    assert info_nce_loss(collapsed, collapsed, 10.0).item() == pytest.approx(4 * math.log(4))
    assert nt_xent_loss(collapsed, collapsed, 10.0).item() == pytest.approx(math.log(7))


def test_simsiam_of_known_vectors():
    """2 (1 - cosine): 0 for the same direction, 2 for a right angle, 4 for opposite ones; lengths do not matter."""
    projection = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-4.0, 0.0]], dtype=torch.float64)
    losses = [simsiam_loss(projection[i : i + 1], target[i : i + 1]).item() for i in range(3)]
    assert losses == pytest.approx([0, 2, 4])
    assert simsiam_loss(projection, target).item() == pytest.approx(2)


def test_simsiam_learns_through_the_projected_side_of_both_directions_only():
    """The class tokens' gradient against finite differences of the equations with both targets held fixed."""
    model = shake(ViCMAEForPreTraining(tiny_config(contrastive_loss="simsiam")).double()).train()
    hidden_states = random_tensor(4, 2, 5, 16, dtype=torch.float64).requires_grad_()
    model.contrast(model.pool_views(hidden_states))[1].backward()
    weights = numpy_vicmae.to_numpy(model.state_dict())
    tokens = hidden_states.detach()[:, :, 0].numpy()

    def loss_of(changed: np.ndarray) -> float:
        first, second = (numpy_vicmae.project(changed[:, view], weights) for view in (0, 1))
        return numpy_vicmae.simsiam(first, tokens[:, 1]) + numpy_vicmae.simsiam(second, tokens[:, 0])

    for sample, view, dimension in [(0, 0, 3), (2, 1, 7), (3, 0, 15)]:
        step = np.zeros_like(tokens)
        step[sample, view, dimension] = 1e-5
        slope = (loss_of(tokens + step) - loss_of(tokens - step)) / 2e-5
        assert abs(slope) > 1e-4
        assert hidden_states.grad[sample, view, 0, dimension].item() == pytest.approx(slope, rel=1e-5)


def test_simsiam_is_equation_1_and_stops_the_gradient_at_the_target():
    projection, target = (tensor.requires_grad_() for tensor in projections())
    loss = simsiam_loss(projection, target)
    expected = numpy_vicmae.simsiam(projection.detach().numpy(), target.detach().numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert target.grad is None
    assert projection.grad.abs().sum() > 0


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_vicreg_is_equations_2_to_4(weights):
    names = ("vicreg_invariance_weight", "vicreg_variance_weight", "vicreg_covariance_weight")
    config = tiny_config(**dict(zip(names, weights, strict=True)))
    first, second = projections()
    expected = numpy_vicmae.vicreg(first.numpy(), second.numpy(), config)
    assert expected > 0
    assert vicreg_loss(first, second, config).item() == pytest.approx(expected, rel=1e-12)


def test_the_variance_term_of_vicreg_lets_go_above_its_target():
    """In one dimension unit vectors are 1 or -1: half of each has a deviation above 1, all the same have 0."""
    config = tiny_config(
        vicreg_invariance_weight=0.0, vicreg_variance_weight=1.0, vicreg_covariance_weight=0.0, projector_output_size=1
    )
    spread = torch.tensor([[3.0], [-1.0], [2.0], [-5.0]], dtype=torch.float64)
    same = spread.abs()
    assert vicreg_loss(spread, spread, config).item() == 0
    # The epsilon under the root: a collapsed dimension has the deviation sqrt(1e-4), not 0.
    assert vicreg_loss(same, same, config).item() == pytest.approx(2 * (1 - 0.01))
    assert vicreg_loss(spread, same, config).item() == pytest.approx(1 - 0.01)


def test_the_covariance_term_of_vicreg_is_zero_for_independent_dimensions_only():
    config = tiny_config(vicreg_invariance_weight=0.0, vicreg_variance_weight=0.0, vicreg_covariance_weight=1.0)
    # The corners of a square are uncorrelated; its diagonal is one direction.
    square = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    diagonal = torch.tensor([[1, 1], [-1, -1], [1, 1], [-1, -1]], dtype=torch.float64)
    assert vicreg_loss(square, square, config).item() == pytest.approx(0, abs=1e-15)
    # Unit vectors (1, 1) / sqrt(2): two covariances of 0.5 * 4 / 3 a view, squared, over two dimensions.
    assert vicreg_loss(diagonal, diagonal, config).item() == pytest.approx(2 * 2 * (0.5 * 4 / 3) ** 2 / 2)


def test_vicreg_of_one_sample_is_left_out_in_evaluation_too():
    """The deviation of one sample is NaN; the last batch of an evaluation may be one."""
    model = shake(ViCMAEForPreTraining(tiny_config(contrastive_loss="vicreg"))).eval()
    pixel_values = random_tensor(1, 2, 3, *model.config.image_height_and_width)
    output = model(pixel_values)
    assert output.contrastive_loss is None and output.loss == output.reconstruction_loss
    assert model(pixel_values.repeat(2, 1, 1, 1, 1)).contrastive_loss.isfinite()


def test_vicreg_differentiates_both_views():
    first, second = (tensor.requires_grad_() for tensor in projections(4, 3))
    assert torch.autograd.gradcheck(lambda a, b: vicreg_loss(a, b, tiny_config()), (first, second))


@pytest.mark.parametrize("loss_function", [info_nce_loss, nt_xent_loss])
def test_gradients_equal_finite_differences(loss_function):
    first, second = (tensor.requires_grad_() for tensor in projections(4, 3))
    assert torch.autograd.gradcheck(lambda a, b: loss_function(a, b, 2.0), (first, second))


@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_the_temperature_is_the_inverse_of_exp_tau_and_may_be_learned(name):
    settings = {"contrastive_loss": name, "temperature": 0.2}
    fixed = shake(ViCMAEForPreTraining(tiny_config(**settings))).train()
    learned = ViCMAEForPreTraining(tiny_config(learnable_temperature=True, **settings)).train()
    assert learned.logit_scale.item() == pytest.approx(math.log(5))
    assert fixed.logit_scale is None
    learned.load_state_dict({**fixed.state_dict(), "logit_scale": learned.logit_scale.detach()})
    hidden_states = random_tensor(4, 2, 5, 16)
    losses = [model.contrast(model.pool_views(hidden_states))[1] for model in (fixed, learned)]
    torch.testing.assert_close(losses[0], losses[1])
    losses[1].backward()
    first, second = learned.contrast(learned.pool_views(hidden_states))[0].detach().double().numpy().transpose(1, 0, 2)
    loss_at = {step: getattr(numpy_vicmae, name)(first, second, 0.2 * math.exp(-step)) for step in (-1e-4, 1e-4)}
    slope = (loss_at[1e-4] - loss_at[-1e-4]) / 2e-4
    assert learned.logit_scale.grad.item() == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("name", ["info_nce", "nt_xent", "simsiam", "vicreg"])
def test_vicmae_pools_patch_tokens_and_the_baselines_read_the_class_token(name):
    model = shake(ViCMAEForPreTraining(tiny_config(contrastive_loss=name))).train()
    hidden_states = random_tensor(4, 2, 5, 16)
    loss = model.contrast(model.pool_views(hidden_states))[1]
    read = slice(1, None) if name in ("info_nce", "nt_xent") else slice(0, 1)
    shuffled = hidden_states.clone()
    ignored = slice(0, 1) if read.start == 1 else slice(1, None)
    shuffled[:, :, ignored] = random_tensor(*shuffled[:, :, ignored].shape, seed=5)
    torch.testing.assert_close(model.contrast(model.pool_views(shuffled))[1], loss)
    shuffled[:, :, read] = random_tensor(*shuffled[:, :, read].shape, seed=6)
    assert not torch.isclose(model.contrast(model.pool_views(shuffled))[1], loss)


def test_plain_mae_has_no_projector_and_no_contrastive_loss():
    model = ViCMAEForPreTraining(tiny_config(contrastive_loss="none")).train()
    output = model(random_tensor(2, 2, 3, 16, 16))
    assert model.projector is None
    assert output.contrastive_loss is None
    assert output.loss is output.reconstruction_loss


def test_the_projector_has_three_linear_layers_and_two_batch_norms():
    model = ViCMAEForPreTraining(tiny_config(projector_hidden_size=12, projector_output_size=7))
    widths = [(m.in_features, m.out_features) for m in model.projector if isinstance(m, torch.nn.Linear)]
    assert widths == [(16, 12), (12, 12), (12, 7)]
    assert [m.num_features for m in model.projector if isinstance(m, torch.nn.BatchNorm1d)] == [12, 12]
    assert isinstance(model.projector[-1], torch.nn.Linear)


def test_in_eval_mode_the_projector_uses_its_running_statistics():
    model = shake(ViCMAEForPreTraining(tiny_config())).eval()
    for norm in (model.projector[1], model.projector[4]):
        norm.running_mean.copy_(random_tensor(20, seed=2))
        norm.running_var.copy_(random_tensor(20, seed=3).square() + 0.5)
    hidden_states = random_tensor(2, 2, 5, 16)
    projected = hidden_states[:, :, 1:].mean(2)
    for first, norm in ((0, 1), (3, 4)):
        projected = model.projector[first](projected)
        layer = model.projector[norm]
        projected = (projected - layer.running_mean) / (layer.running_var + 1e-5).sqrt() * layer.weight + layer.bias
        projected = projected.relu()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.testing.assert_close(model.contrast(model.pool_views(hidden_states))[0], model.projector[6](projected))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruction_counts_masked_patches_of_the_reconstructed_views_only(norm_pix_loss):
    model = ViCMAEForPreTraining(tiny_config(norm_pix_loss=norm_pix_loss, reconstruct="both"))
    pixel_values = random_tensor(2, 2, 3, 16, 16)
    mask = (random_tensor(2, 2, 16, seed=1) > 0.3).float()
    logits = random_tensor(2, 2, 16, 48, seed=2)
    target = np.stack(
        [numpy_vicmae.pixel_target(f, model.config) for f in pixel_values.double().flatten(0, 1).numpy()]
    )
    error = ((logits.double().flatten(0, 1).numpy() - target) ** 2).mean(-1)
    expected = error[mask.flatten(0, 1).numpy() == 1].mean()
    assert model.reconstruction_loss(pixel_values, logits, mask).item() == pytest.approx(expected, rel=1e-6)
    only_first = error.reshape(2, 2, 16)[:, 0][mask[:, 0].numpy() == 1].mean()
    assert model.reconstruction_loss(pixel_values, logits[:, :1], mask).item() == pytest.approx(only_first, rel=1e-6)
    exact = torch.from_numpy(target).float().reshape(2, 2, 16, 48)
    assert model.reconstruction_loss(pixel_values, exact, mask).item() == pytest.approx(0, abs=1e-10)


def test_a_flat_patch_has_a_finite_target():
    model = ViCMAEForPreTraining(tiny_config())
    target = model.reconstruction_target(torch.full((1, 1, 3, 16, 16), 0.7))
    torch.testing.assert_close(target, torch.zeros(1, 1, 16, 48), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_the_contrastive_part_alone_can_be_learned(name):
    """A few steps pull the positives of two fixed sets of features together: the sign of the loss is right."""
    torch.manual_seed(0)
    model = ViCMAEForPreTraining(tiny_config(contrastive_loss=name)).train()
    content = random_tensor(16, 1, 1, 16)
    hidden_states = content + 0.5 * random_tensor(16, 2, 5, 16, seed=1)
    optimizer = torch.optim.Adam(model.projector.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model.contrast(model.pool_views(hidden_states))[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, second = F.normalize(model.contrast(model.pool_views(hidden_states))[0].detach(), dim=-1).unbind(1)
    assert (first @ second.T).argmax(1).tolist() == list(range(16))
