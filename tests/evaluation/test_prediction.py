"""Predictions of classifiers against what processors, models and NumPy give by hand."""

import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from saved_classifiers import MODEL_NAMES, labels_of, predict_all, save_classifier, views_for
from tiny_models import shake
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

from vicmae_hf import ViCMAEForImageClassification
from vicmae_hf.data.media.video import open_video
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation import collecting
from vicmae_hf.evaluation.classifier_loading import check_fit, load_classifier
from vicmae_hf.evaluation.metrics.accuracy import top_k_accuracies
from vicmae_hf.evaluation.prediction import predict
from vicmae_hf.video_processing_vicmae import sample_frame_indices


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


def test_what_is_exchanged_in_rounds_comes_in_the_order_of_the_items(videos, tmp_path, monkeypatch):
    """Also if nothing of a round could be read."""
    model = save_classifier(tmp_path / "model")
    shutil.copytree(videos, tmp_path / "data")
    first, second, *_ = sorted((tmp_path / "data").rglob("*.mp4"))
    for path in (first, second):
        path.write_bytes(b"no video")
    dataset = views_for(load_classifier(str(tmp_path / "model")), tmp_path / "data")
    expected = predict_all(model, dataset).protocols[0]
    monkeypatch.setattr(collecting, "BATCHES_OF_A_ROUND", 2)
    found = predict(Accelerator(cpu=True), model, dataset, batch_size=1, num_workers=0)
    assert found.indices.tolist() == expected.indices.tolist() == [2, 3, 4, 5, 6]
    torch.testing.assert_close(found.probabilities, expected.probabilities)
    assert [failure["path"] for failure in found.failures] == [str(first), str(second)]


def test_a_video_at_which_workers_die_is_listed_and_the_others_are_counted(videos, tmp_path):
    model = save_classifier(tmp_path / "model")
    dataset = views_for(load_classifier(tmp_path / "model"), videos)
    expected = predict_all(model, dataset).protocols[0]
    deadly = 2
    read_frames = dataset.loader.read_frames

    class Crashing(type(dataset.loader)):
        def read_frames(self, item, choose_frames):
            if item.name == dataset.source[deadly].name:
                os.kill(os.getpid(), signal.SIGSEGV)  # as a decoder that crashes
            return read_frames(item, choose_frames)

    dataset.loader = Crashing()
    found = predict(Accelerator(cpu=True), model, dataset, batch_size=2, num_workers=2)
    (failure,) = found.failures
    assert failure["path"] == dataset.source[deadly].name and "workers that were reading it died" in failure["error"]
    others = expected.indices != deadly
    assert torch.equal(found.indices, expected.indices[others])
    torch.testing.assert_close(found.probabilities, expected.probabilities[others])


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
