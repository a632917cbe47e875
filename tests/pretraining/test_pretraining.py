"""Pretraining: its defaults, and what a run does with its weights before and after the contrastive loss starts."""

import json

import pytest
import torch
from launching import run_here, run_together
from safetensors.torch import load_file
from tiny_models import tiny_overrides
from video_files import write_images

from vicmae_hf.pretraining.arguments import PretrainingArguments


MODEL = tiny_overrides(learnable_temperature="true")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 8, cells=4)
    return folder


def flags(images, output_dir, *others):
    return [
        *("--train_data", images, "--output_dir", output_dir, "--image_size", 32, "--config_overrides", MODEL),
        *("--warmup_epochs", 0, "--dataloader_num_workers", 0, "--logging_steps", 1, *others),
    ]


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_defaults_are_table_1():
    arguments = PretrainingArguments(train_data=["clips"], output_dir="out")
    assert arguments.base_learning_rate == 1.5e-4
    assert arguments.weight_decay == 0.05
    assert arguments.warmup_epochs == 40
    assert arguments.num_train_epochs == 800
    assert arguments.contrastive_start_epoch == 200
    assert arguments.max_bad_files == 0.05


@pytest.mark.parametrize(
    ("launch", "batch_size"), [pytest.param(run_here, 4, marks=pytest.mark.slow), (run_together, 2)]
)
def test_the_projector_is_left_alone_until_the_contrastive_loss_starts(images, tmp_path, launch, batch_size):
    """Two updates an epoch; the contrastive loss counts from the fifth on."""
    process = launch(
        "run_pretraining.py",
        *flags(images, tmp_path, "--per_device_train_batch_size", batch_size, "--num_train_epochs", 3),
        *("--contrastive_start_epoch", 2, "--weight_decay", 10, "--base_learning_rate", 0.5),
        *("--checkpointing_steps", 1, "--save_total_limit", 9),
    )
    assert process.returncode == 0, process.stderr
    weights = [load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 7)]
    only_contrastive = [name for name in weights[0] if name.startswith("projector.") and "running" not in name]
    only_contrastive = [name for name in only_contrastive if "num_batches" not in name] + ["logit_scale"]
    assert len(only_contrastive) > 6
    for name in only_contrastive:
        for later in weights[1:4]:
            assert torch.equal(later[name], weights[0][name]), name
    moved = [name for name in only_contrastive if not torch.equal(weights[4][name], weights[0][name])]
    # A linear layer before a batch norm has no use for its bias.
    assert len(moved) >= len(only_contrastive) - 2
    # What else there is was trained and decayed all the while.
    assert not torch.equal(weights[1]["decoder.embed.weight"], weights[0]["decoder.embed.weight"])
    assert [line["loss"] == line["reconstruction_loss"] for line in lines(tmp_path)] == [True] * 4 + [False] * 2


def test_a_schedule_that_never_takes_effect_is_refused(images, tmp_path):
    def refused(*others):
        process = run_here(
            "run_pretraining.py", *flags(images, tmp_path / "out", "--per_device_train_batch_size", 4, *others)
        )
        assert process.returncode == 1
        assert not (tmp_path / "out" / "model.safetensors").exists()
        return process.stderr

    message = refused("--num_train_epochs", 100)
    assert "error: --contrastive_start_epoch 200 is not reached in 100 epochs" in message
    message = refused("--num_train_epochs", 30, "--contrastive_start_epoch", 0, "--warmup_epochs", 40)
    assert "error: --warmup_epochs 40 is no shorter than the run of 30 epochs" in message
    message = refused("--per_device_train_batch_size", 1, "--max_train_steps", 2)
    assert "error: --per_device_train_batch_size 1 leaves the contrastive loss nothing to compare" in message


def test_a_trial_of_a_few_updates_runs_and_says_what_it_leaves_out(images, tmp_path):
    process = run_here(
        "run_pretraining.py",
        *flags(images, tmp_path, "--per_device_train_batch_size", 4, "--max_train_steps", 2, "--warmup_epochs", 40),
    )
    assert process.returncode == 0, process.stderr
    assert "--contrastive_start_epoch 200 is not reached in 1 epochs" in process.stderr
    assert "--warmup_epochs 40 is no shorter than the run of 1 epochs" in process.stderr


def test_what_is_refused_leaves_the_run_that_it_would_have_replaced(images, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "all_results.json").write_text("{}")
    for refused, message in [
        (["--train_data_weights", 1, 2], "Expected one positive weight for each of 1 sources"),
        (["--contrastive_start_epoch", 9], "--contrastive_start_epoch 9 is not reached in 5 epochs"),
        (["--crop_scale", 0.5], "crop_scale must be two ascending shares"),
        (["--probe_data", ""], "--probe_data must not be empty"),
    ]:
        process = run_here(
            "run_pretraining.py",
            *flags(images, tmp_path, "--per_device_train_batch_size", 4, "--num_train_epochs", 5),
            *("--contrastive_start_epoch", 0, "--overwrite_output_dir", *refused),
        )
        assert process.returncode == 1 and message in process.stderr, process.stderr
        assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["all_results.json", "checkpoint-5"]
