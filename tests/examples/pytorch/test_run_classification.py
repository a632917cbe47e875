"""`run_classification.py` as users run it: what it leaves, resuming, one process against two, the linear method."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from demo_data import write_demo_data
from huggingface_hub import ModelCard
from launching import Forked, run_here, run_together
from local_hub import hub_of_this_process, run_local_hub
from pictures import drawn
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForVideoClassification, AutoVideoProcessor, pipeline

import vicmae_hf  # noqa: F401
from vicmae_hf.classification.arguments import ClassificationArguments
from vicmae_hf.classification.classification import train_classifier
from vicmae_hf.classification.setup import build_classifier, open_sources
from vicmae_hf.command_line import parse_arguments
from vicmae_hf.errors import InputError
from vicmae_hf.training.session.session import start_session


MODEL = """
config_overrides:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  intermediate_size: 64
  patch_size: 8
  num_frames: 4
  hidden_dropout_prob: {dropout}
image_size: [32, 48]
"""
# Dropout, stochastic depth, mixup and cutmix make a resumed run differ unless all random numbers are the same.
FINETUNING = (
    MODEL.format(dropout=0.1)
    + """
task: video
method: finetune
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
num_train_epochs: 5
base_learning_rate: 0.1
warmup_epochs: 1
drop_path_rate: 0.2
cutmix: 1.0
random_erasing: 0.25
horizontal_flip: false
logging_steps: 1
checkpointing_steps: 2
save_total_limit: 2
dataloader_num_workers: 1
max_bad_files: 0.2
"""
)
WITHOUT_CHANCE = [
    *["--task", "video", "--mixup", "0", "--drop_path_rate", "0", "--num_train_epochs", "2", "--warmup_epochs", "0"],
    *["--base_learning_rate", "0.05", "--logging_steps", "1", "--dataloader_num_workers", "1"],
    *["--checkpointing_steps", "0"],
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Motion videos: 6 classes of 3 for training, of which one file is broken, and 7 + 1 broken held out."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    write_demo_data(folder, appearance_videos=(1, 1), motion_videos=(3, 2), images=(3, 1), num_workers=1)
    motion = folder / "motion"
    for path in sorted((motion / "eval").glob("*/001.mp4"))[1:]:
        path.unlink()
    (motion / "train" / "growing" / "000.mp4").write_bytes(b"no video" * 100)
    (motion / "eval" / "moving_left" / "broken.mp4").write_bytes(b"no video" * 100)
    return motion


@pytest.fixture(scope="module")
def settings(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(f"train_data: [{data}/train]\neval_data: {data}/eval\n{FINETUNING}")
    return path


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory, settings):
    """Output folder, process, and what reached the Hub, of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with run_local_hub() as hub, hub_of_this_process(hub.url), drawn():
        process = run_here("run_classification.py", settings, "--output_dir", folder, "--push_to_hub")
    return folder, process, hub.repositories


@pytest.fixture(scope="module")
def finished(uploaded):
    return uploaded[:2]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_results(folder):
    return json.loads((folder / "all_results.json").read_text())


def metrics_of(folder):
    names = ("step", "loss", "learning_rate", "eval_top1", "eval_top5")
    return [{name: line[name] for name in names if name in line} for line in read_lines(folder / "metrics.jsonl")]


def test_a_run_leaves_what_the_contract_lists(finished, data):
    folder, process = finished
    assert process.returncode == 0, process.stderr
    assert str(folder) in process.stdout
    # 18 videos in updates of 8: two an epoch.
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-10", "checkpoint-8"]
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 11))
    evaluations = {line["epoch"]: line for line in metrics if "eval_top1" in line}
    assert list(evaluations) == [1, 2, 3, 4, 5]
    peak = 0.1 * 8 / 256
    assert [line["learning_rate"] for line in metrics[:4]] == pytest.approx(
        [0, peak / 2, peak, peak * (1 + np.cos(np.pi / 8)) / 2]
    )
    results = read_results(folder)
    best = max(evaluations.values(), key=lambda line: line["eval_top1"])
    assert (results["eval_top1"], results["eval_top5"]) == (best["eval_top1"], best["eval_top5"])
    assert (results["best_epoch"], results["best_step"]) == (best["epoch"], best["step"])
    assert (results["num_eval_samples"], results["num_failed"]) == (7, 1)
    assert (results["num_train_files"], results["num_train_failed"]) == (18, 1)
    arguments = json.loads((folder / "arguments.json").read_text())
    assert arguments["num_frames"] == 4
    assert arguments["total_batch_size"] == 8
    assert (arguments["label_smoothing"], arguments["mixup"], arguments["rand_augment_magnitude"]) == (0.1, 0.8, 9.0)
    bad_files = {entry["path"] for entry in read_lines(folder / "bad_files.jsonl")}
    assert bad_files == {f"{data}/train/growing/000.mp4", f"{data}/eval/moving_left/broken.mp4"}
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {
        str(index): path.name for index, path in enumerate(sorted((data / "train").iterdir()))
    }
    assert config["architectures"] == ["ViCMAEForVideoClassification"]
    video_processor = json.loads((folder / "video_preprocessor_config.json").read_text())
    assert (video_processor["num_frames"], video_processor["fps"]) == (4, 7.5)
    for name in ["losses.png", "accuracies.png"]:
        with Image.open(folder / "plots" / name) as picture:
            assert min(picture.size) > 100


def test_the_upload_carries_the_measured_figures(uploaded):
    folder, _, repositories = uploaded
    expected = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(("checkpoint-", ".lock"))
    }
    assert repositories == {"someone/run": expected}
    assert expected.keys() >= {"model.safetensors", "video_preprocessor_config.json", "modeling_vicmae.py"}
    card = ModelCard.load(folder / "README.md")
    results = read_results(folder)
    measured = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert measured == {
        "Top-1 accuracy": pytest.approx(results["eval_top1"] / 100),
        "Top-5 accuracy": pytest.approx(results["eval_top5"] / 100),
    }
    assert card.data.pipeline_tag == "video-classification"
    assert "18 files, 1 unreadable" in card.text


def accuracy_by_hand(folder, eval_folder):
    """Top-1 in percent of a saved folder, opened by itself, on files read by its processor."""
    model = AutoModelForVideoClassification.from_pretrained(folder).eval()
    processor = AutoVideoProcessor.from_pretrained(folder)
    paths = [path for path in sorted(eval_folder.glob("*/*.mp4")) if path.name != "broken.mp4"]
    assert len(paths) == 7
    with torch.no_grad():
        predicted = [int(model(**processor(str(path), return_tensors="pt")).logits.argmax()) for path in paths]
    return 100 * np.mean(
        [model.config.id2label[label] == path.parent.name for label, path in zip(predicted, paths, strict=True)]
    )


def test_the_model_that_is_left_has_the_accuracy_that_is_reported(finished, data):
    assert accuracy_by_hand(finished[0], data / "eval") == pytest.approx(read_results(finished[0])["eval_top1"])


def test_a_pipeline_gives_what_the_model_gives(finished, data):
    folder, _ = finished
    path = data / "eval" / "growing" / "000.mp4"
    results = pipeline("video-classification", model=str(folder))(str(path), top_k=6)
    model = AutoModelForVideoClassification.from_pretrained(folder).eval()
    inputs = AutoVideoProcessor.from_pretrained(folder)(str(path), return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits.softmax(-1)[0]
    # Class indices follow sorted names.
    found = [entry["score"] for entry in sorted(results, key=lambda entry: entry["label"])]
    assert found == pytest.approx(probabilities.tolist(), abs=1e-6)


def test_a_killed_run_goes_on_exactly_where_it_was(finished, settings, tmp_path):
    folder = tmp_path / "killed"
    killed = Forked("run_classification.py", settings, "--output_dir", folder)
    while not (folder / "checkpoint-4").exists():
        assert killed.is_running()
        time.sleep(0.005)
    # In the middle of a later update.
    killed.kill()
    assert not (folder / "all_results.json").exists()
    # As a kill in the middle of writing leaves them.
    (folder / ".partial-best").mkdir(exist_ok=True)
    (folder / ".partial-best" / "model.safetensors").write_bytes(b"half")
    (folder / ".partial-config.json").write_bytes(b"half")
    (folder / "model.safetensors").write_bytes(b"of a later epoch that is trained again")

    resumed = run_here("run_classification.py", settings, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from step" in resumed.stderr
    assert metrics_of(folder) == metrics_of(finished[0])
    for name in ["eval_top1", "eval_top5", "best_epoch", "best_step", "num_failed", "num_train_failed"]:
        assert read_results(folder)[name] == read_results(finished[0])[name], name
    for name in ["model.safetensors", "checkpoint-10/model.safetensors", "checkpoint-10/best/model.safetensors"]:
        expected, found = load_file(finished[0] / name), load_file(folder / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), (name, key)
    assert not list(folder.glob(".partial*"))


def train_here(folder, *flags):
    """A run in this process; returns the content of `all_results.json`."""
    arguments = parse_arguments(ClassificationArguments, [*map(str, flags), "--output_dir", str(folder)])
    accelerator = start_session(arguments)
    train_source, eval_source = open_sources(arguments)
    model = build_classifier(arguments, train_source.class_names)
    return train_classifier(accelerator, model, train_source, eval_source, arguments)


@pytest.fixture(scope="module")
def sound(data, tmp_path_factory):
    """A settings file of a model without dropout, and the data flags of the readable files."""
    root = tmp_path_factory.mktemp("sound")
    for path in data.glob("*/*/0*.mp4"):
        if path.stat().st_size > 1000:
            target = root / path.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    (root / "model.yaml").write_text(MODEL.format(dropout=0.0))
    return [root / "model.yaml", "--train_data", root / "train", "--eval_data", root / "eval"]


METHODS = {
    "finetune": ["--method", "finetune"],
    "linear on kept features": ["--method", "linear", "--no-train_augmentation"],
}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_on_half_batches_are_one_on_whole_ones(sound, tmp_path, method):
    flags = [*sound, *WITHOUT_CHANCE, *METHODS[method]]
    process = run_together(
        *["run_classification.py", *flags, "--per_device_train_batch_size", "4", "--output_dir", tmp_path / "two"]
    )
    assert process.returncode == 0, process.stderr
    one = train_here(tmp_path / "one", *flags, "--per_device_train_batch_size", "8")
    assert json.loads((tmp_path / "two" / "arguments.json").read_text())["num_processes"] == 2
    # 7 samples divide between two processes with one left over.
    two = read_results(tmp_path / "two")
    assert two["num_eval_samples"] == one["num_eval_samples"] == 7
    assert (two["eval_top1"], two["eval_top5"]) == (one["eval_top1"], one["eval_top5"])
    together, alone = metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one")
    assert len(together) == len(alone) == 4
    for found, expected in zip(together, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        # A bias of the keys has no gradient but rounding errors, of which Adam makes whole steps.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(weights[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


def test_linear_with_random_crops_learns_and_leaves_the_encoder(data, tmp_path):
    images = data.parent / "images"
    (tmp_path / "model.yaml").write_text(MODEL.format(dropout=0.1))
    results = train_here(
        tmp_path / "run",
        *[tmp_path / "model.yaml", "--task", "image", "--method", "linear", "--per_device_train_batch_size", 12],
        *["--train_data", images / "train", "--eval_data", images / "train", "--base_learning_rate", 2],
        *["--num_train_epochs", 20, "--dataloader_num_workers", 0, "--warmup_epochs", 1, "--crop_scale", "0.5", "1"],
    )
    # Chance is 12.5 %.
    assert results["eval_top1"] > 30
    metrics = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    flags = ["--task", "image", "--method", "linear", "--train_data", "x", "--eval_data", "x", "--output_dir", "x"]
    arguments = parse_arguments(ClassificationArguments, [str(tmp_path / "model.yaml"), *flags])
    torch.manual_seed(0)
    untrained = build_classifier(arguments, [str(index) for index in range(8)])
    trained = load_file(tmp_path / "run" / "model.safetensors")
    assert trained.keys() == untrained.state_dict().keys()
    for name, tensor in untrained.state_dict().items():
        assert torch.equal(trained[name], tensor) != name.startswith("classifier."), name


@pytest.mark.slow  # three trainings
def test_a_linear_classifier_on_kept_features_goes_on_exactly(sound, tmp_path):
    flags = [*sound, *WITHOUT_CHANCE, *METHODS["linear on kept features"], "--num_train_epochs", "4"]
    flags += ["--base_learning_rate", "5", "--per_device_train_batch_size", "5", "--checkpointing_steps", "4"]
    whole = train_here(tmp_path / "whole", *flags)
    checkpoint = tmp_path / "resumed" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", checkpoint)
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "resumed")
    resumed = train_here(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")
    assert len(metrics_of(tmp_path / "whole")) == 12
    assert accuracy_by_hand(tmp_path / "whole", sound[-1]) == pytest.approx(whole["eval_top1"])
    for name in ["eval_top1", "eval_top5", "best_step", "loss"]:
        assert resumed[name] == whole[name], name
    for name in ["model.safetensors", "checkpoint-12/linear_classifier.safetensors"]:
        expected, found = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), (name, key)
    # Also where everything was done but the last words.
    (tmp_path / "resumed" / "all_results.json").unlink()
    (tmp_path / "resumed" / "model.safetensors").unlink()
    again = train_here(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert [again[name] for name in ("eval_top1", "best_step")] == [whole[name] for name in ("eval_top1", "best_step")]
    assert (tmp_path / "resumed" / "model.safetensors").exists()


def test_a_part_of_the_labels_is_listed(sound, tmp_path):
    results = train_here(
        *[tmp_path / "run", *sound, *WITHOUT_CHANCE, "--method", "linear", "--no-train_augmentation"],
        *["--label_fraction", "0.67", "--per_device_train_batch_size", "4"],
    )
    listed = (tmp_path / "run" / "train_files.txt").read_text().splitlines()
    # Two of three of each class (of the class with a broken file, one of two).
    assert len(listed) == len(set(listed)) == results["num_train_files"] == 11
    assert len({path.split("/")[-2] for path in listed}) == 6


def test_wrong_data_end_a_run_before_any_training(sound, tmp_path):
    with pytest.raises(InputError, match=r"label_fraction 0\.1 is less than one sample of class 'growing'"):
        train_here(tmp_path / "run", *sound, "--task", "video", "--method", "finetune", "--label_fraction", "0.1")
    assert list((tmp_path / "run").glob("[!.]*")) == []
