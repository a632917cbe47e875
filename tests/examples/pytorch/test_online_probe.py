"""`run_pretraining.py --probe_data`: what is learned is the same with and without a probe, and after resuming."""

import json
import shutil

from demo_data import write_demo_data
from launching import run_here
from safetensors.torch import load_file


OVERRIDES = "patch_size=8,hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16"
OVERRIDES += ",decoder_hidden_size=8,decoder_num_hidden_layers=1,decoder_num_attention_heads=2"
OVERRIDES += ",decoder_intermediate_size=8,hidden_dropout_prob=0.1"
SETTINGS = ["--image_size", "32", "--config_overrides", OVERRIDES, "--per_device_train_batch_size", "8"]
SETTINGS += ["--max_train_steps", "6", "--logging_steps", "1", "--checkpointing_steps", "3", "--warmup_epochs", "0"]
SETTINGS += ["--contrastive_start_epoch", "0", "--dataloader_num_workers", "1"]
LEARNED = ["loss", "reconstruction_loss", "contrastive_loss", "learning_rate"]


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
