"""The commands as functions: a whole project in one process, as in a notebook."""

import io
import json
import logging
import os
import signal
from contextlib import redirect_stderr
from unittest import mock

import pyarrow.parquet
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny_models import tiny_overrides

import vicmae_hf
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.probes import balanced_subset
from vicmae_hf.settings import ArgumentsError
from vicmae_hf.training.reporting import MetricsLog
from vicmae_hf.training.session.calling import as_before, speaking
from vicmae_hf.training.stopping import RunStopped


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Dark and bright pictures, told apart by their class."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, level in [("dark", 40), ("bright", 210)]:
        (folder / name).mkdir()
        for index in range(8):
            Image.new("RGB", (40, 32), (level, level, level + index)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def pretrained(labelled, tmp_path_factory):
    """Output folder and results of a pretraining; what a process computes with, before and after."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("medium")
    results = vicmae_hf.pretrain(
        labelled,
        output_dir=folder,
        config_overrides=tiny_overrides(),
        image_size=32,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        warmup_epochs=1,
        contrastive_start_epoch=1,
        dataloader_num_workers=0,
        mixed_precision="bf16",
    )
    after = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    return folder, results, (3, "medium"), after


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_call_leaves_the_process_as_it_was(pretrained):
    *_, before, after = pretrained
    assert before == after


def test_precision_that_was_set_for_one_backend_comes_back():
    precision = torch.get_float32_matmul_precision()
    with as_before():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with as_before():
            torch.set_float32_matmul_precision("highest")
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.get_float32_matmul_precision() == precision


def test_a_call_says_what_a_command_says():
    logger = logging.getLogger("vicmae_hf")
    with mock.patch.object(logging.getLogger(), "handlers", []), redirect_stderr(io.StringIO()) as stderr:
        with speaking():
            logging.getLogger("vicmae_hf.pretraining").info("settings")
        logging.getLogger("vicmae_hf.pretraining").info("no call any more")
        logger.setLevel(logging.WARNING)
        with speaking():
            logging.getLogger("vicmae_hf.pretraining").info("not wanted")
        logger.setLevel(logging.NOTSET)
    assert stderr.getvalue() == "INFO: settings\n"
    assert logger.handlers == []


def test_a_pretraining_returns_its_results_and_leaves_the_folder(pretrained, labelled):
    folder, results, *_ = pretrained
    assert results == read_json(folder / "all_results.json")
    assert (results["num_steps"], results["num_train_files"]) == (12, 16)
    arguments = read_json(folder / "arguments.json")
    assert (arguments["train_data"], arguments["image_size"]) == ([str(labelled)], [32])
    with FileLock(folder / ".lock", timeout=0):
        pass


def test_what_a_script_says_in_one_line_is_raised(pretrained, labelled):
    folder = pretrained[0]
    with pytest.raises(ArgumentsError, match="unknown setting 'num_epochs'"):
        vicmae_hf.pretrain(labelled, output_dir="out", num_epochs=3)
    with pytest.raises(ArgumentsError, match="already holds a run"):
        vicmae_hf.pretrain(labelled, output_dir=folder)
    with pytest.raises(InputError, match="no_folder: no such folder"):
        vicmae_hf.extract_features("no_folder", model_name_or_path=folder, output="features.parquet")


def test_a_run_that_is_stopped_says_how_to_go_on(pretrained, labelled, tmp_path):
    settings = read_json(pretrained[0] / "arguments.json")
    changed = {"output_dir": tmp_path, "num_train_epochs": 4}
    settings = {name: settings[name] for name in ("config_overrides", "image_size", "warmup_epochs")} | changed
    settings |= {"contrastive_start_epoch": 1, "per_device_train_batch_size": 4, "dataloader_num_workers": 0}
    track = MetricsLog.track

    def interrupt(log, values, step):
        track(log, values, step)
        if step == 10:  # a second signal would end the process
            os.kill(os.getpid(), signal.SIGINT)

    message = r'SIGINT after update 11 of 16. Resume with resume_from_checkpoint="latest"'
    with mock.patch.object(MetricsLog, "track", interrupt), pytest.raises(RunStopped, match=message):
        vicmae_hf.pretrain(labelled, **settings)
    results = vicmae_hf.pretrain(labelled, **settings, resume_from_checkpoint="latest")
    assert results["num_steps"] == 16


def test_a_whole_project_in_one_process(pretrained, labelled, tmp_path):
    pretrained = pretrained[0]
    trained = vicmae_hf.finetune(
        labelled,
        eval_data=labelled,
        task="image",
        output_dir=tmp_path / "classifier",
        model_name_or_path=pretrained,
        num_train_epochs=2,
        warmup_epochs=0,
        per_device_train_batch_size=4,
        dataloader_num_workers=0,
    )
    assert trained == read_json(tmp_path / "classifier" / "all_results.json")
    evaluated = vicmae_hf.evaluate(
        labelled,
        model_name_or_path=tmp_path / "classifier",
        output_dir=tmp_path / "evaluation",
        dataloader_num_workers=0,
    )
    assert evaluated == read_json(tmp_path / "evaluation" / "all_results.json")
    assert evaluated["eval_top1"] == pytest.approx(trained["eval_top1"])
    features = vicmae_hf.extract_features(
        labelled, model_name_or_path=pretrained, output=tmp_path / "features.parquet", dataloader_num_workers=0
    )
    table = pyarrow.parquet.read_table(tmp_path / "features.parquet")
    assert features["files"] == table["file"].to_pylist() and len(features["files"]) == 16
    torch.testing.assert_close(features["embeddings"], torch.tensor(table["embedding"].to_pylist()))
    assert features["failures"] == []
    pictures = {"eval_data": labelled, "model_name_or_path": pretrained, "dataloader_num_workers": 0}
    probed = vicmae_hf.probe(labelled, output_dir=tmp_path / "probe", num_seeds=1, num_frames=1, **pictures)
    assert probed == read_json(tmp_path / "probe" / "all_results.json")
    # Votes of the nearest neighbours, computed again from the exported embeddings.
    vectors = torch.nn.functional.normalize(features["embeddings"], dim=-1)
    labels = torch.arange(16) // 8
    known = balanced_subset(labels, 0.8, 0)
    weights = ((vectors @ vectors[known].T) / 0.07).exp()  # all twelve vote, as they are fewer than twenty
    votes = torch.stack([weights[:, labels[known] == label].sum(1) for label in (0, 1)], dim=1)
    expected = 100 * (votes.argmax(1) == labels).double().mean().item()
    assert probed["eval_knn_top1"] == pytest.approx(expected)
