"""Threads of the commands that run a trained model on a CPU."""

import pytest
import torch
from launching import run_here
from PIL import Image
from tiny_models import tiny_config
from torch.nn.modules.module import register_module_forward_pre_hook

from vicmae_hf import ViCMAEForImageClassification
from vicmae_hf.processors import build_processors
from vicmae_hf.training.devices import hardware


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """`model`, a classifier of the classes a and b, and `data`, three images of each."""
    root = tmp_path_factory.mktemp("threads")
    classes = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    model = ViCMAEForImageClassification(tiny_config(num_labels=2, **classes))
    model.save_pretrained(root / "model")
    for processor in build_processors(model.config):
        processor.save_pretrained(root / "model")
    for name in "ab":
        (root / "data" / name).mkdir(parents=True)
        for index in range(3):
            Image.effect_noise((20, 20), 20 * index).convert("RGB").save(root / "data" / name / f"{index}.png")
    return root


SCRIPTS = {
    "run_evaluation.py": ["--data", "data", "--output_dir", "out"],
    "export_features.py": ["--data", "data", "--output", "features.parquet"],
    "run_linear_probe.py": ["--train_data", "data", "--eval_data", "data", "--output_dir", "out"],
}


class Computed(Exception):
    """Raised in the place of a model's forward pass: the number of threads that it would take."""


def threads_of(script, *flags):
    def stop(module, inputs):
        raise Computed(torch.get_num_threads())

    hook = register_module_forward_pre_hook(stop)
    try:
        with pytest.raises(Computed) as computed:
            run_here(script, *flags)
    finally:
        hook.remove()
    return computed.value.args[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_launchers_one_thread_is_not_what_a_model_runs_with(script, files, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "are_threads_chosen", lambda: False)  # the tests' own variable is no choice
    monkeypatch.setattr(hardware, "usable_cores", lambda: 3)
    (tmp_path / "data").symlink_to(files / "data")
    monkeypatch.chdir(tmp_path)
    flags = [*SCRIPTS[script], "--model_name_or_path", files / "model", "--dataloader_num_workers", 0]
    assert threads_of(script, *flags) == 3
    assert threads_of(script, *flags, "--num_threads", 2) == 2
