import numpy as np
import pytest

from vicmae_hf.data.samples.label_fraction import select_label_fraction
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError


def fraction_source(tmp_path, counts):
    for class_name, count in counts.items():
        (tmp_path / class_name).mkdir()
        for index in range(count):
            (tmp_path / class_name / f"{index:03}.mp4").touch()
    return open_labelled(tmp_path)


def test_fractions_are_balanced_nested_and_decided_by_the_seed(tmp_path):
    source = fraction_source(tmp_path, {"a": 40, "b": 100, "c": 20})
    names = {}
    for fraction in [0.05, 0.1, 0.25, 0.5, 0.75, 1.0]:
        part = select_label_fraction(source, fraction, seed=3)
        assert np.bincount(part.labels).tolist() == [round(fraction * count) for count in (40, 100, 20)]
        names[fraction] = [part[index].name for index in range(len(part))]
        assert [name.split("/")[-2] for name in names[fraction]] == [part.class_names[label] for label in part.labels]
        again = select_label_fraction(open_labelled(tmp_path), fraction, seed=3)
        assert [again[index].name for index in range(len(again))] == names[fraction]
    for smaller, larger in zip(list(names)[:-1], list(names)[1:], strict=True):
        assert set(names[smaller]) < set(names[larger])
    other = select_label_fraction(source, 0.5, seed=4)
    assert {other[index].name for index in range(len(other))} != set(names[0.5])
    # The order of items and classes does not matter: a store has others.
    other_order = open_labelled(tmp_path, class_names=["c", "x", "a", "b"])
    shuffled = other_order.select(np.random.default_rng(0).permutation(len(source)))
    part = select_label_fraction(shuffled, 0.25, seed=3)
    assert {part[index].name for index in range(len(part))} == set(names[0.25])
    # A random part, not the first files.
    assert names[0.25] != [source[index].name for index in range(10)]


def test_half_a_sample_counts_as_one(tmp_path):
    source = fraction_source(tmp_path, {"a": 25, "b": 24, "c": 5})
    for fraction, counts in [(0.5, [13, 12, 3]), (0.3, [8, 7, 2]), (0.7, [18, 17, 4])]:
        assert np.bincount(select_label_fraction(source, fraction, seed=0).labels).tolist() == counts


def test_a_fraction_too_small_for_a_class(tmp_path):
    source = fraction_source(tmp_path, {"a": 40, "b": 19})
    with pytest.raises(
        InputError, match=r"0.05 is less than one sample of class 'b', which has 19. Take at least 0.05263"
    ):
        select_label_fraction(source, 0.05, seed=0)
    assert len(select_label_fraction(source, 0.0527, seed=0)) == 3
    with pytest.raises(InputError, match=r"above 0 and at most 1, got 1\.5"):
        select_label_fraction(source, 1.5, seed=0)
