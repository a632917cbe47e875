"""Classifiers to evaluate: their class names, and what is refused before anything runs."""

import json

import pytest
from saved_classifiers import save_classifier, views_for
from tiny_models import tiny_config

from vicmae_hf import ViCMAEForImageClassification, ViCMAEForPreTraining, ViCMAEForVideoClassification, ViCMAEModel
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.classifier_loading import check_fit, load_classifier


def test_a_model_without_class_names_needs_a_file_of_them(videos, tmp_path):
    ViCMAEForVideoClassification(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no class names .* Give them with --label_names"):
        load_classifier(str(tmp_path))
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\n")
    with pytest.raises(InputError, match=r"labels\.txt: names 2 classes, expected 3"):
        load_classifier(str(tmp_path), labels)


def test_class_names_of_a_file_take_the_place_of_the_models(videos, tmp_path):
    save_classifier(tmp_path)
    (tmp_path / "labels.txt").write_text("bee\nant\ncow\n")
    classifier = load_classifier(str(tmp_path), tmp_path / "labels.txt")
    assert views_for(classifier, videos).source.labels.tolist() == [1, 1, 1, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({0: "ant", 1: "ant", 2: "bee"}, "has 'ant' twice"),
        ({0: "ant", 1: "bee", 5: "cow"}, "no name for class 2"),
        (["ant", "bee", "cow"], "cannot be loaded"),
    ],
)
def test_class_names_must_be_complete_and_different(id2label, message, tmp_path):
    save_classifier(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": id2label}))
    with pytest.raises(InputError, match=message):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("model_class", [ViCMAEForPreTraining, ViCMAEModel])
def test_a_checkpoint_without_classifier_is_refused(model_class, tmp_path):
    model_class(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"expected a classifier .* got the architecture {model_class.__name__}"):
        load_classifier(str(tmp_path))


def test_missing_weights_are_not_made_up(tmp_path):
    save_classifier(tmp_path)
    ViCMAEModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"is not finetuned: 2 weights are missing, the first: classifier\.bias"):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("model_class", [ViCMAEForImageClassification, ViCMAEForVideoClassification])
def test_a_checkpoint_of_a_run_takes_the_processors_of_its_folder(model_class, tmp_path):
    model = save_classifier(tmp_path, fps=3, model_class=model_class)
    for place in ("checkpoint-3", "checkpoint-3/best"):
        model.save_pretrained(tmp_path / place)
        classifier = load_classifier(str(tmp_path / place))
        assert classifier.task == ("image" if model_class is ViCMAEForImageClassification else "video")
        assert classifier.frames_per_second == 3


# A name of two parts may be one on the Hub, which tests do not reach.
@pytest.mark.parametrize("name", ["/outputs/nothing-here", "outputs/nothing-here"])
def test_there_is_no_such_model(name):
    message = f"{name}: the model or its processor cannot be loaded: there is no such file or folder, and"
    with pytest.raises(InputError, match=message):
        load_classifier(name)


def test_a_file_of_weights_is_no_classifier(tmp_path):
    save_classifier(tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors: is a file; give the folder of a classifier"):
        load_classifier(str(tmp_path / "model.safetensors"))


def test_views_that_the_model_cannot_take_are_refused(videos, tmp_path):
    save_classifier(tmp_path)
    classifier = load_classifier(str(tmp_path))
    dataset = views_for(classifier, videos)
    dataset.num_frames = 3
    with pytest.raises(InputError, match=r"cannot take views of shape \(3, 3, 16, 16\): .*multiple of tubelet_size"):
        check_fit(classifier.model, dataset)
