"""Frames shuffled and repeated, against NumPy and the model called by hand."""

import numpy as np
import pytest
import torch
from saved_classifiers import predict_all, save_classifier, views_for
from transformers import AutoVideoProcessor

from vicmae_hf.errors import InputError
from vicmae_hf.evaluation.classifier_loading import load_classifier
from vicmae_hf.evaluation.temporal_ablation import FrameOrders


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
