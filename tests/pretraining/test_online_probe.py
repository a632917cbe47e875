"""The probe that runs beside pretraining: what it tells, and that what is learned is the same without it."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from demo_data import write_demo_data
from launching import run_here
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_config

from vicmae_hf import ViCMAEModel
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError
from vicmae_hf.pretraining.online_probe import OnlineProbe
from vicmae_hf.processors import build_processors


OVERRIDES = "patch_size=8,hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
OVERRIDES += ",decoder_hidden_size=8,decoder_num_hidden_layers=1,decoder_num_attention_heads=2"
OVERRIDES += ",decoder_intermediate_size=8,hidden_dropout_prob=0.1"
SETTINGS = ["--image_size", "32", "--config_overrides", OVERRIDES, "--per_device_train_batch_size", "8"]
SETTINGS += ["--max_train_steps", "6", "--logging_steps", "1", "--checkpointing_steps", "3", "--warmup_epochs", "0"]
SETTINGS += ["--contrastive_start_epoch", "0", "--dataloader_num_workers", "1"]
LEARNED = ["loss", "reconstruction_loss", "contrastive_loss", "learning_rate"]


def write_pictures(root, num_files, is_meaningful):
    """Pictures of two classes that differ in colour, or in nothing."""
    generator = np.random.default_rng(0)
    for name, colour in [("blue", (60, 60, 200)), ("red", (200, 60, 60))]:
        (root / name).mkdir(parents=True)
        for index in range(num_files):
            base = np.array(colour if is_meaningful else (128, 128, 128))
            pixels = base + generator.normal(0, 40, (24, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{index}.png")


def build_probe(root, encoder, **options):
    settings = {"probe_steps": 10, "seed": 0, "batch_size": 8, "num_workers": 0}
    return OnlineProbe(
        Accelerator(cpu=True),
        encoder,
        open_labelled(root),
        build_processors(encoder.config)[0],
        MediaLoader(),
        **{**settings, **options},
    )


def test_an_online_probe_tells_features_that_know_the_class_from_features_that_do_not(tmp_path):
    encoder = ViCMAEModel(tiny_config(pooling="mean"), video=False)
    write_pictures(tmp_path / "colours", 25, is_meaningful=True)
    figures = build_probe(tmp_path / "colours", encoder)(10, False, None)
    assert set(figures) == {"probe_knn_top1", "probe_linear_top1"}
    # Five held-out pictures of each class.
    assert min(figures.values()) >= 90
    write_pictures(tmp_path / "noise", 25, is_meaningful=False)
    assert max(build_probe(tmp_path / "noise", encoder)(10, False, None).values()) <= 80


def test_an_online_probe_is_due_every_so_often_and_at_the_end_and_leaves_no_trace(tmp_path):
    encoder = ViCMAEModel(tiny_config(hidden_dropout_prob=0.5), video=False).train()
    write_pictures(tmp_path, 5, is_meaningful=True)
    probe = build_probe(tmp_path, encoder, num_workers=1)
    state, random_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    assert [bool(probe(step, step == 25, None)) for step in (1, 9, 10, 11, 20, 24, 25)] == [
        False,
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], random_state)
    assert all(module.training for module in encoder.modules())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(weights[name], value) for name, value in encoder.state_dict().items())
    # The same at any step, for nothing was trained.
    assert probe(10, False, None) == probe(20, False, None)


def test_a_probe_learns_from_four_fifths_of_every_class(tmp_path):
    write_pictures(tmp_path, 10, is_meaningful=True)
    encoder = ViCMAEModel(tiny_config(), video=False)
    probes = [build_probe(tmp_path, encoder, seed=seed) for seed in (0, 0, 1)]
    for probe in probes:
        assert torch.as_tensor(probe.views.source.labels)[probe.is_training].bincount().tolist() == [8, 8]
    assert torch.equal(probes[0].is_training, probes[1].is_training)
    assert not torch.equal(probes[0].is_training, probes[2].is_training)
    write_pictures(tmp_path / "few", 2, is_meaningful=True)
    with pytest.raises(InputError, match="few: expected a class with at least 3 files"):
        build_probe(tmp_path / "few", encoder)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_probe_leaves_the_training_as_it_is(tmp_path):
    data = tmp_path / "data"
    write_demo_data(data, appearance_videos=(3, 1), motion_videos=(1, 1), images=(1, 1), num_workers=1)
    flags = ["--train_data", data / "images" / "train", "--probe_data", data / "appearance" / "train", *SETTINGS]
    process = run_here("run_pretraining.py", *flags, "--probe_steps", "4", "--output_dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    first = metrics(tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert [line["step"] for line in first if "probe_knn_top1" in line] == [4, 6]
    assert [line["step"] for line in first if "probe_linear_top1" in line] == [4, 6]
    assert all(0 <= line["probe_knn_top1"] <= 100 for line in first if "probe_knn_top1" in line)

    # From step 3 on again, without the probe after step 4.
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    flags += ["--probe_steps", "100", "--resume_from_checkpoint", "latest", "--output_dir", tmp_path / "run"]
    process = run_here("run_pretraining.py", *flags)
    assert process.returncode == 0, process.stderr
    second = metrics(tmp_path / "run")
    assert [[line[name] for name in LEARNED] for line in second] == [
        [line[name] for name in LEARNED] for line in first
    ]
    assert [line["step"] for line in second if "probe_knn_top1" in line] == [6]
    for name in ("probe_knn_top1", "probe_linear_top1"):
        assert second[-1][name] == first[-1][name]
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert all(resumed[name].equal(value) for name, value in weights.items())
