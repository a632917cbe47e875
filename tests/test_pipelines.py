"""Pipelines of Transformers on saved folders give what processor and model give by hand."""

import pytest
import torch
from PIL import Image
from tiny_models import shake, tiny_config
from transformers import AutoImageProcessor, AutoVideoProcessor, pipeline
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForImageClassification, ViCMAEForPreTraining, ViCMAEForVideoClassification, ViCMAEModel
from vicmae_hf.processors import build_processors
from vicmae_hf.video_processing_vicmae import sample_frame_indices


LABELS = {0: "ant", 1: "bee", 2: "cow"}


def save(model, folder):
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    """Paths of three pictures of different sizes."""
    paths = []
    for index, (height, width) in enumerate([(40, 40), (24, 50), (60, 32)]):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(numbered_frames(index + 1, height, width, seed=index)[-1]).save(paths[-1])
    return paths


def assert_same_scores(results, expected):
    """`results` of a pipeline, best first, against scores in the order of LABELS."""
    order = expected.argsort(descending=True).tolist()
    assert [result["label"] for result in results] == [LABELS[index] for index in order][: len(results)]
    for result, index in zip(results, order, strict=False):
        assert result["score"] == pytest.approx(expected[index].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "apply"),
    [
        ({}, lambda logits: logits.softmax(-1)),
        ({"pooling": "mean", "problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"image_size": [16, 24]}, lambda logits: logits.softmax(-1)),
    ],
)
def test_image_classification(settings, apply, pictures, tmp_path):
    config = tiny_config(id2label=LABELS, label2id={name: index for index, name in LABELS.items()}, **settings)
    model = shake(ViCMAEForImageClassification(config)).eval()
    folder = save(model, tmp_path / "model")
    classifier = pipeline("image-classification", model=folder)
    results = classifier([*pictures, Image.open(pictures[0])], top_k=3)
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        for result, path in zip(results, [*pictures, pictures[0]], strict=True):
            pixel_values = processor(Image.open(path), return_tensors="pt").pixel_values
            assert_same_scores(result, apply(model(pixel_values).logits[0]))
    assert len(classifier(pictures[0], top_k=1)) == 1
    assert len({result[0]["score"] for result in results}) == 3


@pytest.mark.parametrize("num_frames", [20, 3])
def test_video_classification_of_a_file(num_frames, tmp_path):
    config = tiny_config(id2label=LABELS, label2id={name: index for index, name in LABELS.items()})
    model = shake(ViCMAEForVideoClassification(config)).eval()
    folder = save(model, tmp_path / "model")
    path = str(tmp_path / "video.mp4")
    write_video(path, numbered_frames(num_frames))
    classifier = pipeline("video-classification", model=folder)
    results = classifier(path, top_k=3)

    # A clip of four frames over the whole video, whatever its length; and frame by frame, as images.
    processor = AutoVideoProcessor.from_pretrained(folder)
    whole = processor(path, do_sample_frames=False, return_tensors="pt").pixel_values
    assert whole.shape[:2] == (1, num_frames)
    clip = whole[:, sample_frame_indices(num_frames, num_frames=4)[0]]
    with torch.no_grad():
        expected = model(clip).logits[0].softmax(-1)
        longer = model(whole[:, sample_frame_indices(num_frames, num_frames=8)[0]]).logits[0].softmax(-1)
    assert_same_scores(results, expected)
    assert (longer - expected).abs().max() > 1e-4
    assert_same_scores(classifier(path, num_frames=8), longer)
    assert classifier([path, path], top_k=3) == [results, results]


@pytest.mark.parametrize("model_class", [ViCMAEModel, ViCMAEForPreTraining])
def test_image_features(model_class, pictures, tmp_path):
    model = shake(model_class(tiny_config(pooling="mean"))).eval()
    folder = save(model, tmp_path / "model")
    extractor = pipeline("image-feature-extraction", model=folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values = processor([Image.open(path) for path in pictures], return_tensors="pt").pixel_values
    encoder = ViCMAEModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = encoder(pixel_values)
    for index, path in enumerate(pictures):
        features = extractor(path, return_tensors=True)
        torch.testing.assert_close(features[0], expected.last_hidden_state[index], atol=1e-6, rtol=1e-5)
        pooled = extractor(path, pool=True, return_tensors=True)
        torch.testing.assert_close(pooled[0], expected.pooler_output[index], atol=1e-6, rtol=1e-5)
    assert extractor(pictures[0])[0][0] == pytest.approx(expected.last_hidden_state[0, 0].tolist(), abs=1e-5)
