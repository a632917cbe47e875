"""Classifiers: their classes, the linear classifier, the best model. Whole runs are in tests/examples."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from tiny_models import random_tensor, shake, tiny_config
from torch import nn
from transformers import VideoMAEConfig

from vicmae_hf import ViCMAEForImageClassification, ViCMAEForPreTraining, ViCMAEForVideoClassification
from vicmae_hf.classification.arguments import ClassificationArguments
from vicmae_hf.classification.classification import Objective
from vicmae_hf.classification.linear import LinearClassifier
from vicmae_hf.classification.setup import build_classifier, build_classifier_processors, open_sources
from vicmae_hf.command_line import parse_arguments
from vicmae_hf.errors import InputError
from vicmae_hf.settings import ArgumentsError
from vicmae_hf.training.best_model import BestModel


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def folders(tmp_path):
    """Flags of a run on videos of three classes."""
    make_files(tmp_path / "train", *(f"{name}/{index}.mp4" for name in "abc" for index in range(4)))
    make_files(tmp_path / "eval", "c/0.mp4", "a/0.mp4")
    return ["--train_data", tmp_path / "train", "--eval_data", tmp_path / "eval", "--output_dir", tmp_path / "out"]


def parse(folders, *flags, task="video", method="finetune"):
    return parse_arguments(
        ClassificationArguments, [*map(str, folders), "--task", task, "--method", method, *map(str, flags)]
    )


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
    with pytest.raises(ArgumentsError, match=r"mlp.* has shape \[24.* there, the settings make it \[32"):
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer_decay", "0"], "layer_decay must be above 0"),
        (["--eval_epochs", "0"], "eval_epochs must be at least 1"),
        (["--config_overrides", "drop_path_rate=0.1"], "set by --drop_path_rate"),
        (["--no-train_augmentation"], "--method linear only"),
        (["--train_data", "a", "b"], "expected one labelled source, got 2"),
    ],
)
def test_settings_that_contradict_each_other(folders, flags, message):
    with pytest.raises(ArgumentsError, match=message):
        parse(folders, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drop_path_rate", "0.1"], "leaves the encoder as it is"),
        (["--no-train_augmentation", "--mixup", "0.8"], "--no-train_augmentation contradicts --mixup 0.8"),
    ],
)
def test_settings_that_contradict_the_linear_method(folders, flags, message):
    with pytest.raises(ArgumentsError, match=message):
        parse(folders, *flags, method="linear")


def test_a_label_fraction_turns_randaugment_and_mixup_off_unless_they_are_set(folders):
    chosen = ["rand_augment_magnitude", "mixup", "label_smoothing"]
    for flags, expected in [
        ([], [9, 0.8, 0.1]),
        (["--label_fraction", "1.0"], [0, 0, 0.1]),
        (["--label_fraction", "0.1", "--mixup", "0.4"], [0, 0.4, 0.1]),
    ]:
        arguments = parse(folders, *flags)
        assert [getattr(arguments, name) for name in chosen] == expected


def trained_linear_classifier(dtype=torch.float32):
    torch.manual_seed(0)
    model = shake(ViCMAEForImageClassification(tiny_config(drop_path_rate=0.5, hidden_dropout_prob=0.5)))
    module = LinearClassifier(model.to(dtype)).to(dtype).train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    for step in range(5):
        pixel_values = 2 + 3 * random_tensor(6, 3, 16, 16, seed=step, dtype=dtype)
        module(pixel_values, labels=torch.arange(6) % 3).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval()


def test_batch_norm_is_folded_into_the_classifier_exactly():
    module = trained_linear_classifier()
    module.norm.double()
    module.model.classifier.double()
    features = random_tensor(50, 16, seed=9, dtype=torch.float64) * 4 + 1
    expected = module(features=features).logits
    folded = module.folded_classifier()
    found = features @ folded["weight"].T + folded["bias"]
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-12)
    # Not by accident: without the fold the logits are others.
    assert (module.model.classifier(features) - expected).abs().max() > 0.1


def test_what_is_saved_is_a_plain_model(tmp_path):
    module = trained_linear_classifier()
    module.save_pretrained(tmp_path)
    model, info = ViCMAEForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixel_values = random_tensor(4, 3, 16, 16, seed=20)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(pixel_values).logits, module(pixel_values).logits, atol=1e-5, rtol=1e-5
        )
    assert not any("norm.running" in name for name in load_file(tmp_path / "model.safetensors"))


def test_only_the_classifier_of_a_linear_classifier_learns():
    module = trained_linear_classifier()
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trainable == {"model.classifier.weight", "model.classifier.bias"}
    module.train()
    assert module.norm.training and not any(layer.training for layer in module.model.vicmae.modules())
    torch.manual_seed(0)
    untouched = shake(ViCMAEForImageClassification(tiny_config(drop_path_rate=0.5, hidden_dropout_prob=0.5)))
    for name, tensor in untouched.vicmae.state_dict().items():
        assert torch.equal(module.model.vicmae.state_dict()[name], tensor), name


def test_the_running_statistics_are_those_of_the_features():
    module = LinearClassifier(shake(ViCMAEForImageClassification(tiny_config()))).train()
    features = random_tensor(64, 16, seed=3) * 5 + 2
    with torch.no_grad():
        logits = module(features=features).logits
    values = features.numpy().astype(np.float64)
    normalized = (values - values.mean(0)) / np.sqrt(values.var(0) + 1e-5)
    weight = module.model.classifier.weight.detach().numpy()
    np.testing.assert_allclose(logits, normalized @ weight.T, atol=1e-5)
    np.testing.assert_allclose(module.norm.running_var, 0.9 + 0.1 * values.var(0, ddof=1), rtol=1e-5)


def test_a_linear_checkpoint_restores_what_is_not_folded(tmp_path):
    module = trained_linear_classifier()
    module.save_checkpoint(tmp_path)
    other = LinearClassifier(ViCMAEForImageClassification(tiny_config()))
    other.load_checkpoint(tmp_path)
    expected = module.state_dict()
    assert other.state_dict().keys() == expected.keys()
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_loss_is_cross_entropy_against_smoothed_targets(folders):
    model = shake(ViCMAEForImageClassification(tiny_config())).eval()
    arguments = parse(folders, "--mixup", "0", task="image")
    objective = Objective(model, model.config, arguments)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1, 1])
    loss = objective({"pixel_values": pixels, "labels": labels}, 0.0)["loss"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = (pixels.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    logits = model(torch.tensor(normalized, dtype=torch.float32)).logits
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


class Counter:
    """Writes how often it was saved."""

    def __init__(self):
        self.value = 0

    def save(self, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_text(str(self.value))


def test_the_best_model_is_kept_and_goes_with_checkpoints(tmp_path):
    counter = Counter()
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    best = BestModel(Accelerator(cpu=True), output_dir, counter.save)

    def kept():
        return (output_dir / "model.safetensors").read_text()

    for counter.value, top1 in enumerate([10.0, 30.0, 30.0, 20.0]):
        best.update({"eval_top1": top1, "best_step": counter.value})
    assert kept() == "1"
    assert best.figures == {"eval_top1": 30.0, "best_step": 1}
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    best.save(checkpoint)
    assert json.loads((checkpoint / "best.json").read_text()) == best.figures
    counter.value = 4
    best.update({"eval_top1": 40.0, "best_step": 4})
    assert kept() == "4"
    # What the checkpoint holds was not written over.
    assert (checkpoint / "best" / "model.safetensors").read_text() == "1"

    resumed = BestModel(Accelerator(cpu=True), output_dir, counter.save)
    resumed.load(checkpoint)
    assert kept() == "1"
    counter.value = 5
    resumed.update({"eval_top1": 29.0, "best_step": 5})
    assert kept() == "1"
    resumed.update({"eval_top1": 31.0, "best_step": 5})
    assert kept() == "5"
    assert (checkpoint / "best" / "model.safetensors").read_text() == "1"
    assert sorted(path.name for path in output_dir.iterdir()) == ["model.safetensors"]


def test_a_checkpoint_of_another_model_is_refused(folders, tmp_path):
    VideoMAEConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path / "other")
    arguments = parse(folders, "--model_name_or_path", tmp_path / "other", "--new_classifier")
    with pytest.raises(ArgumentsError, match="expected a checkpoint of vicmae, got one of videomae"):
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
