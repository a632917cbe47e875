"""A contrastive loss across the batches of an update equals that of one large batch."""

from contextlib import nullcontext

import contrast_worker
import pytest
import torch
from contrast_worker import ACCUMULATION, OBJECTIVES, RANDOM, SEED, WEIGHT, build, cpu_accelerator, make_batch, train
from launching import forget_accelerate, run_together

from vicmae_hf import ViCMAEImageProcessor
from vicmae_hf.data.samples.augmentation import normalize_pixels
from vicmae_hf.training.loop import seed_batch


@pytest.fixture
def accelerator():
    forget_accelerate()
    yield cpu_accelerator()
    forget_accelerate()


def normalised(batch):
    processor = ViCMAEImageProcessor()
    return normalize_pixels(batch["pixel_values"], processor.image_mean, processor.image_std), batch["noise"]


def in_one_graph(model, num_processes: int, precision=nullcontext) -> list[dict[str, float]]:
    """
    The same two updates as sums over all batches of all processes, every activation kept. Leaves the gradients of the
    second in the model, and returns the losses of each.
    """
    losses = []
    for step in range(2):
        model.zero_grad()
        reconstruction, pooled = [], []
        with precision():
            for rank in range(num_processes):
                for micro_step in range(step * ACCUMULATION, (step + 1) * ACCUMULATION):
                    pixel_values, noise = normalised(make_batch(micro_step, rank))
                    seed_batch(SEED, micro_step, rank)
                    hidden_states, mask, ids_restore = model.encode_views(pixel_values, noise)
                    logits = model.reconstruct(hidden_states, ids_restore, (16, 16))
                    reconstruction.append(model.reconstruction_loss(pixel_values, logits, mask))
                    pooled.append(model.pool_views(hidden_states))
            _, contrastive_loss = model.contrast(torch.cat(pooled))
        reconstruction_loss = torch.stack(reconstruction).mean()
        loss = reconstruction_loss + (WEIGHT if step else 0) * contrastive_loss
        loss.backward()
        named = {"loss": loss, "reconstruction_loss": reconstruction_loss, "contrastive_loss": contrastive_loss}
        losses.append({name: value.item() for name, value in named.items()})
    return losses


def check(outcome, losses, model, expected_losses) -> None:
    """Against what `in_one_graph` left in a model of float64."""
    for found, expected in zip(losses, expected_losses, strict=True):
        # Losses are added up in float32.
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(
            outcome["gradients"][name], parameter.grad, atol=1e-10 * max(largest, 1), rtol=1e-10, msg=name
        )
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(outcome["buffers"][name], buffer, atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_batches_are_one_large_one(accelerator, name):
    outcome, losses = train(build(OBJECTIVES[name] | RANDOM), accelerator)
    model = build(OBJECTIVES[name] | RANDOM)
    check(outcome, losses, model, in_one_graph(model, num_processes=1))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    path = tmp_path_factory.mktemp("contrast")
    finished = run_together(contrast_worker.__file__, path)
    assert finished.returncode == 0, finished.stderr
    return [torch.load(path / f"rank_{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_several_batches_of_two_processes_are_one_large_one(outcomes, name):
    model = build(OBJECTIVES[name] | RANDOM)
    expected = in_one_graph(model, num_processes=2)
    for by_name in outcomes:
        check(*by_name[name], model, expected)


def test_the_one_graph_of_these_tests_is_a_plain_forward_pass():
    settings = {"contrastive_loss": "info_nce", "reconstruct": "both"}
    model, plain = build(settings), build(settings)
    expected = in_one_graph(model, num_processes=1)
    for step in range(2):
        plain.zero_grad()
        plain.contrastive_weight = WEIGHT * step
        parts = [normalised(make_batch(step * ACCUMULATION + index, 0)) for index in range(ACCUMULATION)]
        output = plain(*(torch.cat(part) for part in zip(*parts, strict=True)))
        output.loss.backward()
        assert {name: output[name].item() for name in expected[step]} == pytest.approx(expected[step], rel=1e-12)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    check({"gradients": gradients, "buffers": dict(plain.named_buffers())}, expected, model, expected)
