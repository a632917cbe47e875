"""FSDP2, as accelerate's configuration chooses it: two CPU processes train as without it, and can be resumed."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import EXAMPLES, Forked, run, run_together
from local_hub import run_local_hub
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_overrides
from video_files import write_images

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.training.devices.sharding import prepare_sharding


# What `accelerate launch` sets for a configuration with FSDP2; the last two are its defaults.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder, 16)
    return folder


def flags(data, output_dir, *others):
    """Two updates an epoch on two processes. The learning rate is small, so that rounding stays rounding."""
    return [
        *("--train_data", data, "--output_dir", output_dir, "--image_size", 32),
        *("--config_overrides", tiny_overrides(drop_path_rate=0.1)),
        *("--num_train_epochs", 4, "--warmup_epochs", 1, "--contrastive_start_epoch", 2, "--base_learning_rate", 0.01),
        *("--dataloader_num_workers", 0, "--logging_steps", 1, "--checkpointing_steps", 4),
        *("--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, *others),
    ]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        [line[name] for name in ("loss", "reconstruction_loss", "contrastive_loss", "gradient_norm")] for line in lines
    ]


def cut(folder, copy):
    """Copies a run as if it had been killed after the fourth update."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoint-8")
    (copy / "all_results.json").unlink()
    return copy


@pytest.mark.slow
def test_fsdp2_trains_saves_and_resumes_as_without_it(data, tmp_path):
    def pretrain(folder, *others, is_divided, num_processes=2):
        environment = FSDP2 if is_divided else {}
        settings = flags(data, folder, *others)
        process = run_together("run_pretraining.py", *settings, num_processes=num_processes, **environment)
        assert process.returncode == 0, process.stderr
        # Its warning is a sign that FSDP2 was really there.
        assert ("FSDPViCMAEForPreTraining" in process.stderr) == is_divided
        return process

    plain, divided = tmp_path / "plain", tmp_path / "divided"
    pretrain(plain, is_divided=False)
    pretrain(divided, is_divided=True)
    assert len(losses(plain)) == 8
    np.testing.assert_allclose(losses(divided), losses(plain), rtol=1e-3)

    assert not list(divided.glob("*.index.json"))  # one file
    model = ViCMAEForPreTraining.from_pretrained(divided)
    assert model.config.architectures == ["ViCMAEForPreTraining"]
    expected = load_file(plain / "model.safetensors")
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        # Weights moved by about 1e-3. Adam enlarges rounding where a gradient is 0: of biases before batch norm.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert (divided / "plots" / "reconstructions.png").exists()

    resume = ("--resume_from_checkpoint", "latest")
    again = cut(divided, tmp_path / "again")
    assert "Resuming from step 4" in pretrain(again, *resume, is_divided=True).stderr
    assert losses(again) == losses(divided)
    files = [folder / "model.safetensors" for folder in (again, divided)]
    assert files[0].read_bytes() == files[1].read_bytes()
    # Its checkpoints are those of any run.
    without = cut(divided, tmp_path / "without")
    pretrain(without, *resume, is_divided=False)
    np.testing.assert_allclose(losses(without), losses(plain), rtol=1e-3)
    # Nor does it matter how many processes there are.
    alone, whole_batch = cut(divided, tmp_path / "alone"), ("--per_device_train_batch_size", 4)
    pretrain(alone, *resume, *whole_batch, is_divided=True, num_processes=1)
    np.testing.assert_allclose(losses(alone), losses(plain), rtol=1e-3)


@pytest.mark.slow
def test_the_configuration_file_trains_in_bf16_as_without_fsdp2_and_pushes_one_model(data, tmp_path, monkeypatch):
    plain, divided = tmp_path / "plain", tmp_path / "divided"
    length = ("--max_train_steps", 4)
    # Of the file's settings one does not suit this machine.
    configuration = EXAMPLES / "pytorch" / "accelerate_configs" / "fsdp2.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(configuration), "--num_processes", "2"]
    with run_local_hub() as hub, monkeypatch.context() as patch:
        for name, value in hub.environment().items():
            patch.setenv(name, value)
        settings = flags(data, divided, *length, "--push_to_hub", "--hub_model_id", "someone/divided")
        process = run("run_pretraining.py", *settings, launcher=launcher)
        assert process.returncode == 0, process.stderr
        pushed = hub.repositories["someone/divided"]
    assert "FSDPViCMAEForPreTraining" in process.stderr
    settings = json.loads((divided / "arguments.json").read_text())
    assert (settings["num_processes"], settings["mixed_precision"]) == (2, "bf16")
    process = run_together("run_pretraining.py", *flags(data, plain, *length, "--mixed_precision", "bf16"))
    assert process.returncode == 0, process.stderr
    # In float32 they differ by 4e-3. What is rounded to 8 bits is the same in both.
    np.testing.assert_allclose(losses(divided), losses(plain), rtol=1e-4)
    assert [name for name in pushed if name.endswith(".safetensors")] == ["model.safetensors"]
    (tmp_path / "pushed").mkdir()
    for name in ("model.safetensors", "config.json"):
        assert pushed[name] == (divided / name).read_bytes()
        (tmp_path / "pushed" / name).write_bytes(pushed[name])
    weights = ViCMAEForPreTraining.from_pretrained(tmp_path / "pushed").state_dict()
    for name, expected in load_file(plain / "model.safetensors").items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_layers_are_divided_too(data, tmp_path):
    # Without stochastic depth, whose layers would be programs of their own.
    settings = ("--config_overrides", tiny_overrides(), "--max_train_steps", 4)
    for name, others in {"plain": (), "compiled": ("--torch_compile",)}.items():
        settings_of_run = flags(data, tmp_path / name, *settings, *others)
        process = run_together("run_pretraining.py", *settings_of_run, **FSDP2)
        assert process.returncode == 0, process.stderr
        assert "FSDPViCMAEForPreTraining" in process.stderr
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), rtol=1e-3)


def test_a_divided_model_computes_under_autocast():
    """Accelerate leaves that out with FSDP2: a run in bf16 would be one in float32."""
    model = ViCMAEForPreTraining(tiny_config()).eval()
    pixels, noise = torch.rand(2, 2, 3, 16, 16), torch.rand(2, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(pixels, noise).loss.item()
    assert expected != model(pixels, noise).loss.item()
    prepare_sharding(SimpleNamespace(is_fsdp2=True, autocast=partial(torch.autocast, "cpu", torch.bfloat16)), model)
    assert model(pixels, noise).loss.item() == expected


@pytest.mark.parametrize(
    ("others", "environment", "reason"),
    [
        (["--contrast_across_accumulation"], {}, "--contrast_across_accumulation encodes past FSDP's forward pass"),
        (["--probe_data", "data"], {}, "--probe_data needs the whole encoder"),
        (["--mixed_precision", "fp16"], {}, "the gradient scaler of fp16"),
        ([], {"ACCELERATE_MIXED_PRECISION": "fp16"}, "the gradient scaler of fp16"),
        ([], {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "leave out dynamo_backend"),
        ([], {"FSDP_VERSION": "1"}, "fsdp_version is 1; set fsdp_version: 2"),
        ([], {"FSDP_OFFLOAD_PARAMS": "true"}, "set fsdp_offload_params: false"),
        ([], {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "give --gradient_checkpointing"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, others, environment, reason
):
    monkeypatch.chdir(tmp_path)
    # Neither data nor model is there: reading them would be another error.
    process = Forked("run_pretraining.py", *flags("no_data", "out", *others), **(FSDP2 | environment)).finish()
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: accelerate's configuration chooses FSDP: ") and reason in line
    assert list(tmp_path.iterdir()) == []
