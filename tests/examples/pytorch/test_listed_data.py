"""Lists of files, as users give them to every script that reads data."""

import json

import pyarrow.parquet
import pytest
from launching import run_here
from video_files import numbered_frames, write_video

from vicmae_hf.data.sources.labelled import open_labelled


TINY = (
    "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=64,decoder_hidden_size=16,"
    "decoder_num_hidden_layers=1,decoder_num_attention_heads=2,decoder_intermediate_size=32,patch_size=8"
)
TRAINING = ["--image_size", 32, "--config_overrides", TINY, "--max_train_steps", 1, "--dataloader_num_workers", 0]
TRAINING += ["--per_device_train_batch_size", 4, "--warmup_epochs", 0]
PARTS = ["long 1.mp4 [0.0-1.0 s]", "long 1.mp4 [1.0-end s]", "b.mp4", "b.mp4 [0.5-1.5 s]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two videos, and beside them, in another folder, lists of them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("clips", "lists"):
        (folder / name).mkdir()
    for name in ("long 1.mp4", "b.mp4"):
        write_video(folder / "clips" / name, numbered_frames(30, 48, 64), fps=10)
    (folder / "lists" / "train.csv").write_text(
        "path,label,start,end\r\nlong 1.mp4,0,,1\r\nlong 1.mp4,1,1,\r\nb.mp4,1,,\r\nb.mp4,0,0.5,1.5\r\n", newline=""
    )
    (folder / "lists" / "eval.txt").write_text("long 1.mp4 1\nb.mp4 0\ngone.mp4 1\n")
    (folder / "lists" / "names.txt").write_text("wash\njump\n")
    return folder


def run_script(script, data, *flags):
    process = run_here(script, "--data_root", data / "clips", *flags)
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture(scope="module")
def pretrained(data):
    output = data / "pretrained"
    flags = ["--train_data", data / "lists" / "train.csv", "--output_dir", output, *TRAINING]
    run_script("run_pretraining.py", data, *flags, "--contrastive_start_epoch", 0)
    return output


def test_pretraining_on_parts_of_recordings(pretrained):
    assert json.loads((pretrained / "all_results.json").read_text())["num_train_files"] == 4


def test_finetuning_and_evaluation(data):
    output = data / "finetuned"
    flags = ["--task", "video", "--method", "finetune", "--train_data", data / "lists" / "train.csv"]
    flags += ["--eval_data", data / "lists" / "eval.txt", "--label_names", data / "lists" / "names.txt"]
    run_script("run_classification.py", data, *flags, "--output_dir", output, "--num_frames", 4, *TRAINING)
    assert json.loads((output / "config.json").read_text())["id2label"] == {"0": "wash", "1": "jump"}
    results = json.loads((output / "all_results.json").read_text())
    assert (results["num_eval_samples"], results["num_failed"]) == (2, 1)  # one is missing
    assert "gone.mp4" in (output / "bad_files.jsonl").read_text()
    flags = ["--model_name_or_path", output, "--data", data / "lists" / "eval.txt", "--dataloader_num_workers", 0]
    run_script("run_evaluation.py", data, *flags, "--output_dir", data / "evaluated")
    predictions = (data / "evaluated" / "predictions.csv").read_text()
    assert "b.mp4,wash" in predictions and "long 1.mp4,jump" in predictions


def test_features_with_and_without_labels(data, pretrained):
    flags = ["--model_name_or_path", pretrained, "--data", data / "lists" / "train.csv", "--dataloader_num_workers", 0]
    for labelled, names in [([], "0110"), (["--labelled", "--label_names", data / "lists" / "names.txt"], "wjjw")]:
        output = data / "features.parquet"
        run_script("export_features.py", data, *flags, *labelled, "--output", output, "--num_frames", 2)
        table = pyarrow.parquet.read_table(output)
        assert table["file"].to_pylist() == [f"{data}/clips/{part}" for part in PARTS]
        assert [name[0] for name in table["class"].to_pylist()] == list(names)


def test_a_packed_list(data):
    run_script("pack_frames.py", data, "--input", data / "lists" / "train.csv", "--output", data / "store")
    source = open_labelled(data / "store")
    labels = dict(zip(source.list_names(), source.labels.tolist(), strict=True))
    assert labels == dict(zip(PARTS, [0, 1, 1, 0], strict=True))
    durations = {name: source[index].duration.as_py() for index, name in enumerate(source.list_names())}
    assert durations == pytest.approx(dict(zip(PARTS, [1, 2, 3, 1], strict=True)))
