"""Saved folders: the code in them, shards, and their way to and from a local stand-in of the Hub, and those of frame
stores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import folder_worker
import hub_store_worker
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from launching import run_here
from local_hub import hub_of_this_process, run_local_hub
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import random_tensor, shake, tiny_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
)
from video_files import numbered_frames, read_numbers, write_video

import vicmae_hf
from vicmae_hf import (
    ViCMAEConfig,
    ViCMAEForImageClassification,
    ViCMAEForPreTraining,
    ViCMAEForVideoClassification,
    ViCMAEImageProcessor,
    ViCMAEImageProcessorPil,
    ViCMAEModel,
    ViCMAEVideoProcessor,
)
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.processors import build_processors


PACKAGE = Path(vicmae_hf.__file__).parent
TESTS = Path(__file__).parent
AUTO_MAP = {
    "AutoConfig": "configuration_vicmae.ViCMAEConfig",
    "AutoModel": "modeling_vicmae.ViCMAEModel",
    "AutoModelForPreTraining": "modeling_vicmae.ViCMAEForPreTraining",
    "AutoModelForImageClassification": "modeling_vicmae.ViCMAEForImageClassification",
    "AutoModelForVideoClassification": "modeling_vicmae.ViCMAEForVideoClassification",
    "AutoBackbone": "backbone_vicmae.ViCMAEBackbone",
}
MODEL_CODE = {"configuration_vicmae.py", "modeling_vicmae.py", "backbone_vicmae.py"}
PROCESSOR_CODE = {
    "image_processing_vicmae.py",
    "media_reading_vicmae.py",
    "video_processing_vicmae.py",
}


def save_whole(model, folder):
    """Model and processors, as the scripts leave them."""
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    torch.manual_seed(0)
    model = shake(ViCMAEForPreTraining(tiny_config(pooling="mean"))).eval()
    return save_whole(model, tmp_path_factory.mktemp("hub") / "pretrained")


def run_python(*arguments, **environment: str) -> str:
    """Runs Python in a new process and returns what it prints."""
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


# The code in a folder


@pytest.mark.parametrize(
    "model_class", [ViCMAEModel, ViCMAEForPreTraining, ViCMAEForImageClassification, ViCMAEForVideoClassification]
)
def test_every_model_carries_its_code(model_class, tmp_path):
    model_class(tiny_config()).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", *MODEL_CODE}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == [model_class.__name__]
    for name in MODEL_CODE:
        assert (tmp_path / name).read_bytes() == (PACKAGE / name).read_bytes()


@pytest.mark.parametrize(
    ("processor_class", "settings_file", "auto_map"),
    [
        *[
            (
                processor_class,
                "preprocessor_config.json",
                {
                    "AutoImageProcessor": [
                        "image_processing_vicmae.ViCMAEImageProcessorPil",
                        "image_processing_vicmae.ViCMAEImageProcessor",
                    ]
                },
            )
            for processor_class in (ViCMAEImageProcessor, ViCMAEImageProcessorPil)
        ],
        (
            ViCMAEVideoProcessor,
            "video_preprocessor_config.json",
            {"AutoVideoProcessor": "video_processing_vicmae.ViCMAEVideoProcessor"},
        ),
    ],
)
def test_every_processor_carries_its_code(processor_class, settings_file, auto_map, tmp_path):
    processor_class().save_pretrained(tmp_path)
    code = f"{processor_class.__module__.rpartition('.')[-1]}.py"
    assert {path.name for path in tmp_path.iterdir()} == {settings_file, code, "media_reading_vicmae.py"}
    assert json.loads((tmp_path / settings_file).read_text())["auto_map"] == auto_map
    assert (tmp_path / code).read_bytes() == (PACKAGE / code).read_bytes()


def test_with_the_package_the_folder_s_code_is_not_run(pretrained):
    for trust in ({}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(pretrained, **trust)) is ViCMAEConfig
        assert type(AutoModel.from_pretrained(pretrained, **trust)) is ViCMAEModel
        assert type(AutoModelForPreTraining.from_pretrained(pretrained, **trust)) is ViCMAEForPreTraining
        for auto_class, model_class in [
            (AutoModelForImageClassification, ViCMAEForImageClassification),
            (AutoModelForVideoClassification, ViCMAEForVideoClassification),
        ]:
            assert type(auto_class.from_pretrained(pretrained, **trust)) is model_class
        assert type(AutoImageProcessor.from_pretrained(pretrained, **trust)) is ViCMAEImageProcessor
        assert type(AutoVideoProcessor.from_pretrained(pretrained, **trust)) is ViCMAEVideoProcessor


def test_a_folder_opens_as_everything_without_the_package(pretrained):
    folders = pretrained.parent
    save_whole(shake(ViCMAEForImageClassification(tiny_config())), folders / "image-classification")
    save_whole(shake(ViCMAEForVideoClassification(tiny_config())), folders / "video-classification")
    frames = numbered_frames(12)
    write_video(folders / "video.mp4", frames)
    Image.fromarray(frames[3]).save(folders / "picture.png")
    inputs = {
        "images": random_tensor(2, 3, 16, 16),
        "clips": random_tensor(2, 4, 3, 16, 16, seed=1),
        "noise": random_tensor(2, 2, 16, seed=2),
        "picture": torch.from_numpy(frames[5]).permute(2, 0, 1).contiguous(),
    }
    save_file(inputs, folders / "inputs.safetensors")

    printed = run_python(TESTS / "folder_worker.py", folders, HF_MODULES_CACHE=str(folders / "modules"))
    assert printed.splitlines()[-1] == "[] transformers_modules"
    found, expected = load_file(folders / "outputs.safetensors"), folder_worker.compute(folders)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert tensor.abs().max() > 0, name

    # Loaded without the package and saved again: all is there, and opens with the package.
    assert {path.name for path in (folders / "again").iterdir()} == {path.name for path in pretrained.iterdir()}
    for path in pretrained.iterdir():
        assert (folders / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((folders / "encoder" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {path.name for path in (folders / "encoder").glob("*.py")} == MODEL_CODE
    encoder = AutoModel.from_pretrained(folders / "encoder").eval()
    with torch.no_grad():
        assert torch.equal(encoder(inputs["images"]).pooler_output, expected["image features"])


# Shards


def test_shards_load_and_are_fitted(pretrained, tmp_path):
    model = ViCMAEForPreTraining.from_pretrained(pretrained)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            stored |= dict.fromkeys(file.keys(), shard.name)
    assert index["weight_map"] == stored
    assert stored.keys() == model.state_dict().keys()
    # Nothing that is read by pickle.
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]

    loaded = ViCMAEForPreTraining.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # A frame encoder that becomes a video model, from shards as from one file.
    expected = ViCMAEForVideoClassification.from_pretrained(pretrained, image_size=24).vicmae.state_dict()
    found = ViCMAEForVideoClassification.from_pretrained(tmp_path, image_size=24).vicmae.state_dict()
    assert expected["embeddings.patch_embeddings.projection.weight"].ndim == 5
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# The Hub


def test_models_and_processors_go_to_the_hub_and_come_back(pretrained, tmp_path):
    push = """
import sys
from transformers import AutoImageProcessor, AutoVideoProcessor
from vicmae_hf import ViCMAEForPreTraining
model = ViCMAEForPreTraining.from_pretrained(sys.argv[1])
model.push_to_hub("tiny", max_shard_size="10KB")
for auto_class in (AutoImageProcessor, AutoVideoProcessor):
    auto_class.from_pretrained(sys.argv[1]).push_to_hub("tiny")
"""
    pull = """
import sys
sys.path.insert(0, sys.argv[1])
import folder_worker
sys.meta_path.insert(0, folder_worker.HiddenPackage())
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForPreTraining, AutoVideoProcessor
model = AutoModelForPreTraining.from_pretrained("someone/tiny", trust_remote_code=True)
save_file(model.state_dict(), sys.argv[2])
for auto_class in (AutoImageProcessor, AutoVideoProcessor):
    print(type(auto_class.from_pretrained("someone/tiny", trust_remote_code=True)).__name__)
"""
    with run_local_hub() as hub:
        environment = {**hub.environment(), "HF_HOME": str(tmp_path / "home")}
        run_python("-c", push, pretrained, **environment)
        arrived = hub.repositories["someone/tiny"]
        printed = run_python("-c", pull, TESTS, tmp_path / "arrived.safetensors", **environment)

    model = ViCMAEForPreTraining.from_pretrained(pretrained)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    for processor in build_processors(model.config):
        processor.save_pretrained(tmp_path / "sharded")
    assert arrived.pop("README.md")
    assert arrived == {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    assert len([name for name in arrived if name.endswith(".safetensors")]) > 2
    assert printed.split() == ["ViCMAEImageProcessor", "ViCMAEVideoProcessor"]
    loaded = load_file(tmp_path / "arrived.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.fixture
def training_settings(tmp_path):
    """A run of four images and two updates."""
    (tmp_path / "data").mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{seed}.png")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 8,
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 8,
    }
    settings = {
        "train_data": [str(tmp_path / "data")],
        "output_dir": str(tmp_path / "tiny-run"),
        "config_overrides": sizes,
        "image_size": 32,
        "per_device_train_batch_size": 4,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "contrastive_start_epoch": 0,
        "dataloader_num_workers": 0,
        "push_to_hub": True,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    return tmp_path / "settings.json"


def test_a_run_uploads_what_it_leaves_without_checkpoints(training_settings):
    with run_local_hub() as hub, hub_of_this_process(hub.url):
        process = run_here("run_pretraining.py", training_settings)
    assert process.returncode == 0, process.stderr
    folder = training_settings.parent / "tiny-run"
    assert (folder / "checkpoint-2" / "model.safetensors").exists()
    expected = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(("checkpoint-", ".lock"))
    }
    assert hub.repositories == {"someone/tiny-run": expected}
    expected_names = {"config.json", "model.safetensors", "README.md", "plots/losses.png", "arguments.json"}
    assert expected.keys() > expected_names | MODEL_CODE | PROCESSOR_CODE

    # The card that the Hub got.
    card = ModelCard.load(folder / "README.md")
    results = json.loads((folder / "all_results.json").read_text())
    assert card.data.license == "apache-2.0"
    assert card.data.model_name == "someone/tiny-run"
    assert card.data.pipeline_tag == "image-feature-extraction"
    figures = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in figures.items()} == {
        name: results[name] for name in ("loss", "reconstruction_loss", "contrastive_loss")
    }
    assert figures["loss"].dataset_split == "train"
    assert figures["loss"].dataset_name == str(training_settings.parent / "data")
    assert 'from_pretrained("someone/tiny-run", trust_remote_code=True)' in card.text
    assert "| total_batch_size | 4 |" in card.text
    assert "| mask_ratio | 0.75 |" in card.text
    assert "4 files, 0 unreadable" in card.text


# Frame stores


@pytest.mark.slow  # a server, and processes that read from it
def test_a_frame_store_goes_to_the_hub_and_is_streamed_and_opened_from_there(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    numbers_of_frames = {f"{'ab'[index % 2]}/{index}.mp4": 9 + index for index in range(7)}
    for name, count in numbers_of_frames.items():
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "videos" / name, numbered_frames(count, seed=count))
    settings = PackingSettings(frames_per_second=0, videos_per_shard=4)
    pack_frames(PackingInput.open(tmp_path / "videos", labelled=True), tmp_path / "store", settings)
    table = datasets.load_from_disk(tmp_path / "store")

    with run_local_hub() as hub:
        with hub_of_this_process(hub.url):
            table.push_to_hub("someone/store", num_shards=3)
        worker = [TESTS / "hub_store_worker.py", "someone/store", tmp_path]
        run_python(*worker, **hub.environment(), HF_HOME=str(tmp_path / "home"))
    arrived = hub.repositories["datasets/someone/store"]
    sizes = {path: len(data) for path, data in arrived.items() if path != "README.md"}
    assert sorted(sizes) == [f"data/train-0000{shard}-of-00003.parquet" for shard in range(3)]

    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["streamed"] == [
        {
            "frames": [frame["bytes"].hex() for frame in row["frames"]],
            "timestamps": row["timestamps"],
            "duration": row["duration"],
        }
        for row in table
    ]
    # The same stream from local files.
    (tmp_path / "parquet").mkdir()
    for shard in range(3):
        table.shard(3, shard).to_parquet(tmp_path / "parquet" / f"{shard}.parquet")
    pairs = load_file(tmp_path / "pairs.safetensors")["pairs"]
    assert torch.equal(pairs, hub_store_worker.stream_pairs(tmp_path / "parquet"))
    assert not torch.equal(pairs[:, 0], pairs[:, 1])
    # Only the description was kept.
    assert found["bytes cached by streaming"] < min(sizes.values()) / 10
    assert found["bytes cached by opening"] > sum(sizes.values())

    assert found["names"] == list(table["name"])
    assert found["labels"] == [name[0] for name in found["names"]]
    frames = load_file(tmp_path / "frames.safetensors")
    assert {name: read_numbers(rows) for name, rows in frames.items()} == {
        name: list(range(count)) for name, count in numbers_of_frames.items()
    }
