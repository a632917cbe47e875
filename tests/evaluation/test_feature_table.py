"""The table of features: what lies in its file, whose views are whose, and nearest neighbours among them."""

import os

import numpy as np
import psutil
import pytest
import torch
from tiny_features import labelled_table, table

from vicmae_hf.errors import InputError
from vicmae_hf.evaluation import feature_table
from vicmae_hf.evaluation.feature_table import (
    EmbeddingFile,
    Features,
    LabelledFeatures,
    nearest_neighbour_scores,
    predict_blocks,
)


def test_rows_of_a_file_are_read_in_any_order():
    file, expected = EmbeddingFile(), []
    for size in (3, 1, 5):
        expected.append(torch.randn(size, 7))
        file.append(expected[-1])
    assert torch.equal(file.read()[torch.tensor([8, 0, 3])], torch.cat(expected)[[8, 0, 3]])


def own_memory() -> int:
    """Bytes of this process without what it maps of files, which the kernel may take back."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere mapped files are not told apart")
def test_rows_of_a_file_take_no_memory_of_the_process():
    file, before = EmbeddingFile(), own_memory()
    for _ in range(64):
        file.append(torch.ones(1024, 1024))
    assert file.read().sum().item() == 64 * 2**20  # 256 MiB
    assert own_memory() - before < 64 * 2**20


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_is_told_in_one_line(monkeypatch):
    file = EmbeddingFile()
    file.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        file.append(torch.ones(2, 2))


def shared_views() -> LabelledFeatures:
    """Three items of two views each; the second has only one."""
    features = Features(torch.randn(5, 6), torch.tensor([[0, 1], [2, 2], [3, 4]]), torch.tensor([0, 2, 3]), [])
    return LabelledFeatures(features, torch.tensor([1, 0, 1]), ["a", "b"])


def test_views_are_found_by_item_by_place_and_by_part():
    samples = shared_views()
    embeddings = samples.features.embeddings
    views = embeddings[[0, 1, 2, 2, 3, 4]]
    assert torch.equal(torch.cat(list(samples.features.blocks())), views.reshape(3, 2, 6))
    features, labels = samples.take(torch.tensor([5, 2, 3]))
    assert torch.equal(features, views[[5, 2, 3]]) and labels.tolist() == [1, 0, 0]
    assert len(samples) == 6 and torch.equal(samples[0, 0, 4]["features"], views[4])
    assert samples[0, 0, 4]["labels"] == 1
    chosen = samples.select(torch.tensor([False, True, True]))
    assert chosen.labels.tolist() == [0, 1] and chosen.features.indices.tolist() == [2, 3]
    assert torch.equal(chosen.take(torch.arange(4))[0], views[2:])
    _, second = samples.chunk(2)
    assert torch.equal(second.take(torch.arange(6))[0], views[:, 3:])


def test_probabilities_are_averaged_over_views_block_by_block(monkeypatch):
    monkeypatch.setattr(feature_table, "BLOCK_ITEMS", 2)
    features, classifier = shared_views().features, torch.nn.Linear(6, 3)
    with torch.no_grad():
        found = torch.cat(list(predict_blocks(lambda views: classifier(views).softmax(-1), features)))
        first, second = (classifier(features.embeddings[rows]).softmax(-1) for rows in ([0, 2, 3], [1, 2, 4]))
    torch.testing.assert_close(found, (first + second) / 2)


@pytest.mark.parametrize("num_features", [50, 12])
def test_nearest_neighbours_against_numpy(num_features, monkeypatch):
    monkeypatch.setattr(feature_table, "BLOCK_ITEMS", 17)  # as if there were more than fit into memory
    features, queries = torch.randn(num_features, 6), torch.randn(1500, 6)
    labels = torch.randint(0, 4, (num_features,))
    scores = nearest_neighbour_scores(labelled_table(features, labels, 4), table(queries))
    known, asked = features.double().numpy(), queries.double().numpy()
    for index in [0, 1, 700, 1499]:
        cosines = known @ asked[index] / (np.linalg.norm(known, axis=1) * np.linalg.norm(asked[index]))
        expected = np.zeros(4)
        for neighbour in np.argsort(-cosines)[:20]:
            expected[labels[neighbour]] += np.exp(cosines[neighbour] / 0.07)
        assert scores[index].tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_near_neighbour_outvotes_many_far_ones():
    features = torch.cat([torch.tensor([[1.0, 0.05]]), torch.tensor([[1.0, 1.0]]).expand(10, 2)])
    known, query = labelled_table(features, torch.tensor([0] + [1] * 10), 2), table(torch.tensor([[1.0, 0.0]]))
    scores = nearest_neighbour_scores(known, query, num_neighbours=11)
    assert scores.argmax(1).item() == 0
    flat = nearest_neighbour_scores(known, query, 11, temperature=100)
    assert flat.argmax(1).item() == 1
