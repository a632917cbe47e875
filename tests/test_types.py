"""A user's program is checked by mypy with the package's types."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import vicmae_hf


PROGRAM = """
import torch

import vicmae_hf
from vicmae_hf import ViCMAEBackbone, ViCMAEConfig, ViCMAEForPreTraining, ViCMAEForVideoClassification, ViCMAEModel

config = ViCMAEConfig(hidden_size=16)
reveal_type(config.hidden_size)
reveal_type(ViCMAEModel(config)(torch.zeros(1, 3, 224, 224)).pooler_output)
reveal_type(ViCMAEForPreTraining(config)(torch.zeros(1, 2, 3, 224, 224)).loss)
reveal_type(ViCMAEForVideoClassification.from_pretrained("folder")(torch.zeros(1, 16, 3, 224, 224)).logits)
reveal_type(ViCMAEBackbone.from_pretrained("folder", out_indices=[1])(torch.zeros(1, 3, 224, 224)).feature_maps)
reveal_type(vicmae_hf.extract_features("videos", model_name_or_path="model", output="features.parquet"))
ViCMAEConfig(hidden_size="16")
vicmae_hf.extract_features("videos", model_name_or_path="model")
"""
REVEALED = [
    "int",
    "torch._tensor.Tensor | None",
    "torch._tensor.Tensor | None",
    "torch._tensor.Tensor | None",
    "tuple[torch._tensor.Tensor] | None",
    "dict[str, Any]",
]


def test_the_package_says_that_it_has_types():
    assert Path(vicmae_hf.__file__).with_name("py.typed").exists()


@pytest.mark.slow  # mypy reads the types of PyTorch and Transformers
@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_a_program_of_a_user_is_checked(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "program.py"]
    environment = os.environ | {"MYPYPATH": str(Path(vicmae_hf.__file__).parents[1])}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "(.*)"', process.stdout)
    assert revealed == REVEALED, process.stdout
    errors = re.findall(r"program.py:(\d+): error: .* \[(.*)\]", process.stdout)
    last = len(PROGRAM.splitlines())
    assert errors == [(str(last - 1), "arg-type"), (str(last), "call-arg")], process.stdout
