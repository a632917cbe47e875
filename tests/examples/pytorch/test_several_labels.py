"""Data whose items have several labels each, through every script that reads labels."""

import csv
import json

import numpy as np
import pyarrow.parquet
import pytest
import torch
from launching import run_here
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_overrides
from transformers import AutoImageProcessor

from vicmae_hf import ViCMAEForImageClassification
from vicmae_hf.data.sources.labelled import open_labelled


CLASSES = ["red", "green", "blue"]
TINY = ["--config_overrides", tiny_overrides(), "--image_size", 16, "--dataloader_num_workers", 0]
TRAINING = [*TINY, "--task", "image", "--warmup_epochs", 0, "--per_device_train_batch_size", 8]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images that hold any of three colours, and lists of which."""
    folder = tmp_path_factory.mktemp("several")
    generator = np.random.default_rng(0)
    for split, count in [("train", 16), ("eval", 8)]:
        lines = []
        for number in range(count):
            has = [number >> channel & 1 for channel in range(3)]
            pixels = (generator.random((16, 16, 3)) * 60 + 190 * np.array(has)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}{number}.png")
            labels = [name for name, is_there in zip(CLASSES, has, strict=True) if is_there]
            lines.append({"path": f"{split}{number}.png", "label": labels})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(script, *flags):
    process = run_here(script, *flags)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def trained(data):
    output = data / "model"
    flags = ["--train_data", data / "train.jsonl", "--eval_data", data / "eval.jsonl", "--output_dir", output]
    flags += ["--method", "finetune", "--num_train_epochs", 30, "--base_learning_rate", 0.1, "--label_smoothing", 0]
    flags += ["--mixup", 0, "--rand_augment_magnitude", 0, "--eval_epochs", 10, "--drop_path_rate", 0]
    return output, run("run_classification.py", *flags, *TRAINING)


def test_finetuning(trained):
    output, stdout = trained
    config = json.loads((output / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["blue", "green", "red"]
    results = json.loads((output / "all_results.json").read_text())
    assert "eval_top1" not in results and results["eval_map"] > 90
    assert f"mean average precision {results['eval_map']:.2f} % of 8 held-out samples" in stdout
    assert "Mean average precision" in (output / "README.md").read_text()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("eval_map", 0) for line in lines) == results["eval_map"]
    assert (output / "plots" / "accuracies.png").exists()


def test_the_first_loss_is_binary_cross_entropy(data, tmp_path):
    """Of a classifier that gives 0 for all: log 2, whatever the targets; of one class of three it would be log 3."""
    flags = ["--train_data", data / "train.jsonl", "--eval_data", data / "eval.jsonl", "--output_dir", tmp_path]
    flags += ["--method", "linear", "--max_train_steps", 1, "--base_learning_rate", 0]
    run("run_classification.py", *flags, *TRAINING)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(np.log(2), abs=0.05)


def test_linear_on_kept_features_with_mixup_elsewhere(data, tmp_path):
    flags = ["--train_data", data / "train.jsonl", "--eval_data", data / "eval.jsonl", "--max_train_steps", 2]
    for name, options in {
        "features": ["--method", "linear", "--no-train_augmentation"],
        "mixed": ["--method", "finetune", "--mixup", 0.8, "--cutmix", 1],
    }.items():
        run("run_classification.py", *flags, *options, "--output_dir", tmp_path / name, *TRAINING)
        assert "eval_map" in json.loads((tmp_path / name / "all_results.json").read_text())


def test_evaluation(trained, data, tmp_path):
    model = trained[0]
    flags = ["--model_name_or_path", model, "--data", data / "eval.jsonl", "--dataloader_num_workers", 0]
    stdout = run("run_evaluation.py", *flags, "--output_dir", tmp_path / "eval")
    results = json.loads((tmp_path / "eval" / "all_results.json").read_text())
    assert results["eval_map"] == pytest.approx(json.loads((model / "all_results.json").read_text())["eval_map"])
    assert results["protocols"] == {"1x1": {"eval_map": results["eval_map"]}} and "mAP" in stdout
    assert "eval_top1_mean_over_classes" not in results and not (tmp_path / "eval" / "confusion.csv").exists()

    table = pyarrow.parquet.read_table(tmp_path / "eval" / "predictions.parquet")
    names = ["blue", "green", "red"]  # as the model has them
    expected = [sorted(c for bit, c in enumerate(CLASSES) if number >> bit & 1) for number in range(8)]
    assert table["class"].to_pylist() == expected
    assert [[names[index] for index in row] for row in table["label"].to_pylist()] == expected
    probabilities = np.array(table["probabilities_1x1"].to_pylist())
    # Each by itself: the sigmoid of a logit, as the pipeline has it.
    classifier = ViCMAEForImageClassification.from_pretrained(model).eval()
    processor = AutoImageProcessor.from_pretrained(model)
    images = [Image.open(data / f"eval{number}.png") for number in range(8)]
    with torch.no_grad():
        logits = classifier(**processor(images, return_tensors="pt")).logits
    np.testing.assert_allclose(probabilities, logits.sigmoid().numpy(), atol=1e-5)

    rows = list(csv.DictReader((tmp_path / "eval" / "predictions.csv").open()))
    assert [row["file"] for row in rows] == [f"eval{number}.png" for number in range(8)]
    assert [row["classes"] for row in rows] == [" | ".join(labels) for labels in expected]
    assert [row["predicted"] for row in rows] == [
        " | ".join(name for name, value in zip(names, row, strict=True) if value >= 0.5) for row in probabilities
    ]
    rows = list(csv.DictReader((tmp_path / "eval" / "per_class.csv").open()))
    assert [row["num_videos"] for row in rows] == ["4", "4", "4"]
    assert np.mean([float(row["average_precision"]) for row in rows]) == pytest.approx(results["eval_map"])


def test_single_labels_for_a_model_of_several(trained, data, tmp_path):
    """They are lists of one."""
    (data / "single.txt").write_text("eval1.png red\neval2.png green\neval4.png blue\n")
    flags = ["--model_name_or_path", trained[0], "--data", data / "single.txt", "--dataloader_num_workers", 0]
    run("run_evaluation.py", *flags, "--output_dir", tmp_path / "eval")
    assert json.loads((tmp_path / "eval" / "all_results.json").read_text())["eval_map"] > 50


def test_a_store_and_features_keep_all_labels(trained, data):
    run("pack_frames.py", "--input", data / "train.jsonl", "--output", data / "store")
    packed, listed = open_labelled(data / "store"), open_labelled(data / "train.jsonl")
    labels = dict(zip(packed.list_names(), packed.labels.tolist(), strict=True))
    assert labels == dict(zip(listed.list_names(), listed.labels.tolist(), strict=True))
    assert packed.class_names == ["blue", "green", "red"]
    flags = ["--model_name_or_path", trained[0], "--data", data / "eval.jsonl", "--dataloader_num_workers", 0]
    run("export_features.py", *flags, "--output", data / "features.parquet", "--pooling", "frame")
    classes = pyarrow.parquet.read_table(data / "features.parquet")["class"].to_pylist()
    assert classes[:4] == [[], ["red"], ["green"], ["green", "red"]]
    run("export_features.py", *flags, "--output", data / "features.safetensors", "--pooling", "frame")
    labels = open_labelled(data / "eval.jsonl").labels.tolist()
    assert load_file(data / "features.safetensors")["labels"].tolist() == labels


def test_what_needs_one_label_of_each_item_says_so(trained, data, tmp_path):
    several = data / "train.jsonl"
    (data / "one.txt").write_text("train1.png red\ntrain2.png green\ntrain4.png blue\n")
    classify = ["run_classification.py", "--method", "finetune", "--output_dir", tmp_path / "out", *TRAINING]
    evaluate = ["run_evaluation.py", "--model_name_or_path", trained[0], "--data", several]
    one = [*classify, "--train_data", data / "one.txt", "--eval_data"]
    probe = ["run_linear_probe.py", "--model_name_or_path", trained[0], "--train_data", several]
    pretrain = ["run_pretraining.py", "--train_data", data, "--output_dir", tmp_path / "pre", *TINY]
    for flags, reason in [
        ([*classify, "--train_data", several, "--eval_data", several, "--label_fraction", 0.5], "--label_fraction"),
        ([*one, several], "the training data,"),
        ([*evaluate, "--output_dir", tmp_path / "eval", "--temporal_ablation"], "--temporal_ablation"),
        ([*probe, "--eval_data", several, "--output_dir", tmp_path / "probe"], "the probe"),
        ([*pretrain, "--probe_data", several, "--probe_steps", 1], "--probe_data"),
    ]:
        process = run_here(*flags)
        assert process.returncode == 1
        error = process.stderr.splitlines()[-1]
        assert "items may have several labels each" in error and f"{reason} needs one of each." in error
