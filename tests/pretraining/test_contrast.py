"""A contrastive loss across the batches of an update equals that of one large batch."""

import json
from contextlib import nullcontext

import contrast_worker
import pytest
import torch
from contrast_worker import (
    ACCUMULATION,
    BATCH_SIZE,
    OBJECTIVES,
    RANDOM,
    SEED,
    WEIGHT,
    build,
    cpu_accelerator,
    make_batch,
    train,
)
from launching import forget_accelerate, run_here, run_together
from tiny_models import tiny_overrides
from video_files import write_images

from vicmae_hf import ViCMAEImageProcessor
from vicmae_hf.data.samples.augmentation import PixelNormalizer
from vicmae_hf.training.devices.hardware import compile_layers
from vicmae_hf.training.loop import seed_batch
from vicmae_hf.training.resuming import describe_changes


@pytest.fixture
def accelerator():
    forget_accelerate()
    yield cpu_accelerator()
    forget_accelerate()


def normalised(batch):
    processor = ViCMAEImageProcessor()
    return PixelNormalizer(processor.image_mean, processor.image_std)(batch["pixel_values"]), batch["noise"]


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
        loss = reconstruction_loss + step * model.config.contrastive_weight * contrastive_loss
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


def test_activations_may_be_computed_again(accelerator):
    checkpointed = build(OBJECTIVES["info_nce_both"] | RANDOM)
    checkpointed.gradient_checkpointing_enable()
    outcome, losses = train(checkpointed, accelerator)
    model = build(OBJECTIVES["info_nce_both"] | RANDOM)
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
        parts = [normalised(make_batch(step * ACCUMULATION + index)) for index in range(ACCUMULATION)]
        output = plain(*(torch.cat(part) for part in zip(*parts, strict=True)))
        output.loss.backward()
        assert {name: output[name].item() for name in expected[step]} == pytest.approx(expected[step], rel=1e-12)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    check({"gradients": gradients, "buffers": dict(plain.named_buffers())}, expected, model, expected)


@pytest.mark.slow  # compiles
def test_compiled_layers_draw_the_same_numbers_in_both_passes(accelerator):
    model = build(OBJECTIVES["info_nce_both"] | RANDOM)
    compile_layers(model)  # what --torch_compile does
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outcome, losses = train(model, accelerator)
    model.load_state_dict(before, strict=False)
    check(outcome, losses, model, in_one_graph(model, num_processes=1))


def test_nothing_is_encoded_twice_before_the_loss_counts(accelerator):
    model = build({})
    calls = []
    model.vicmae.layernorm.register_forward_hook(lambda *_: calls.append("encoder"))
    model.decoder.register_forward_hook(lambda *_: calls.append("decoder"))
    train(model, accelerator)
    first, second = ["encoder", "decoder"] * ACCUMULATION, ["encoder"] * ACCUMULATION
    assert calls == first + second + first


@pytest.mark.parametrize("start_epoch", [1.0, 2.0])
def test_the_output_is_that_of_the_last_batch(accelerator, start_epoch):
    """Figures of a collapse are computed on it, as without accumulation."""
    model = build({})
    outcome, _ = train(model, accelerator, start_epoch)
    batches = [make_batch(micro_step) for micro_step in range(ACCUMULATION, 2 * ACCUMULATION)]
    pooled = [model.pool_views(model.encode_views(*normalised(batch))[0]) for batch in batches]
    torch.testing.assert_close(outcome["output"].projections, model.contrast(torch.cat(pooled))[0][-BATCH_SIZE:])
    assert outcome["output"].features.shape == (BATCH_SIZE, 2, 16)


def relative_error(found: dict, expected: dict, names) -> float:
    found, expected = (
        torch.cat([gradients[name].double().flatten() for name in names]) for gradients in (found, expected)
    )
    return ((found - expected).norm() / expected.norm()).item()


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_in_bf16_it_is_one_large_batch_to_its_rounding():
    forget_accelerate()
    settings = OBJECTIVES["info_nce_both"]
    outcome, _ = train(build(settings, torch.float32), cpu_accelerator(mixed_precision="bf16"))
    model, exact = build(settings, torch.float32), build(settings)
    in_one_graph(model, 1, precision=lambda: torch.autocast("cpu", torch.bfloat16))
    in_one_graph(exact, 1)
    large = gradients_of(model)
    assert relative_error(outcome["gradients"], large, large) < 0.01
    assert relative_error(large, gradients_of(exact), large) > 0.01  # the rounding
    forget_accelerate()


SCALE = 2.0**16


def test_a_gradient_scaler_scales_every_gradient_once(accelerator):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    outcome, losses = train(build(RANDOM), accelerator)
    outcome["gradients"] = {name: gradient / SCALE for name, gradient in outcome["gradients"].items()}
    model = build(RANDOM)
    check(outcome, losses, model, in_one_graph(model, num_processes=1))


def test_in_fp16_small_gradients_are_scaled_on_their_way_through_the_projector(accelerator, monkeypatch):
    """A weight so small that without the scale half precision would hold next to nothing of them."""
    settings = {"contrastive_weight": 1e-6}
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", torch.float16))
    model, exact = build(settings, torch.float32), build(settings)
    monkeypatch.setattr(model, "forward", torch.autocast("cpu", torch.float16)(model.forward))
    outcome, _ = train(model, accelerator)
    in_one_graph(exact, 1)
    names = [name for name in gradients_of(exact) if name.startswith("projector")]
    found = {name: gradient / SCALE for name, gradient in outcome["gradients"].items()}
    assert relative_error(found, gradients_of(exact), names) < 0.01


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 8, cells=4)
    return folder


def pretrain(launch, images, output_dir, batch_size, accumulation, *others, **overrides):
    """Four updates of eight pairs, the contrastive loss in the last two."""
    process = launch(
        "run_pretraining.py",
        *("--train_data", images, "--output_dir", output_dir, "--image_size", 32, "--num_train_epochs", 4),
        *("--config_overrides", tiny_overrides(**overrides), "--dataloader_num_workers", 0, "--logging_steps", 1),
        *("--warmup_epochs", 0, "--contrastive_start_epoch", 2, "--base_learning_rate", 0.05),
        *("--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation, *others),
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(lines: list[dict]) -> list[dict[str, float]]:
    names = ("loss", "reconstruction_loss", "contrastive_loss", "gradient_norm")
    return [{name: line[name] for name in names if name in line} for line in lines]


@pytest.mark.slow
def test_whole_runs_do_not_depend_on_how_the_batch_is_divided(images, tmp_path):
    plain = losses_of(pretrain(run_here, images, tmp_path / "plain", 8, 1))
    divided = pretrain(run_here, images, tmp_path / "divided", 1, 8, "--contrast_across_accumulation")
    for found, expected in zip(losses_of(divided), plain, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    # One step an update is compared with nothing else.
    single = pretrain(run_here, images, tmp_path / "single", 8, 1, "--contrast_across_accumulation")
    assert losses_of(single) == plain


def test_a_resumed_run_ends_with_the_same_weights(images, tmp_path):
    flags = [
        images,
        tmp_path,
        2,
        4,
        "--contrast_across_accumulation",
        "--checkpointing_steps",
        1,
        "--save_total_limit",
        9,
    ]
    dropout = {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.2}
    lines = pretrain(run_here, *flags, **dropout)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    again = pretrain(run_here, *flags, "--resume_from_checkpoint", tmp_path / "checkpoint-1", **dropout)
    assert losses_of(again) == losses_of(lines)
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_plain_mae_has_nothing_to_compare(images, tmp_path):
    lines = pretrain(run_here, images, tmp_path, 4, 2, "--contrast_across_accumulation", contrastive_loss="none")
    assert all(line["loss"] == line["reconstruction_loss"] for line in lines)


def test_a_batch_divided_otherwise_compares_as_many_pairs():
    before = {
        "num_steps": 9,
        "num_processes": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "total_batch_size": 8,
        "contrastive_start_epoch": 0,
        "model": {"contrastive_loss": "info_nce"},
    }
    now = before | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for across, said in [(False, True), (True, False)]:
        setting = {"contrast_across_accumulation": across}
        lines = describe_changes(before | setting, now | setting)
        assert any("The contrastive loss now compares 2 samples" in line for line in lines) == said
