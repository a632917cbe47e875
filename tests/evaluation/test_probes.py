"""Probes of a frozen encoder."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_features import labelled_table
from tiny_models import tiny_config
from transformers import set_seed
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEModel
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError
from vicmae_hf.evaluation import probes
from vicmae_hf.evaluation.features import build_feature_views
from vicmae_hf.evaluation.metrics.accuracy import accuracy
from vicmae_hf.evaluation.probes import (
    attentive_accuracy,
    balanced_subset,
    build_linear_optimizer,
    fit_probes,
    linear_probe,
    probe_beside_untrained,
    train_linear_probe,
)
from vicmae_hf.processors import build_processors


def clusters(num_samples, num_classes, width, seed, distance=3.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99)) * distance
    labels = torch.arange(num_samples) % num_classes
    return centres[labels] + torch.randn(num_samples, width, generator=generator), labels


def test_a_linear_probe_finds_the_nearest_centre():
    features, labels = clusters(120, 4, 8, seed=0)
    held_out, held_out_labels = clusters(80, 4, 8, seed=1)
    probe = train_linear_probe(labelled_table(features, labels, 4), seed=0)
    centres = torch.stack([features[labels == label].mean(0) for label in range(4)])
    nearest = torch.cdist(held_out, centres).argmin(1)
    assert (probe(held_out).argmax(1) == nearest).float().mean() > 0.97
    assert accuracy(probe(held_out), held_out_labels)["top1"] > 95


def test_the_probe_does_not_see_scale_and_offset_of_features():
    """Batch norm without affine parameters comes first (supplement, section A)."""
    features, labels = clusters(60, 3, 6, seed=0, distance=1.0)
    scale, offset = torch.logspace(0, 2, 6), torch.linspace(-5, 5, 6)
    first = train_linear_probe(labelled_table(features, labels, 3), seed=1)
    second = train_linear_probe(labelled_table(features * scale + offset, labels, 3), seed=1)
    torch.testing.assert_close(first(features), second(features * scale + offset), rtol=1e-3, atol=1e-3)
    assert [name for name, _ in first.named_parameters()] == ["1.weight", "1.bias"]


def test_labels_without_information_stay_at_chance():
    features, _ = clusters(400, 4, 8, seed=0)
    labels = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(5))
    probe = train_linear_probe(labelled_table(features[:200], labels[:200], 4), seed=0)
    # Three standard errors of 200 coin tosses at 25 %.
    assert abs(accuracy(probe(features[200:]), labels[200:])["top1"] - 25) < 3 * 100 * (0.25 * 0.75 / 200) ** 0.5


def test_a_balanced_subset_has_its_share_of_every_class():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    chosen = balanced_subset(labels, 0.8, seed=3)
    assert len(set(chosen.tolist())) == len(chosen)
    assert torch.bincount(labels[chosen]).tolist() == [8, 4, 1]
    assert not torch.equal(chosen, balanced_subset(labels, 0.8, seed=4))
    # Half a file counts as one, as in `select_label_fraction`.
    assert torch.bincount(labels[balanced_subset(labels, 0.25, seed=3)]).tolist() == [3, 1, 1]


def test_a_probe_averages_the_probabilities_of_frames_and_tells_seeds_apart():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    # Classes differ by less than the noise of a frame, by more than that of the mean of four.
    features = 1.2 * (2 * labels - 1)[:, None, None] + torch.randn(40, 4, 3, generator=generator) * 2
    train = labelled_table(features[:20], labels[:20], 2)
    evaluation = labelled_table(features[20:], labels[20:], 2)
    results = linear_probe(train, evaluation, seeds=[0, 1])
    assert len(results) == 2
    for seed, result in enumerate(results):
        chosen = balanced_subset(labels[:20], 0.8, seed)
        singles = labelled_table(features[chosen].flatten(0, 1), labels[chosen].repeat_interleave(4), 2)
        probe = train_linear_probe(singles, seed=seed)
        single = probe(features[20:].flatten(0, 1)).softmax(-1)
        files = single.reshape(20, 4, 2).mean(1).argmax(-1)
        assert result["top1"] == pytest.approx(100 * (files == labels[20:]).double().mean().item())
        assert result["top1"] > 100 * (single.argmax(-1) == labels[20:].repeat_interleave(4)).double().mean()
        assert result["top5"] == 100 and result["knn_top1"] > 80


def test_a_single_frame_makes_no_probe():
    with pytest.raises(InputError, match="needs at least 2 frames to learn from"):
        train_linear_probe(labelled_table(torch.randn(1, 8), torch.zeros(1, dtype=torch.int64), 1), seed=0)


def test_processes_share_the_probes(monkeypatch):
    def fit(num_processes, index):
        def gather(fitted):
            shares.append(fitted)
            return [entry for share in shares for entry in share]  # those before come to an end first

        monkeypatch.setattr(probes, "gather_object", gather)
        process = SimpleNamespace(process_index=index, num_processes=num_processes, is_main_process=False)
        return fit_probes(process, "pqr", "pqr", config=None)

    shares = []
    monkeypatch.setattr(probes.logger, "info", lambda *said: None)
    monkeypatch.setattr(probes, "linear_probe", lambda train, evaluation, seeds, **_: [(train, *seeds)])
    expected = {"pretrained": [("p", 0), ("p", 1)], "untrained": [("q", 0), ("r", 1)]}
    assert fit(1, 0) == expected
    shares.clear()
    with pytest.raises(KeyError):  # the other half is not there yet
        fit(2, 0)
    assert fit(2, 1) == expected and [len(share) for share in shares] == [2, 2]


def test_probes_beside_untrained_encoders(tmp_path):
    """Everything computed again from the files; a broken one is left out and told."""
    for name, frames in {"a/0": 12, "a/1": 3, "b/0": 9, "b/1": 8}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / f"{name}.mp4", numbered_frames(frames, 48, 64, seed=frames), fps=12)
    (tmp_path / "b" / "broken.mp4").write_bytes(b"x" * 50)
    source = open_labelled(tmp_path)
    torch.manual_seed(5)
    model = ViCMAEModel(tiny_config(pooling="mean"))
    processor = build_processors(model.config)[0]
    views = build_feature_views(source, processor, MediaLoader(), pooling="frame", num_frames=4)
    states = torch.get_rng_state(), random.getstate()
    results = probe_beside_untrained(Accelerator(cpu=True), model, views, views, num_seeds=2)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [failure["path"] for failure in results["failures"]] == [str(tmp_path / "b" / "broken.mp4")] * 2
    assert (results["num_classes"], results["num_train_samples"], results["num_failed"]) == (2, 4, 2)

    def rows_of(encoder, choose):
        rows = []
        for index in range(4):
            with source[index].open("pyav") as video:
                middles = [(2 * part + 1) * video.num_frames // 8 for part in range(4)]
                pixel_values = processor(list(video.get_frames(middles)), return_tensors="pt").pixel_values
            with torch.no_grad():
                rows.append(choose(encoder.eval()(pixel_values)))
        return labelled_table(torch.stack(rows), torch.tensor([0, 0, 1, 1]), 2)

    def features_of(encoder):
        return rows_of(encoder, lambda output: output.pooler_output)

    def tokens_of(encoder):
        return rows_of(encoder, lambda output: output.last_hidden_state[:, 1:].flatten(1))

    both = probe_beside_untrained(Accelerator(cpu=True), model, views, views, num_seeds=2, attentive=True)
    known = balanced_subset(torch.tensor([0, 0, 1, 1]), 0.8, 1)
    epochs = []
    options = {"width": 16, "num_heads": 2, "seed": 1, "advance": lambda: epochs.append("attentive")}
    top1 = attentive_accuracy(tokens_of(model).select(known), tokens_of(model), **options)
    assert both["runs"]["pretrained"][1]["attentive_top1"] == top1
    for name in ("eval_top1", "eval_knn_top1", "untrained_eval_top1"):  # of the same features
        assert both[name] == results[name]
    advance = partial(epochs.append, "linear")
    expected = linear_probe(features_of(model), features_of(model), range(2), advance=advance)
    assert epochs == 20 * ["attentive"] + 2 * 90 * ["linear"]
    assert results["runs"]["pretrained"] == expected
    set_seed(1)
    untrained = features_of(ViCMAEModel(model.config))
    assert results["runs"]["untrained"][1] == linear_probe(untrained, untrained, [1])[0]
    assert results["eval_top1"] == pytest.approx(sum(run["top1"] for run in expected) / 2)
    model.layernorm.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="embeddings are infinite or NaN"):
        probe_beside_untrained(Accelerator(cpu=True), model, views, views, num_seeds=1)


def marked_tokens(num_items, seed):
    """
    Items of two views of 3 tokens of 8 numbers. One token, anywhere, is marked, and its sign is the class; the others
    carry noise, which the mean of all does not leave out.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_items) % 2
    tokens = torch.randn(num_items, 6, 8, generator=generator)
    places = torch.randint(0, 6, (num_items,), generator=generator)
    tokens[:, :, 0] = -3
    tokens[torch.arange(num_items), places, 0] = 3
    tokens[torch.arange(num_items), places, 1] = 2.0 * (2 * labels - 1)
    return labelled_table(tokens.reshape(num_items, 2, 24), labels, 2)


def test_an_attentive_probe_finds_the_token_that_tells():
    train, evaluation = marked_tokens(300, 0), marked_tokens(100, 1)
    options = {"width": 8, "num_heads": 2, "seed": 0}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    attentive = attentive_accuracy(train, evaluation, **options)
    assert attentive > 85
    assert torch.equal(torch.get_rng_state(), state)
    assert attentive_accuracy(train, evaluation, **options) == attentive
    means = [
        labelled_table(samples.features.embeddings.reshape(-1, 6, 8).mean(1), samples.labels, 2)
        for samples in (train, evaluation)
    ]
    assert linear_probe(*means, [0])[0]["top1"] < attentive - 5


def test_the_first_update_of_a_linear_classifier_may_be_passed_over():
    """As a gradient scaler does in half precision. Momentum must then begin from 0, as without that update."""
    weights = []
    for passed_over in (True, False):
        weight = torch.nn.Parameter(torch.ones(64))
        optimizer = build_linear_optimizer([weight])
        if passed_over:
            weight.grad = torch.full((64,), torch.inf)
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            optimizer.found_inf = torch.tensor(0.0)
        optimizer.param_groups[0]["lr"] = 0.1
        for _ in range(2):
            weight.grad = torch.full((64,), 2.0)
            optimizer.step()
        weights.append(weight.detach())
    # 1 - 0.1 * 2 - 0.1 * (0.9 * 2 + 2)
    torch.testing.assert_close(weights[0], torch.full((64,), 0.42))
    assert torch.equal(weights[0], weights[1])
