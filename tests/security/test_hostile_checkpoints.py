"""Runs of unknown origin that are gone on with: nothing in them is run, and the file is named."""

import shutil

import pytest
import torch
from accelerate import Accelerator
from hostile_files import (
    assert_one_line,
    assert_was_not_run,
    load_pickle,
    load_torch_file,
    write_pickle,
    write_torch_file,
)
from runs import FROM_NOTHING, classify, pretrain, write_images

from vicmae_hf.files import write_json
from vicmae_hf.training.checkpointing import CHECKSUMS_FILE, CheckpointError, Checkpoints, list_checksums


WRITERS = {"torch file": (write_torch_file, load_torch_file), "pickle": (write_pickle, load_pickle)}
OFTEN = ["--checkpointing_steps", 1, "--logging_steps", 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert pretrain(data, folder, *FROM_NOTHING, *OFTEN, steps=1).returncode == 0
    return folder


@pytest.fixture(scope="module")
def classified(data, pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classified") / "run"
    flags = ["--model_name_or_path", pretrained, *OFTEN]
    assert classify(data, folder, *flags, method="linear").returncode == 0
    return folder


def vouch_for(checkpoint):
    """Whoever makes a hostile checkpoint makes the checksums to it."""
    write_json(checkpoint / CHECKSUMS_FILE, {})
    checksums = list_checksums(checkpoint)
    del checksums[CHECKSUMS_FILE]
    write_json(checkpoint / CHECKSUMS_FILE, checksums)


def go_on(run, data, pretrained):
    """Goes on from the checkpoint of a copied run, for one more update."""
    flags = [*OFTEN, "--resume_from_checkpoint", run / "checkpoint-1"]
    if "best.json" in {path.name for path in (run / "checkpoint-1").iterdir()}:
        return classify(data, run, "--model_name_or_path", pretrained, *flags, steps=2, method="linear")
    return pretrain(data, run, *FROM_NOTHING, *flags, steps=2)


@pytest.mark.parametrize(
    ("origin", "name", "writer"),
    [
        ("pretrained", "optimizer.bin", "torch file"),
        ("pretrained", "model.safetensors", "pickle"),
        ("pretrained", "training_state.json", "pickle"),
        ("classified", "optimizer.bin", "pickle"),
        ("classified", "model.safetensors", "pickle"),
        ("classified", "linear_classifier.safetensors", "pickle"),
        ("classified", "best.json", "pickle"),
    ],
)
def test_a_checkpoint_that_would_run_code(origin, name, writer, data, pretrained, tmp_path, monkeypatch, request):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    run = shutil.copytree(request.getfixturevalue(origin), tmp_path / "run")
    path, marker = run / "checkpoint-1" / name, tmp_path / "marker"
    write, trust = WRITERS[writer]
    write(path, marker)
    vouch_for(path.parent)
    assert_one_line(go_on(run, data, pretrained), path)
    assert_was_not_run(marker, lambda: trust(path))


@pytest.mark.parametrize("writer", WRITERS)
def test_random_numbers_that_would_run_code(writer, data, pretrained, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    run = shutil.copytree(pretrained, tmp_path / "run")
    path, marker = run / "checkpoint-1" / "random_states_0.pkl", tmp_path / "marker"
    write, trust = WRITERS[writer]
    write(path, marker)
    vouch_for(path.parent)
    # Accelerate passes over them. The run does not need them: its samples have numbers of their own.
    process = go_on(run, data, pretrained)
    assert process.returncode == 0, process.stderr
    assert_was_not_run(marker, lambda: trust(path))


def test_checksums_that_are_a_pickle(data, pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run")
    path, marker = run / "checkpoint-1" / "checksums.json", tmp_path / "marker"
    write_pickle(path, marker)
    assert_one_line(go_on(run, data, pretrained), path.parent, path.name)
    assert_was_not_run(marker, lambda: load_pickle(path))


def test_a_gradient_scaler_that_would_run_code(tmp_path):
    accelerator = Accelerator(cpu=True)
    # As with --mixed_precision fp16 on a GPU.
    accelerator.scaler = torch.amp.GradScaler("cpu")
    model = torch.nn.Linear(2, 2)
    model.save_pretrained = lambda folder: None
    accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    checkpoints = Checkpoints(accelerator, tmp_path, None, {})
    checkpoints.save(1)
    path, marker = tmp_path / "checkpoint-1" / "scaler.pt", tmp_path / "marker"
    assert path.exists()
    write_torch_file(path, marker)
    with pytest.raises(CheckpointError, match=r"checkpoint-1/scaler\.pt is damaged, or holds things other"):
        checkpoints.load(path.parent)
    assert_was_not_run(marker, lambda: load_torch_file(path))


def test_an_optimizer_of_another_model(data, pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run")
    torch.save({"state": {}, "param_groups": [{"params": [0], "lr": 1.0}]}, run / "checkpoint-1" / "optimizer.bin")
    vouch_for(run / "checkpoint-1")
    process = go_on(run, data, pretrained)
    assert_one_line(process, run / "checkpoint-1", "does not fit this run", "parameter groups")


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_files.jsonl", "arguments.json", "all_results.json"])
def test_the_other_files_of_a_run(name, data, pretrained, tmp_path):
    run = shutil.copytree(pretrained, tmp_path / "run")
    marker = tmp_path / "marker"
    write_pickle(run / name, marker)
    content = (run / name).read_bytes()
    process = go_on(run, data, pretrained)
    assert process.returncode == 0, process.stderr  # they are written anew, or passed over
    (tmp_path / "kept").write_bytes(content)
    assert_was_not_run(marker, lambda: load_pickle(tmp_path / "kept"))
