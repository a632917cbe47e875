"""Evaluation of classifiers against what processors, models and NumPy give by hand."""

import csv
import hashlib
import itertools
import json
import math

import numpy as np
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from tiny_models import shake, tiny_config
from transformers import (
    AutoVideoProcessor,
    TimesformerConfig,
    TimesformerForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VivitConfig,
    VivitForVideoClassification,
    VivitImageProcessor,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2VideoProcessor,
    pipeline,
)
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForImageClassification, ViCMAEForPreTraining, ViCMAEForVideoClassification, ViCMAEModel
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.preparing.preparation import prepare_dataset
from vicmae_hf.data.samples.views import ViewDataset, ViewProtocol, build_test_views, choose_preprocessing
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.classifier_loading import check_fit, load_classifier
from vicmae_hf.evaluation.prediction import (
    Predictions,
    ViewPredictions,
    predict,
    predict_views,
    top_k_accuracies,
)
from vicmae_hf.evaluation.results import prepare_output_dir, write_evaluation
from vicmae_hf.evaluation.temporal_ablation import FrameOrders
from vicmae_hf.processors import build_processors
from vicmae_hf.video_processing_vicmae import sample_frame_indices


NAMES = ["ant", "bee", "cow"]
# Of the folder, sorted, they are others than of the model.
MODEL_NAMES = ["cow", "ant", "bee"]


def labels_of(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven videos of three classes, of different lengths and shapes."""
    root = tmp_path_factory.mktemp("videos")
    for index, count in enumerate([20, 12, 33, 8, 40, 16, 25]):
        folder = root / NAMES[index % 3]
        folder.mkdir(exist_ok=True)
        height, width = [(40, 56), (48, 40)][index % 2]
        write_video(folder / f"{index}.mp4", numbered_frames(count, height, width, seed=index), fps=15)
    return root


def save_classifier(folder, fps=None, model_class=ViCMAEForVideoClassification, **settings):
    model = shake(model_class(tiny_config(**labels_of(MODEL_NAMES), **settings))).eval()
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.fps = fps
        processor.save_pretrained(folder)
    return model


def views_for(classifier, data, protocols=((1, 1),)):
    return ViewDataset(
        open_labelled(data, classifier.class_names),
        choose_preprocessing(classifier.processor),
        MediaLoader(),
        task=classifier.task,
        num_frames=classifier.num_frames,
        frames_per_second=classifier.frames_per_second,
        protocols=[ViewProtocol(*counts) for counts in protocols],
    )


def predict_all(model, dataset, batch_size=4, **options):
    return predict_views(Accelerator(cpu=True), model, dataset, batch_size=batch_size, num_workers=0, **options)


@pytest.mark.parametrize("fps", [None, 7.5])
def test_single_views_equal_the_pipeline(fps, videos, tmp_path):
    save_classifier(tmp_path, fps=fps)
    classifier = load_classifier(str(tmp_path))
    assert (classifier.task, classifier.num_frames, classifier.frames_per_second) == ("video", 4, fps)
    dataset = views_for(classifier, videos)
    predictions = predict_all(classifier.model, dataset).protocols[0]
    pipe = pipeline("video-classification", model=str(tmp_path))
    assert predictions.indices.tolist() == list(range(7))
    for index in range(7):
        scores = {result["label"]: result["score"] for result in pipe(dataset.source[index].name)}
        assert predictions.probabilities[index].tolist() == pytest.approx([scores[n] for n in MODEL_NAMES], abs=1e-6)
        assert MODEL_NAMES[predictions.labels[index]] == dataset.source[index].name.split("/")[-2]
    # Not the same for all, or nothing would be shown.
    assert (predictions.probabilities.amax(0) - predictions.probabilities.amin(0)).min() > 1e-3


def test_probabilities_are_averaged_over_the_views_of_each_protocol(videos, tmp_path):
    model = save_classifier(tmp_path, fps=5)
    classifier = load_classifier(str(tmp_path))
    protocols = [(2, 3), (3, 1)]
    dataset = views_for(classifier, videos, protocols)
    outcomes = predict_all(classifier.model, dataset, batch_size=5).protocols
    processor = AutoVideoProcessor.from_pretrained(tmp_path)
    for (num_clips, num_crops), outcome in zip(protocols, outcomes, strict=True):
        for index in range(7):
            views = processor(
                dataset.source[index].name,
                num_frames=4,
                do_sample_frames=True,
                num_clips=num_clips,
                num_crops=num_crops,
                return_tensors="pt",
            ).pixel_values[0]
            with torch.no_grad():
                expected = model(views).logits.softmax(-1).mean(0)
            torch.testing.assert_close(outcome.probabilities[index], expected)


def test_a_model_in_training_is_evaluated_without_chance_and_stays_in_training(videos, tmp_path):
    save_classifier(tmp_path, hidden_dropout_prob=0.5, drop_path_rate=0.5)
    classifier = load_classifier(str(tmp_path))
    dataset = views_for(classifier, videos)
    expected = predict_all(classifier.model, dataset).protocols[0]
    state = torch.get_rng_state()
    model = classifier.model.train()
    predictions = predict(Accelerator(cpu=True), model, dataset, batch_size=8, num_workers=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.vicmae.layers[0].dropout.training
    torch.testing.assert_close(predictions.probabilities, expected.probabilities)


def test_unreadable_videos_are_counted_and_never_replaced(videos, tmp_path):
    model = save_classifier(tmp_path / "model")
    for name in ["ant/0.mp4", "bee/1.mp4"]:
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes((videos / name).read_bytes())
    (tmp_path / "data" / "bee" / "broken.mp4").write_bytes(b"no video")
    classifier = load_classifier(str(tmp_path / "model"))
    predictions = predict_all(model, views_for(classifier, tmp_path / "data")).protocols[0]
    assert predictions.indices.tolist() == [0, 1]
    assert [failure["path"] for failure in predictions.failures] == [str(tmp_path / "data" / "bee" / "broken.mp4")]
    figures = predictions.accuracy()
    assert (figures["num_eval_samples"], figures["num_failed"]) == (2, 1)
    for path in (tmp_path / "data").rglob("?.mp4"):
        path.unlink()
    with pytest.raises(InputError, match=r"none of 1 files could be read; .*broken\.mp4"):
        predict_all(model, views_for(classifier, tmp_path / "data"))


def test_outputs_that_are_not_finite_are_no_predictions(videos, tmp_path):
    model = save_classifier(tmp_path)
    classifier = load_classifier(str(tmp_path))
    with torch.no_grad():
        model.classifier.bias[1] = float("nan")
    with pytest.raises(InputError, match=r"infinite or NaN for 7 files, the first: .*0\.mp4"):
        predict_all(model, views_for(classifier, videos))


def test_top_k_accuracy_against_numpy():
    scores = torch.rand(50, 9)
    labels = torch.randint(0, 9, (50,))
    ranked = scores.argsort(descending=True)[:, :5]
    figures = top_k_accuracies(ranked, labels)
    for k in (1, 5):
        rows = np.argsort(-scores.numpy(), axis=1)[:, :k]
        hits = [label in row for label, row in zip(labels.tolist(), rows, strict=True)]
        assert figures[f"top{k}"] == pytest.approx(100 * np.mean(hits))


# ---------------------------------------------------------------------------------------------------------------------
# Models of Transformers
# ---------------------------------------------------------------------------------------------------------------------

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VIDEO = {"image_size": 32, "patch_size": 16, "num_frames": 4}
VJEPA2 = {"crop_size": 32, "patch_size": 16, "frames_per_clip": 4, "hidden_size": 16, "num_attention_heads": 2}
VJEPA2 |= {"num_hidden_layers": 1, "num_pooler_layers": 1}
VJEPA2 |= {f"pred_{name}": VJEPA2[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
OWN_SIZES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
FOREIGN = {
    "videomae": lambda: (
        VideoMAEForVideoClassification(VideoMAEConfig(**VIT, **VIDEO, **labels_of(MODEL_NAMES))),
        VideoMAEImageProcessor(**OWN_SIZES),
    ),
    "timesformer": lambda: (
        TimesformerForVideoClassification(TimesformerConfig(**VIT, **VIDEO, **labels_of(MODEL_NAMES))),
        VideoMAEImageProcessor(**OWN_SIZES),
    ),
    "vivit": lambda: (
        VivitForVideoClassification(VivitConfig(**VIT, **VIDEO, tubelet_size=[2, 16, 16], **labels_of(MODEL_NAMES))),
        VivitImageProcessor(**OWN_SIZES),
    ),
    "vjepa2": lambda: (
        VJEPA2ForVideoClassification(VJEPA2Config(**VJEPA2, **labels_of(MODEL_NAMES))),
        VJEPA2VideoProcessor(crop_size=32),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_classifier_of_transformers_sees_the_same_frames_through_its_own_processor(name, videos, tmp_path):
    model, processor = FOREIGN[name]()
    shake(model).eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path))
    assert (classifier.task, classifier.num_frames, classifier.class_names) == ("video", 4, MODEL_NAMES)
    dataset = views_for(classifier, videos, [(1, 1), (2, 3)])
    check_fit(classifier.model, dataset)
    single, several = predict_all(classifier.model, dataset).protocols
    for index in (0, 1):
        with open_video(dataset.source[index].name) as video:
            clips = sample_frame_indices(video.num_frames, 4, num_clips=2)
            frames = video.get_frames(sample_frame_indices(video.num_frames, 4)[0]).numpy()
            squares = [square for clip in clips for square in three_squares(video.get_frames(clip).numpy())]
        # As the documentation of these models calls their processors.
        expected = [score(model, classifier.processor, list(clip)) for clip in [frames, *squares]]
        torch.testing.assert_close(single.probabilities[index], expected[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(several.probabilities[index], sum(expected[1:]) / 6, atol=1e-5, rtol=1e-4)


def score(model, processor, frames):
    with torch.no_grad():
        return model(**processor(frames, return_tensors="pt")).logits[0].softmax(-1)


def three_squares(frames):
    """Frames (T, 3, H, W) -> three of (T, 3, S, S) along the longer side."""
    side, length = sorted(frames.shape[-2:])
    axis = frames.shape.index(length, 2)
    return [np.take(frames, range(start, start + side), axis) for start in (0, (length - side) // 2, length - side)]


# ---------------------------------------------------------------------------------------------------------------------
# Temporal ablation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_frames", "num_permutations"), [(16, 16), (4, 16), (3, 5), (2, 1)])
def test_orders_are_different_permutations_and_then_every_frame_repeated(num_frames, num_permutations):
    orders = FrameOrders(num_frames, seed=3)(5)
    permutations, repetitions = orders[:num_permutations], orders[num_permutations:]
    assert repetitions.tolist() == [[frame] * num_frames for frame in range(num_frames)]
    rows = {tuple(row) for row in permutations.tolist()}
    assert len(rows) == num_permutations
    assert all(sorted(row) == list(range(num_frames)) for row in rows)
    assert tuple(range(num_frames)) not in rows


def test_permutations_depend_on_seed_and_video_alone():
    orders = FrameOrders(16, seed=0)
    assert torch.equal(orders(7), FrameOrders(16, seed=0)(7))
    assert not torch.equal(orders(7), orders(8))
    assert not torch.equal(orders(7), FrameOrders(16, seed=1)(7))
    with pytest.raises(InputError, match="several frames, got num_frames=1"):
        FrameOrders(1, seed=0)


def test_reordered_frames_are_predicted_with_the_views_of_the_first_protocol(videos, tmp_path):
    model = save_classifier(tmp_path)
    classifier = load_classifier(str(tmp_path))
    dataset = views_for(classifier, videos, [(2, 1), (1, 3)])
    orders = FrameOrders(4, seed=0)
    outcome = predict_all(classifier.model, dataset, frame_orders=orders)
    assert outcome.reordered.shape == (7, 20, 3)
    processor = AutoVideoProcessor.from_pretrained(tmp_path)
    for index in range(7):
        views = processor(
            dataset.source[index].name, num_frames=4, do_sample_frames=True, num_clips=2, return_tensors="pt"
        ).pixel_values[0]
        with torch.no_grad():
            expected = [model(views[:, order]).logits.softmax(-1).mean(0) for order in orders(index)]
        assert outcome.reordered[index].tolist() == torch.stack(expected).argsort(descending=True).tolist()
    # The order matters here, or nothing would be shown.
    assert any(len(rankings.unique(dim=0)) > 1 for rankings in outcome.reordered)
    # Two clips of a video and three crops of another; each order sees the two. In the shortest video, one crop is the
    # same as a clip.
    assert outcome.num_clips == 7 * (2 + 3 + 20 * 2) - 1


def test_an_ablation_is_the_mean_over_permutations_and_over_frames():
    orders = FrameOrders(3, seed=0)
    classes = torch.stack([torch.stack([torch.randperm(6)[:5] for _ in range(8)]) for _ in range(40)])  # [N, G, 5]
    labels = torch.randint(0, 6, (40,))
    summary = orders.summarize({"eval_top1": 50.0, "eval_top5": 90.0, "num_failed": 0}, classes, labels)
    top1 = 100 * (classes[..., 0] == labels[:, None]).double().mean(0).numpy()
    top5 = 100 * (classes == labels[:, None, None]).any(-1).double().mean(0).numpy()
    assert summary["standard"] == {"eval_top1": 50.0, "eval_top5": 90.0}
    for name, runs in [("shuffled", slice(0, 5)), ("repeated", slice(5, 8))]:
        assert summary[name]["eval_top1_runs"] == pytest.approx(top1[runs])
        assert summary[name]["eval_top1"] == pytest.approx(top1[runs].mean())
        assert summary[name]["eval_top5"] == pytest.approx(top5[runs].mean())
        assert summary[name]["eval_top1_spread"] == pytest.approx(np.std(top1[runs], ddof=1))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before anything runs
# ---------------------------------------------------------------------------------------------------------------------


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


def test_there_is_no_such_model(tmp_path):
    with pytest.raises(InputError, match="nothing-here: the model or its processor cannot be loaded"):
        load_classifier(str(tmp_path / "nothing-here"))


def test_views_that_the_model_cannot_take_are_refused(videos, tmp_path):
    save_classifier(tmp_path)
    classifier = load_classifier(str(tmp_path))
    dataset = views_for(classifier, videos)
    dataset.num_frames = 3
    with pytest.raises(InputError, match=r"cannot take views of shape \(3, 3, 16, 16\): .*multiple of tubelet_size"):
        check_fit(classifier.model, dataset)


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def test_tables_and_figures_of_known_predictions(videos, tmp_path):
    source = open_labelled(videos)
    dataset = build_test_views(source, None, MediaLoader(), task="video", num_frames=4, frames_per_second=None)
    indices = torch.tensor([0, 1, 2, 3, 5, 6])
    probabilities = torch.tensor(
        [[0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6], [0.5, 0.3, 0.2]]
    )
    labels = torch.from_numpy(source.labels)[indices]
    failure = {"path": source[4].name, "error": "broken"}
    predictions = Predictions(probabilities, labels, indices, [failure])
    outcome = ViewPredictions([predictions], None, num_clips=12, seconds=3.0)
    prepare_output_dir(tmp_path / "out")
    results = write_evaluation(tmp_path / "out", dataset, outcome, None, {"task": "video"})

    truth, taken = labels.numpy(), probabilities.numpy().argmax(1)
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
    assert [row["file"] for row in rows] == [source[index].name for index in indices.tolist()]
    assert [row["predicted"] for row in rows] == [NAMES[label] for label in taken]
    assert rows[0]["five_likeliest"] == "ant | bee | cow"
    table = pyarrow.parquet.read_table(tmp_path / "out" / "predictions.parquet")
    assert np.array_equal(np.stack(table["probabilities_1x1"].to_numpy()), probabilities.numpy())
    assert table["label"].to_pylist() == truth.tolist()
    assert (tmp_path / "out" / "plots" / "confusion.png").stat().st_size > 1000


def test_the_hash_of_a_list_is_that_of_names_and_classes(videos, tmp_path):
    def hash_of(root):
        dataset = build_test_views(
            open_labelled(root), None, MediaLoader(), task="video", num_frames=4, frames_per_second=None
        )
        predictions = Predictions(torch.eye(3)[dataset.labels], torch.from_numpy(dataset.labels), torch.arange(7), [])
        outcome = ViewPredictions([predictions], None, num_clips=7, seconds=1.0)
        return write_evaluation(tmp_path / "out", dataset, outcome, None, {})["list_sha256"]

    prepare_output_dir(tmp_path / "out")
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
        prepare_output_dir(tmp_path)


def test_a_classifier_of_images_is_found_and_sees_frames(videos, tmp_path):
    model = save_classifier(tmp_path, model_class=ViCMAEForImageClassification)
    classifier = load_classifier(str(tmp_path))
    assert (classifier.task, classifier.num_frames) == ("image", 1)
    dataset = views_for(classifier, videos, [(3, 1)])
    predictions = predict_all(classifier.model, dataset).protocols[0]
    with open_video(dataset.source[2].name) as video:
        middles = [math.floor((part + 0.5) / 3 * video.num_frames) for part in range(3)]
        frames = video.get_frames(middles)
    pixel_values = classifier.processor(list(frames), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = model(pixel_values).logits.softmax(-1).mean(0)
    torch.testing.assert_close(predictions.probabilities[2], expected)
