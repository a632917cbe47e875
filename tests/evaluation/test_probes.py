"""Probes of a frozen encoder."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_config
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEImageProcessor, ViCMAEModel
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.probes import (
    LabelledFrames,
    balanced_subset,
    extract_features,
    linear_probe,
    read_labelled_frames,
    top_k_accuracy,
    train_linear_probe,
)


def clusters(num_samples, num_classes, width, seed, distance=3.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99)) * distance
    labels = torch.arange(num_samples) % num_classes
    return centres[labels] + torch.randn(num_samples, width, generator=generator), labels


def test_a_linear_probe_finds_the_nearest_centre():
    features, labels = clusters(120, 4, 8, seed=0)
    held_out, held_out_labels = clusters(80, 4, 8, seed=1)
    probe = train_linear_probe(features, labels, 4, seed=0)
    centres = torch.stack([features[labels == label].mean(0) for label in range(4)])
    nearest = torch.cdist(held_out, centres).argmin(1)
    assert (probe(held_out).argmax(1) == nearest).float().mean() > 0.97
    assert top_k_accuracy(probe(held_out), held_out_labels, 1) > 95


def test_the_probe_does_not_see_scale_and_offset_of_features():
    """Batch norm without affine parameters comes first (supplement, section A)."""
    features, labels = clusters(60, 3, 6, seed=0, distance=1.0)
    scale, offset = torch.logspace(0, 2, 6), torch.linspace(-5, 5, 6)
    first = train_linear_probe(features, labels, 3, seed=1)
    second = train_linear_probe(features * scale + offset, labels, 3, seed=1)
    torch.testing.assert_close(first(features), second(features * scale + offset), rtol=1e-3, atol=1e-3)
    assert [name for name, _ in first.named_parameters()] == ["1.weight", "1.bias"]


def test_labels_without_information_stay_at_chance():
    features, _ = clusters(400, 4, 8, seed=0)
    labels = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(5))
    probe = train_linear_probe(features[:200], labels[:200], 4, seed=0)
    # Three standard errors of 200 coin tosses at 25 %.
    assert abs(top_k_accuracy(probe(features[200:]), labels[200:], 1) - 25) < 3 * 100 * (0.25 * 0.75 / 200) ** 0.5


def test_top_k_accuracy_against_numpy():
    scores = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 7, (50,), generator=torch.Generator().manual_seed(1))
    for k in (1, 3, 5):
        ranked = np.argsort(-scores.numpy(), axis=1)[:, :k]
        expected = 100 * np.mean([label in row for label, row in zip(labels.numpy(), ranked, strict=True)])
        assert top_k_accuracy(scores, labels, k) == pytest.approx(expected)
    assert top_k_accuracy(scores[:, :3], labels % 3, 5) == 100


def test_a_balanced_subset_has_its_share_of_every_class():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    chosen = balanced_subset(labels, 0.8, seed=3)
    assert len(set(chosen.tolist())) == len(chosen)
    assert torch.bincount(labels[chosen]).tolist() == [8, 4, 1]
    assert not torch.equal(chosen, balanced_subset(labels, 0.8, seed=4))


def test_features_are_those_of_every_frame():
    torch.manual_seed(0)
    model = ViCMAEModel(tiny_config(pooling="mean")).train()
    height, width = model.config.image_height_and_width
    frames = torch.randn(3, 2, 3, height, width)
    features = extract_features(model, frames, batch_size=4)
    with torch.no_grad():
        expected = model.eval()(frames[2, 1][None]).last_hidden_state[0, 1:].mean(0)
    assert features.shape == (3, 2, model.config.hidden_size)
    torch.testing.assert_close(features[2, 1], expected)


def test_a_probe_averages_the_probabilities_of_frames_and_tells_seeds_apart():
    torch.manual_seed(0)
    model = ViCMAEModel(tiny_config(pooling="mean"))
    height, width = model.config.image_height_and_width
    labels = torch.arange(40) % 2
    # Classes differ in colour, by less than the noise of a frame.
    colour = torch.tensor([[0.5, 0.0, -0.5], [-0.5, 0.0, 0.5]])[labels]
    frames = torch.randn(40, 4, 3, height, width) + colour[:, None, :, None, None]
    train = LabelledFrames(frames[:20], labels[:20], ["red", "blue"], 0)
    evaluation = LabelledFrames(frames[20:], labels[20:], ["red", "blue"], 0)
    results = linear_probe(model, train, evaluation, seeds=[0, 1])
    assert len(results) == 2
    assert all(result["top1"] > 80 and result["top5"] == 100 for result in results)
    assert all(result["knn_top1"] > 80 for result in results)


def test_frames_of_labelled_files(tmp_path):
    for name in ["b", "a"]:
        (tmp_path / name).mkdir()
    write_video(tmp_path / "a" / "clip.mp4", numbered_frames(12, 48, 64), fps=12)
    (tmp_path / "b" / "broken.mp4").write_bytes(b"x" * 50)
    write_video(tmp_path / "b" / "clip.mp4", numbered_frames(3, 48, 64), fps=12)
    processor = ViCMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    frames = read_labelled_frames(open_labelled(tmp_path), processor, 4, MediaLoader())
    assert frames.pixel_values.shape == (2, 4, 3, 32, 32)
    assert frames.labels.tolist() == [0, 1]
    assert frames.class_names == ["a", "b"]
    assert frames.num_failed == 1
    (tmp_path / "a" / "clip.mp4").unlink()
    (tmp_path / "b" / "clip.mp4").unlink()
    with pytest.raises(InputError, match=r"None of 1 files could be read; the first: .*broken\.mp4"):
        read_labelled_frames(open_labelled(tmp_path), processor, 4, MediaLoader())
