import re

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results

from vicmae_hf.reports.model_card import write_classification_card, write_pretraining_card


ARGUMENTS = {
    "train_data": ["someone/clips"],
    "hub_model_id": "someone/tiny",
    "model_name_or_path": None,
    "config_overrides": None,
    "total_batch_size": 8,
    "method": "finetune",
    "label_fraction": 0.1,
    "model": {"pooling": "mean", "mask_ratio": 0.75, "drop_path_rate": 0.1},
}
RESULTS = {"num_train_files": 90, "num_failed": 2, "eval_top1": 81.25, "eval_top5": 100.0, "num_eval_samples": 16}


@pytest.mark.parametrize("task", ["image", "video"])
def test_the_card_of_a_classifier_can_be_read_by_the_hub(task, tmp_path):
    figures = {"eval_top1": "top-1 accuracy", "eval_top5": "top-5 accuracy"}
    options = {"task": task, "dataset_name": "Clips, held out", "shown_figures": figures}
    write_classification_card(tmp_path, ARGUMENTS, RESULTS, **options)
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["license"] == "apache-2.0"
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == f"{task}-classification"
    assert metadata["datasets"] == ["someone/clips"]
    assert "base_model" not in metadata
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "someone/tiny"
    assert {(result.task_type, result.dataset_name, result.metric_type) for result in results} == {
        (f"{task}-classification", "Clips, held out", "accuracy")
    }
    assert {result.metric_name: result.metric_value for result in results} == {
        "Top-1 accuracy": 0.8125,
        "Top-5 accuracy": 1.0,
    }
    text = ModelCard.load(tmp_path / "README.md").text
    assert f'pipeline("{task}-classification", model="someone/tiny", trust_remote_code=True)' in text
    assert "pip install torch torchvision transformers av" in text
    assert "| eval_top1 | 81.25 |" in text
    assert "| label_fraction | 0.1 |" in text
    assert "16 samples of Clips, held out" in text
    assert "90 files, 2 unreadable" in text
    assert "config_overrides" not in text
    assert "## Limits" in text


def test_the_card_of_a_pretraining_shows_the_pictures_that_there_are(tmp_path):
    (tmp_path / "plots").mkdir()
    for name in ("losses.png", "attention.png", "other.png"):
        (tmp_path / "plots" / name).touch()
    write_pretraining_card(tmp_path, ARGUMENTS, RESULTS)
    text = ModelCard.load(tmp_path / "README.md").text
    assert re.findall(r"!\[.*", text) == ["![losses](plots/losses.png)", "![attention](plots/attention.png)"]


def test_the_licence_is_that_of_the_weights_a_run_started_from(tmp_path):
    base = tmp_path / "base"
    base.mkdir()

    def written_metadata(**changes):
        write_pretraining_card(tmp_path, {**ARGUMENTS, **changes}, RESULTS)
        return metadata_load(tmp_path / "README.md")

    # Weights without a card may be under any licence: those of ViC-MAE's authors are not free.
    assert written_metadata(model_name_or_path=str(base))["license"] == "unknown"
    ModelCard("---\nlicense: cc-by-nc-4.0\n---\n# Base").save(base / "README.md")
    metadata = written_metadata(model_name_or_path=str(base), train_data=[str(base)])
    assert metadata["license"] == "cc-by-nc-4.0"
    assert "base_model" not in metadata
    assert "datasets" not in metadata
