"""Models of unknown origin: nothing in them is run by any script that opens them."""

import importlib.util
import io
import json
import shutil
import sys

import pytest
from hostile_files import (
    assert_one_line,
    assert_was_not_run,
    hostile_code,
    load_pickle,
    load_torch_file,
    write_pickle,
    write_torch_file,
)
from runs import OPENING_A_MODEL, write_images
from tiny_models import tiny_config
from transformers import ViTMAEConfig

from vicmae_hf import ViCMAEForImageClassification
from vicmae_hf.convert_checkpoint import convert_checkpoint
from vicmae_hf.errors import InputError
from vicmae_hf.processors import build_processors


NO_CODE = "it needs code that comes with it, and such code is never run here"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A model that every script opens: classification, of images."""
    folder = tmp_path_factory.mktemp("classifier")
    labels = {"id2label": dict(enumerate("abc")), "label2id": {name: index for index, name in enumerate("abc")}}
    model = ViCMAEForImageClassification(tiny_config(**labels))
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture
def model(classifier, tmp_path):
    return shutil.copytree(classifier, tmp_path / "model")


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def import_file(path):
    spec = importlib.util.spec_from_file_location("hostile_module", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("script", OPENING_A_MODEL)
def test_a_harmless_model_is_opened(script, model, data, tmp_path):
    process = OPENING_A_MODEL[script](model, data, tmp_path / "out")
    # A classifier has no decoder, with which pretraining would start at random values.
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("script", OPENING_A_MODEL)
def test_weights_that_are_a_pickle(script, sharded, model, data, marker, tmp_path, monkeypatch):
    # A variable with which PyTorch trusts every file that it is not told to distrust.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    (model / "model.safetensors").unlink()
    weights = model / ("pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin")
    write_torch_file(weights, marker)
    if sharded:
        index = {"metadata": {}, "weight_map": {"weight": weights.name}}
        (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    process = OPENING_A_MODEL[script](model, data, tmp_path / "out")
    assert_one_line(process, model, "its weights (.bin) are refused", "posix.mkdir", "Nothing in them was run")
    assert_was_not_run(marker, lambda: load_torch_file(weights))


@pytest.mark.parametrize("script", OPENING_A_MODEL)
def test_a_pickle_with_the_name_of_safetensors(script, model, data, marker, tmp_path):
    write_pickle(model / "model.safetensors", marker)
    assert_one_line(OPENING_A_MODEL[script](model, data, tmp_path / "out"), model)
    assert_was_not_run(marker, lambda: load_pickle(model / "model.safetensors"))


@pytest.mark.parametrize("script", OPENING_A_MODEL)
def test_a_config_that_names_code_of_its_own(script, model, data, marker, tmp_path, monkeypatch):
    # Transformers would ask, and take the first line of what is piped into the script for the answer.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    (model / "hostile.py").write_text(hostile_code(marker))
    classes = ["AutoConfig", "AutoModel", "AutoModelForImageClassification"]
    change(model / "config.json", model_type="hostile", auto_map=dict.fromkeys(classes, "hostile.Hostile"))
    assert_one_line(OPENING_A_MODEL[script](model, data, tmp_path / "out"), model, NO_CODE)
    assert_was_not_run(marker, lambda: import_file(model / "hostile.py"))


@pytest.mark.parametrize("script", ["run_evaluation", "export_features", "run_linear_probe"])
def test_a_processor_that_names_code_of_its_own(script, model, data, marker, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    (model / "hostile.py").write_text(hostile_code(marker))
    auto_map = {"AutoImageProcessor": ["hostile.Hostile", "hostile.Hostile"]}
    change(model / "preprocessor_config.json", image_processor_type="Hostile", auto_map=auto_map)
    assert_one_line(OPENING_A_MODEL[script](model, data, tmp_path / "out"), model, NO_CODE)
    assert_was_not_run(marker, lambda: import_file(model / "hostile.py"))


@pytest.mark.parametrize("script", OPENING_A_MODEL)
def test_a_model_of_this_package_whose_code_was_replaced(script, model, data, marker, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    replaced = sorted(model.glob("*.py"))
    assert len(replaced) == 6
    for path in replaced:
        path.write_text(hostile_code(marker))
    process = OPENING_A_MODEL[script](model, data, tmp_path / "out")
    assert process.returncode == 0, process.stderr  # with the code of the package
    assert_was_not_run(marker, lambda: import_file(replaced[0]))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("script", ["run_evaluation", "export_features", "run_linear_probe"])
def test_a_pickle_with_the_name_of_a_config(script, name, model, data, marker, tmp_path):
    write_pickle(model / name, marker)
    assert_one_line(OPENING_A_MODEL[script](model, data, tmp_path / "out"), model)
    assert_was_not_run(marker, lambda: load_pickle(model / name))


@pytest.mark.parametrize("script", OPENING_A_MODEL)
def test_an_adapter_that_is_a_pickle(script, model, data, marker, tmp_path):
    # Transformers loads an adapter that lies beside a model.
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": "all-linear"}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    write_torch_file(model / "adapter_model.bin", marker)
    assert_one_line(OPENING_A_MODEL[script](model, data, tmp_path / "out"), model)
    assert_was_not_run(marker, lambda: load_torch_file(model / "adapter_model.bin"))


@pytest.mark.parametrize(
    "fields", [{"attn_implementation": "someone/kernel"}, {"quantization_config": {"quant_method": "quanto"}}]
)
@pytest.mark.parametrize("script", OPENING_A_MODEL)
def test_a_config_that_asks_for_other_packages(script, fields, model, data, tmp_path):
    change(model / "config.json", **fields)
    assert_one_line(OPENING_A_MODEL[script](model, data, tmp_path / "out"), model)


# Conversion


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "shard.bin", "config.json"])
def test_a_folder_to_convert(name, marker, tmp_path):
    folder = tmp_path / "mae"
    ViTMAEConfig().save_pretrained(folder)
    is_torch_file = name.endswith(".bin")
    (write_torch_file if is_torch_file else write_pickle)(folder / name, marker)
    if name == "shard.bin":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(InputError, match=f"mae/{name}: ") as error:
        convert_checkpoint(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert_was_not_run(marker, lambda: (load_torch_file if is_torch_file else load_pickle)(folder / name))


@pytest.mark.parametrize("weight_map", [None, ["weight"], {"weight": 3}])
def test_an_index_that_is_none(weight_map, tmp_path):
    ViTMAEConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"index\.json: expected weight_map"):
        convert_checkpoint(tmp_path, tmp_path / "out")
