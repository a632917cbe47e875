"""Files of an evaluation: tables and figures against NumPy, the hash of a list."""

import csv
import hashlib
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from pictures import drawn
from saved_classifiers import NAMES, save_classifier

from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.preparing.preparation import prepare_dataset
from vicmae_hf.data.samples.views import build_test_views
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.selection import list_media
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.prediction import Predictions, ViewPredictions
from vicmae_hf.evaluation.results import check_output_dir, write_evaluation
from vicmae_hf.evaluation.temporal_ablation import FrameOrders


@pytest.fixture(scope="module")
def evaluated(videos):
    """A dataset, and what was predicted for it."""
    source = open_labelled(videos)
    dataset = build_test_views(source, None, MediaLoader(), task="video", num_frames=4, frames_per_second=None)
    indices = torch.tensor([0, 1, 2, 3, 5, 6])
    probabilities = torch.tensor(
        [[0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6], [0.5, 0.3, 0.2]]
    )
    failure = {"path": source[4].name, "error": "broken"}
    predictions = Predictions(probabilities, torch.from_numpy(source.labels)[indices], indices, [failure])
    return dataset, ViewPredictions([predictions], None, num_clips=12, seconds=3.0)


def test_tables_and_figures_of_known_predictions(evaluated, tmp_path):
    dataset, outcome = evaluated
    with drawn():
        results = write_evaluation(tmp_path / "out", dataset, outcome, None, {"task": "video"})

    source, predictions = dataset.source, outcome.protocols[0]
    probabilities, indices, failure = predictions.probabilities, predictions.indices, predictions.failures[0]
    truth, taken = predictions.labels.numpy(), probabilities.numpy().argmax(1)
    assert truth.tolist() == [0, 0, 0, 1, 2, 2]
    assert results["eval_top1"] == pytest.approx(100 * np.mean(truth == taken))
    assert results["eval_top1_of_all"] == pytest.approx(100 * np.sum(truth == taken) / 7)
    shares = [np.mean(taken[truth == label] == label) for label in range(3)]
    assert results["eval_top1_mean_over_classes"] == pytest.approx(100 * np.mean(shares))
    assert (results["num_eval_samples"], results["num_failed"]) == (6, 1)
    assert results["protocols"] == {"1x1": {"eval_top1": results["eval_top1"], "eval_top5": 100.0}}
    assert (results["videos_per_second"], results["clips_per_second"]) == (7 / 3, 4)
    assert json.loads((tmp_path / "out" / "all_results.json").read_text()) == results
    assert json.loads((tmp_path / "out" / "bad_files.jsonl").read_text()) == failure

    confusion = list(csv.reader((tmp_path / "out" / "confusion.csv").open()))
    assert confusion[0][1:] == NAMES
    for row, column in itertools.product(range(3), repeat=2):
        assert int(confusion[row + 1][column + 1]) == np.sum((truth == row) & (taken == column))
    classes = list(csv.DictReader((tmp_path / "out" / "per_class.csv").open()))
    assert [float(row["top1"]) for row in classes] == pytest.approx([100 * share for share in shares])
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert [row["file"] for row in rows] == [source.list_names()[index] for index in indices.tolist()]
    assert [row["predicted"] for row in rows] == [NAMES[label] for label in taken]
    assert rows[0]["five_likeliest"] == "ant | bee | cow"
    table = pyarrow.parquet.read_table(tmp_path / "out" / "predictions.parquet")
    assert np.array_equal(np.stack(table["probabilities_1x1"].to_numpy()), probabilities.numpy())
    assert table["label"].to_pylist() == truth.tolist()
    assert (tmp_path / "out" / "plots" / "confusion.png").stat().st_size > 1000


@pytest.mark.parametrize("earlier", [False, True])
def test_pictures_of_a_stopped_evaluation_are_no_data(earlier, evaluated, videos, tmp_path, monkeypatch):
    out = tmp_path / "all" / "out"
    shutil.copytree(videos, tmp_path / "all" / "videos")
    if earlier:
        write_evaluation(out, *evaluated, None, {"task": "video"})

    def stop(path, failures):
        raise KeyboardInterrupt

    monkeypatch.setattr("vicmae_hf.evaluation.results.write_failures", stop)
    with pytest.raises(KeyboardInterrupt):
        write_evaluation(out, *evaluated, None, {"task": "video"})
    assert (out / "plots" / "confusion.png").exists()
    assert not (out / "all_results.json").exists()
    files, _ = list_media("all", tmp_path / "all")
    assert len(files) == 7 and all("/videos/" in file for file in files)


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_no_file_of_an_earlier_evaluation_is_left(is_multi_label, evaluated, tmp_path):
    dataset, outcome = evaluated
    reordered = torch.zeros(6, 3, 3, dtype=torch.int64)  # in one other order, and either frame twice
    write_evaluation(tmp_path / "out", dataset, replace(outcome, reordered=reordered), FrameOrders(2, 0), {})
    if is_multi_label:
        (predictions,) = outcome.protocols
        targets = torch.nn.functional.one_hot(predictions.labels, 3)
        outcome = replace(outcome, protocols=[replace(predictions, labels=targets)])
    for folder in ("out", "new"):
        write_evaluation(tmp_path / folder, dataset, outcome, None, {})
    left, expected = ({path.name for path in (tmp_path / folder).rglob("*")} for folder in ("out", "new"))
    assert left == expected


def test_the_hash_of_a_list_is_that_of_names_and_classes(videos, tmp_path):
    def hash_of(root):
        dataset = build_test_views(
            open_labelled(root), None, MediaLoader(), task="video", num_frames=4, frames_per_second=None
        )
        predictions = Predictions(torch.eye(3)[dataset.labels], torch.from_numpy(dataset.labels), torch.arange(7), [])
        outcome = ViewPredictions([predictions], None, num_clips=7, seconds=1.0)
        return write_evaluation(tmp_path / "out", dataset, outcome, None, {})["list_sha256"]

    lines = sorted(f"{path.parent.name}/{path.name}\t{path.parent.name}\n" for path in videos.rglob("*.mp4"))
    assert hash_of(videos) == hashlib.sha256("".join(lines).encode()).hexdigest()
    moved = tmp_path / "elsewhere"
    moved.symlink_to(videos)
    assert hash_of(moved) == hash_of(f"{videos}/")
    # Of a prepared table it is that of the names in the official list, and so it is of a store packed from it.
    report = prepare_dataset("folder", str(videos), tmp_path / "table")
    assert hash_of(tmp_path / "table") == report["list_sha256"]
    settings = PackingSettings(frames_per_second=1)
    pack_frames(PackingInput.open(str(tmp_path / "table")), tmp_path / "store", settings)
    assert hash_of(tmp_path / "store") == report["list_sha256"]


def test_an_evaluation_replaces_no_model(tmp_path):
    save_classifier(tmp_path)
    with pytest.raises(InputError, match="holds a model; choose another folder"):
        check_output_dir(tmp_path)
