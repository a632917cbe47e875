"""`run_pretraining.py` as users run it: what it leaves, resuming, two processes, and how it fails."""

import json
import time

import pytest
import torch
from demo_data import write_demo_data
from launching import TWO_PROCESSES, Forked, run, run_here
from pictures import drawn
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, AutoVideoProcessor

import vicmae_hf  # noqa: F401


# Dropout and stochastic depth make a resumed run differ unless all random numbers are the same.
SETTINGS = """
config_overrides:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  intermediate_size: 64
  patch_size: 8
  decoder_hidden_size: 16
  decoder_num_hidden_layers: 1
  decoder_num_attention_heads: 2
  decoder_intermediate_size: 32
  hidden_dropout_prob: 0.1
  drop_path_rate: 0.2
image_size: [32, 48]
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
num_train_epochs: 4
base_learning_rate: 0.05
warmup_epochs: 1
contrastive_start_epoch: 2
checkpointing_steps: 5
save_total_limit: 2
logging_steps: 1
dataloader_num_workers: 1
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "demo"
    write_demo_data(folder, appearance_videos=(3, 1), motion_videos=(1, 1), images=(2, 1), num_workers=1)
    (folder / "appearance" / "train" / "broken.mp4").write_bytes(b"no video" * 100)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(f"train_data: [{data}/appearance/train, {data}/images/train]\n{SETTINGS}")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings):
    """Output folder and process of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with drawn():
        return folder, run_here("run_pretraining.py", settings, "--output_dir", folder, "--report_to", "tensorboard")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder):
    return [
        {name: line[name] for name in ("step", "loss", "reconstruction_loss", "contrastive_loss", "learning_rate")}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def test_a_run_leaves_what_the_contract_lists(finished, data):
    folder, process = finished
    assert process.returncode == 0, process.stderr
    # 25 videos and 16 images, one of them broken, in updates of 8.
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-15", "checkpoint-20"]
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert [line["epoch"] for line in metrics[4::5]] == [1, 2, 3, 4]
    peak = 0.05 * 8 / 256
    assert [line["learning_rate"] for line in metrics[:7]] == pytest.approx(
        [0, peak / 5, peak * 2 / 5, peak * 3 / 5, peak * 4 / 5, peak, peak * 0.9891], rel=1e-3
    )
    for line in metrics:
        weight = 0 if line["step"] <= 10 else 0.025
        expected = line["reconstruction_loss"] + weight * line["contrastive_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        assert line["pairs_per_second"] > 0
        assert 0 <= line["data_wait_share"] <= 1
    results = json.loads((folder / "all_results.json").read_text())
    assert results["num_steps"] == 20
    assert results["num_train_files"] == 41
    assert results["num_failed"] == 1
    arguments = json.loads((folder / "arguments.json").read_text())
    assert arguments["total_batch_size"] == 8
    assert arguments["learning_rate"] == pytest.approx(peak)
    assert arguments["model"]["image_size"] == [32, 48]
    bad_files = read_lines(folder / "bad_files.jsonl")
    assert [entry["path"] for entry in bad_files] == [str(data / "appearance" / "train" / "broken.mp4")]
    assert bad_files[0]["error"]
    card = (folder / "README.md").read_text()
    for name in ["losses.png", "reconstructions.png", "neighbours.png", "attention.png", "features.webp"]:
        with Image.open(folder / "plots" / name) as picture:
            assert min(picture.size) > 100
        assert f"(plots/{name})" in card
    assert card.startswith("---\n")
    assert "library_name: transformers" in card
    assert list(folder.glob("**/events.out.tfevents*"))
    assert str(folder) in process.stdout


def test_what_a_run_leaves_opens_as_everything(finished):
    folder, _ = finished
    for auto_class, path, expected in [
        (AutoModelForPreTraining, folder, "ViCMAEForPreTraining"),
        (AutoModel, folder, "ViCMAEModel"),
        (AutoModelForPreTraining, folder / "checkpoint-20", "ViCMAEForPreTraining"),
    ]:
        model, info = auto_class.from_pretrained(path, output_loading_info=True)
        assert type(model).__name__ == expected
        assert not any(info.values()), info
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor(torch.zeros(3, 50, 60, dtype=torch.uint8), return_tensors="pt").pixel_values.shape == (
        *(1, 3, 32, 48),
    )
    assert type(AutoVideoProcessor.from_pretrained(folder)).__name__ == "ViCMAEVideoProcessor"


def test_a_killed_run_goes_on_exactly_where_it_was(finished, settings, tmp_path):
    folder = tmp_path / "killed"
    killed = Forked("run_pretraining.py", settings, "--output_dir", folder)
    while not (folder / "checkpoint-5").exists():
        assert killed.is_running()
        time.sleep(0.005)
    # In the middle of a later update.
    killed.kill()
    assert not (folder / "model.safetensors").exists()
    # As a kill in the middle of writing and of removing a checkpoint leaves them.
    (folder / ".partial-checkpoint-10").mkdir(exist_ok=True)
    (folder / ".partial-checkpoint-10" / "model.safetensors").write_bytes(b"half")

    resumed = run_here("run_pretraining.py", settings, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr
    assert "INFO: Resuming from step" in resumed.stderr
    assert losses(folder) == losses(finished[0])
    for name in ["model.safetensors", "checkpoint-20/model.safetensors"]:
        expected, found = load_file(finished[0] / name), load_file(folder / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), key
    assert not list(folder.glob(".partial*"))


def test_two_processes_train_together(settings, tmp_path):
    process = run("run_pretraining.py", settings, "--output_dir", tmp_path / "two", launcher=TWO_PROCESSES)
    assert process.returncode == 0, process.stderr
    assert "deprecated" not in process.stderr
    arguments = json.loads((tmp_path / "two" / "arguments.json").read_text())
    assert arguments["num_processes"] == 2
    assert arguments["total_batch_size"] == 16
    metrics = losses(tmp_path / "two")
    # 41 files in updates of 16.
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert all(line["loss"] > 0 for line in metrics)
    assert len(read_lines(tmp_path / "two" / "bad_files.jsonl")) == 1
    # A checkpoint of two processes opens in one, and does not pretend to go on with half of the batch.
    tensors = load_file(tmp_path / "two" / "checkpoint-8" / "model.safetensors")
    assert not any(name.startswith("module.") for name in tensors)
    alone = run_here(
        *["run_pretraining.py", settings, "--output_dir", tmp_path / "one"],
        *["--resume_from_checkpoint", tmp_path / "two" / "checkpoint-8"],
    )
    assert alone.returncode == 1
    assert "total_batch_size was 16, is 8" in error_line(alone)


def error_line(process):
    """The one line on stderr that says what is wrong; there is no traceback beside it."""
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.stderr
    assert "Traceback" not in process.stderr
    return lines[0]


def test_a_loss_that_is_not_finite_stops_before_the_update(settings, tmp_path):
    process = run_here(
        *["run_pretraining.py", settings, "--output_dir", tmp_path / "run", "--base_learning_rate", "1e38"],
        *["--checkpointing_steps", "1", "--save_total_limit", "1"],
    )
    assert process.returncode == 1
    message = error_line(process)
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert f"not finite at step {last + 1}" in message
    assert f"checkpoint-{last}" in message
    assert (tmp_path / "run" / f"checkpoint-{last}" / "training_state.json").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "missing: no such"),
        (lambda folder: folder.mkdir(), "no videos"),
        (
            lambda folder: (folder.mkdir(), [(folder / f"{i}.mp4").write_bytes(b"x" * 99) for i in range(4)]),
            "2 of 4 files",
        ),
    ],
    ids=["missing", "empty", "unreadable"],
)
def test_wrong_data_is_one_line(settings, tmp_path, make, message):
    make(tmp_path / "missing")
    process = run_here(
        "run_pretraining.py", settings, "--train_data", tmp_path / "missing", "--output_dir", tmp_path / "run"
    )
    assert process.returncode == 1
    assert message in error_line(process)


def test_a_finished_run_has_nothing_left_to_do(finished, settings):
    results = (finished[0] / "all_results.json").read_text()
    process = run_here(
        "run_pretraining.py", settings, "--output_dir", finished[0], "--resume_from_checkpoint", "latest"
    )
    assert process.returncode == 0, process.stderr
    assert "INFO: Nothing to do: " in process.stderr and "is at step 20 of 20" in process.stderr
    assert (finished[0] / "all_results.json").read_text() == results


def test_a_finished_run_is_not_replaced_silently(finished, settings):
    process = run_here("run_pretraining.py", settings, "--output_dir", finished[0])
    assert process.returncode == 1
    assert "already holds a run" in error_line(process)
