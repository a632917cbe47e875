"""What a classifier is trained from: its classes, its data, its checkpoint, its processors."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from classifier_flags import make_files, parse
from PIL import Image
from tiny_models import shake, tiny_config
from transformers import VideoMAEConfig

from vicmae_hf import ViCMAEForPreTraining, ViCMAEForVideoClassification
from vicmae_hf.classification.setup import build_classifier, build_classifier_processors, open_sources
from vicmae_hf.errors import InputError
from vicmae_hf.settings import ArgumentsError


def finetuned(folder, class_names=("a", "b", "c"), model_class=ViCMAEForVideoClassification):
    config = tiny_config(num_labels=len(class_names))
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    model = shake(model_class(config))
    model.save_pretrained(folder)
    return model


def names(source):
    return [source.class_names[label] for label in source.labels]


def test_evaluation_data_use_the_classes_of_the_training_data(folders):
    train_source, eval_source = open_sources(parse(folders))
    assert train_source.class_names == eval_source.class_names == ["a", "b", "c"]
    assert eval_source.labels.tolist() == [0, 2]


def test_label_names_give_the_order(folders, tmp_path):
    (tmp_path / "names.txt").write_text("c\nunseen\nb\na\n")
    train_source, eval_source = open_sources(parse(folders, "--label_names", tmp_path / "names.txt"))
    assert train_source.labels.tolist() == [3] * 4 + [2] * 4 + [0] * 4
    assert eval_source.labels.tolist() == [3, 0]
    (tmp_path / "names.txt").write_text("c\na\n")
    with pytest.raises(InputError, match=r"train: 1 classes are unknown.*: b"):
        open_sources(parse(folders, "--label_names", tmp_path / "names.txt"))


def test_evaluation_data_of_a_class_that_training_lacks(folders, tmp_path):
    make_files(tmp_path / "eval", "d/0.mp4")
    with pytest.raises(InputError, match=r"eval: 1 classes are unknown.*: d"):
        open_sources(parse(folders))


def test_one_class_is_too_few(folders, tmp_path):
    make_files(tmp_path / "one", "a/0.mp4")
    with pytest.raises(InputError, match="at least 2 classes"):
        open_sources(parse([*folders, "--train_data", tmp_path / "one"]))


def test_a_fraction_that_leaves_out_a_class(folders):
    train_source, eval_source = open_sources(parse(folders, "--label_fraction", "0.5"))
    assert names(train_source) == ["a", "a", "b", "b", "c", "c"]
    assert len(eval_source) == 2
    with pytest.raises(InputError, match=r"label_fraction 0\.2 is less than one sample of class 'a', which has 4"):
        open_sources(parse(folders, "--label_fraction", "0.2"))


@pytest.mark.parametrize(("task", "file", "kind"), [("video", "b/0.png", "an image"), ("image", "b/0.mp4", "a video")])
def test_data_of_the_other_task(tmp_path, task, file, kind):
    suffix = {"video": "mp4", "image": "png"}[task]
    make_files(tmp_path / "train", f"a/0.{suffix}", f"b/1.{suffix}")
    make_files(tmp_path / "eval", f"a/0.{suffix}", file)
    flags = ["--train_data", tmp_path / "train", "--eval_data", tmp_path / "eval", "--output_dir", tmp_path / "out"]
    with pytest.raises(InputError, match=rf"eval: --task {task} classifies {task}s, but .*{file} is {kind}"):
        open_sources(parse(flags, task=task))


def test_stored_frames_are_told_apart_too(tmp_path):
    pixels = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(pixels, "PNG")
    frame = {"bytes": pixels.getvalue(), "path": None}
    for name, counts in [("clips", [3, 2]), ("images", [1, 1])]:
        columns = {
            "frames": [[frame] * count for count in counts],
            "timestamps": [list(np.arange(count) / 10) for count in counts],
            "duration": [count / 10 for count in counts],
            "label": [0, 1],
        }
        features = datasets.Features(
            {
                "frames": datasets.List(datasets.Image()),
                "timestamps": datasets.List(datasets.Value("float64")),
                "duration": datasets.Value("float64"),
                "label": datasets.ClassLabel(names=["a", "b"]),
            }
        )
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / name)

    def open_both(task, name):
        flags = ["--train_data", tmp_path / name, "--eval_data", tmp_path / name, "--output_dir", tmp_path / "out"]
        return open_sources(parse(flags, task=task))

    assert len(open_both("video", "clips")[0]) == len(open_both("image", "images")[0]) == 2
    with pytest.raises(InputError, match=r"--task image classifies images, but .*clips\[0\] is a video"):
        open_both("image", "clips")


@pytest.mark.parametrize(
    ("overrides", "hidden_size", "message"),
    [
        ("foo=1", 32, r"^--config_overrides: the config has no field 'foo'"),
        ("", "many", r"^--model_name_or_path .*model: .*'hidden_size' expected int, got str"),
    ],
)
def test_what_is_wrong_of_a_finetuned_model_is_named(folders, tmp_path, overrides, hidden_size, message):
    finetuned(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"hidden_size": hidden_size}))
    flags = ["--model_name_or_path", tmp_path / "model", "--config_overrides", overrides]
    with pytest.raises(ArgumentsError, match=message):
        open_sources(parse(folders, *flags))


def test_a_finetuned_model_goes_on_with_its_classes(folders, tmp_path):
    model = finetuned(tmp_path / "model", ["b", "c", "x", "a"])
    arguments = parse(folders, "--model_name_or_path", tmp_path / "model", "--num_frames", 4)
    train_source, eval_source = open_sources(arguments)
    assert train_source.class_names == ["b", "c", "x", "a"]
    assert (train_source.labels[0], eval_source.labels.tolist()) == (3, [3, 1])
    loaded = build_classifier(arguments, train_source.class_names)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_label_names_that_contradict_a_finetuned_model(folders, tmp_path):
    finetuned(tmp_path / "model", ["b", "c", "a"])
    flags = ["--model_name_or_path", tmp_path / "model", "--label_names", tmp_path / "names.txt"]
    (tmp_path / "names.txt").write_text("b\nc\na\n")
    assert open_sources(parse(folders, *flags))[0].class_names == ["b", "c", "a"]
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(InputError, match=r"--label_names: 4 names that differ from the 3 of the classifier"):
        open_sources(parse(folders, *flags))
    assert open_sources(parse(folders, *flags, "--new_classifier"))[0].class_names == ["a", "b", "c", "d"]


def test_a_finetuned_model_of_other_classes_needs_a_new_classifier(folders, tmp_path):
    model = finetuned(tmp_path / "model", ["a", "b", "x"])
    arguments = parse(folders, "--model_name_or_path", tmp_path / "model")
    with pytest.raises(InputError, match=r"unknown to the classifier of .*model: c\..*--new_classifier"):
        open_sources(arguments)
    arguments = parse(folders, "--model_name_or_path", tmp_path / "model", "--new_classifier")
    train_source, _ = open_sources(arguments)
    loaded = build_classifier(arguments, train_source.class_names)
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor) != name.startswith("classifier."), name
    assert (loaded.classifier.bias == 0).all()


def test_a_classifier_without_class_names_must_have_as_many(folders, tmp_path):
    finetuned(tmp_path / "model", ["LABEL_0", "LABEL_1"])
    arguments = parse(folders, "--model_name_or_path", tmp_path / "model")
    with pytest.raises(InputError, match=r"train: 3 classes, but the classifier of .*model has 2.*--new_classifier"):
        open_sources(arguments)
    finetuned(tmp_path / "model", ["LABEL_0", "LABEL_1", "LABEL_2"])
    train_source, _ = open_sources(arguments)
    assert build_classifier(arguments, train_source.class_names).config.id2label == {0: "a", 1: "b", 2: "c"}


def test_new_classifiers_of_another_size(folders, tmp_path):
    finetuned(tmp_path / "model", ["x", "y"])
    for flags in [{"method": "linear"}, {}]:
        extra = [] if flags else ["--new_classifier"]
        arguments = parse(folders, "--model_name_or_path", tmp_path / "model", *extra, **flags)
        train_source, _ = open_sources(arguments)
        assert build_classifier(arguments, train_source.class_names).classifier.out_features == 3


def test_a_pretrained_model_becomes_a_classifier(folders, tmp_path):
    pretrained = shake(ViCMAEForPreTraining(tiny_config()))
    pretrained.save_pretrained(tmp_path / "model")
    arguments = parse(folders, "--model_name_or_path", tmp_path / "model", "--num_frames", 8, "--drop_path_rate", 0.2)
    model = build_classifier(arguments, open_sources(arguments)[0].class_names)
    weight = pretrained.vicmae.embeddings.patch_embeddings.projection.weight
    inflated = model.vicmae.embeddings.patch_embeddings.projection.weight
    torch.testing.assert_close(inflated, weight[:, :, None].expand_as(inflated) / 2)
    assert torch.equal(model.vicmae.layers[1].mlp.fc1.weight, pretrained.vicmae.layers[1].mlp.fc1.weight)
    assert (model.config.num_frames, model.config.drop_path_rate) == (8, 0.2)
    assert model.vicmae.layers[1].drop_path.drop_path_rate == 0.2
    assert model.vicmae.embeddings.temporal_position_embeddings.shape[1] == 4


def test_a_checkpoint_that_does_not_fit_the_settings(folders, tmp_path):
    ViCMAEForPreTraining(tiny_config()).save_pretrained(tmp_path / "model")
    flags = ["--model_name_or_path", tmp_path / "model", "--config_overrides", "intermediate_size=32"]
    with pytest.raises(ArgumentsError, match=r"mlp.* has shape \[24.* there, but \[32"):
        build_classifier(parse(folders, *flags), ["a", "b"])
    with pytest.raises(ArgumentsError, match="num_frames must be a multiple of tubelet_size=2, got 5"):
        build_classifier(parse(folders, "--model_name_or_path", tmp_path / "model", "--num_frames", 5), ["a", "b"])
    with pytest.raises(ArgumentsError, match="nowhere"):
        open_sources(parse(folders, "--model_name_or_path", tmp_path / "nowhere"))


@pytest.mark.parametrize(("flag", "fps"), [("7.5", 7.5), ("0", None)])
def test_the_video_processor_samples_as_the_model_is_trained(folders, tmp_path, flag, fps):
    arguments = parse(folders, "--frames_per_second", flag)
    _, video_processor = build_classifier_processors(tiny_config(num_frames=6), arguments)
    assert (video_processor.do_sample_frames, video_processor.num_frames, video_processor.fps) == (True, 6, fps)


def test_a_checkpoint_of_another_model_is_refused(folders, tmp_path):
    VideoMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path / "other")
    arguments = parse(folders, "--model_name_or_path", tmp_path / "other", "--new_classifier")
    with pytest.raises(ArgumentsError, match="expected a checkpoint of vicmae, MAE or ViTMAE, got one of videomae"):
        build_classifier(arguments, ["a", "b", "c"])


def test_a_checkpoint_without_its_encoder_is_refused(folders, tmp_path):
    model = ViCMAEForPreTraining(tiny_config())
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=weights)
    arguments = parse(folders, "--model_name_or_path", tmp_path / "part")
    with pytest.raises(
        ArgumentsError, match=r"lacks 4 weights of the encoder, the first: vicmae\.layers\.1\.mlp\.fc1"
    ):
        build_classifier(arguments, ["a", "b", "c"])


def test_half_precision_checkpoints_are_trained_in_float32(folders, tmp_path):
    model = finetuned(tmp_path / "half")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    classifier = build_classifier(parse(folders, "--model_name_or_path", tmp_path / "half"), ["a", "b", "c"])
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    torch.testing.assert_close(classifier.classifier.weight, model.classifier.weight.float())


def test_training_indices_take_the_names_of_the_evaluation_data(folders, tmp_path, caplog):
    rows = [f"train/{name}/0.mp4 {index}" for index, name in enumerate("cab")]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    make_files(tmp_path / "eval", "b/0.mp4")
    flags = [*folders, "--train_data", tmp_path / "list.txt"]
    train_source, eval_source = open_sources(parse(flags))
    assert (train_source.class_names, train_source.labels.tolist()) == (["a", "b", "c"], [0, 1, 2])
    assert eval_source.labels.tolist() == [0, 1, 2]
    assert "its class indices are taken to be those of" in caplog.text and "0 a, 1 b, 2 c" in caplog.text
    # Both by numbers, one of them as names of folders.
    make_files(tmp_path / "numbers", "2/0.mp4", "0/0.mp4")
    train_source, eval_source = open_sources(parse([*flags, "--eval_data", tmp_path / "numbers"]))
    assert (train_source.class_names, eval_source.labels.tolist()) == (["0", "1", "2"], [0, 2])
    (tmp_path / "names.txt").write_text("c\na\nb\n")
    train_source, eval_source = open_sources(parse(flags, "--label_names", tmp_path / "names.txt"))
    assert (train_source.class_names, eval_source.labels.tolist()) == (["c", "a", "b"], [1, 2, 0])
    make_files(tmp_path / "eval", "d/0.mp4")
    with pytest.raises(InputError, match=r"indices 0 to 2, and .*eval has 4 classes with names.*--label_names FILE"):
        open_sources(parse(flags))
