import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from PIL import Image

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.loading.loader import EpochBatchSampler, build_dataloader, draw_items, epoch_order
from vicmae_hf.errors import InputError


def rounds(files, length):
    return [files[start : start + length] for start in range(0, len(files), length)]


@pytest.mark.parametrize("num_items", [1, 3, 250])
def test_a_hundred_items_are_drawn_and_then_every_one_is_taken_in_turn(num_items):
    drawn, generators = zip(*draw_items((2, 5, 0), num_items, seed=7), strict=True)
    assert len(drawn) == 100 + num_items
    assert drawn[0] == 0
    assert {*drawn[:100]} <= {*range(num_items)}
    steps = np.diff(drawn) % num_items
    assert (steps[99:] == 1 % num_items).all()
    assert sorted(drawn[100:]) == [*range(num_items)]
    if num_items > 1:
        # About as many of each, and not in turn.
        assert np.bincount(drawn[1:100], minlength=num_items).max() <= 100 / num_items + 20
        assert (steps[:99] == 1).mean() < 0.5
        assert drawn[1:100] != [index for index, _ in draw_items((2, 6, 0), num_items, seed=7)][1:100]
    # Each attempt has random numbers of its own.
    assert len({generator.integers(2**63) for generator in generators}) == len(drawn)


@pytest.mark.parametrize("num_samples", [3, 10, 27])
def test_every_file_comes_once_before_any_comes_again(num_samples):
    order = epoch_order([4, 1, 5], None, num_samples, np.random.default_rng(0)).tolist()
    assert len(order) == num_samples
    assert all(len({*files}) == len(files) for files in rounds(order, 10))
    assert {*order} <= {*range(10)}


def test_weights_are_exact_shares():
    order = epoch_order([4, 6, 100], [1, 3, 1], 50, np.random.default_rng(0))
    first, second, third = order[order < 4], order[(order >= 4) & (order < 10)], order[order >= 10]
    assert [len(first), len(second), len(third)] == [10, 30, 10]
    assert len({*third.tolist()}) == 10
    for files, length in [(first, 4), (second, 6)]:
        assert all(len({*part}) == len(part) for part in rounds(files.tolist(), length))
    assert {*second.tolist()} == {4, 5, 6, 7, 8, 9}
    # The sources are mixed: of the first half of the places, about three fifths are the second one's.
    assert 10 <= ((order >= 4) & (order < 10))[:25].sum() <= 20


@pytest.mark.parametrize("num_samples", [2, 10, 101])
def test_weights_that_do_not_divide_evenly(num_samples):
    order = epoch_order([7, 7, 7], [2.0, 1.0, 1.0], num_samples, np.random.default_rng(0))
    found = np.bincount(order // 7, minlength=3)
    assert found.sum() == num_samples
    assert np.abs(found - num_samples * np.array([0.5, 0.25, 0.25])).max() < 1


def test_every_order_is_as_likely_as_any_other():
    generator = np.random.default_rng(0)
    firsts = np.bincount([epoch_order([2, 3], None, 5, generator)[0] for _ in range(2000)], minlength=5)
    assert np.abs(firsts - 400).max() < 4.5 * np.sqrt(2000 * 0.2 * 0.8)


def test_epochs_of_full_batches():
    sampler = EpochBatchSampler([5, 8], 13, batch_size=3, num_epochs=3)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 3 * 4
    assert sampler.batches_per_epoch == 4
    assert all(len(batch) == 3 for batch in batches)
    keys = [key for batch in batches for key in batch]
    # (epoch, position) decides the random numbers of a sample, so no two may be the same.
    assert [(epoch, position) for epoch, position, _ in keys] == [(e, p) for e in range(3) for p in range(12)]
    orders = [[index for epoch, _, index in keys if epoch == wanted] for wanted in range(3)]
    assert all(len({*order}) == 12 and {*order} <= {*range(13)} for order in orders)
    assert len({*map(tuple, orders)}) == 3
    # Another file is left over in another epoch.
    long_run = EpochBatchSampler([5, 8], 13, batch_size=3, num_epochs=40)
    left_over = [{*range(13)} - {key[2] for batch in part for key in batch} for part in rounds(list(long_run), 4)]
    assert len({min(files) for files in left_over}) > 5


@pytest.mark.parametrize(
    ("num_samples", "batch_multiple", "batches"), [(100, 4, 8), (100, 7, 7), (30, 3, 3), (5, 3, 3)]
)
def test_batches_of_an_epoch_make_whole_updates(num_samples, batch_multiple, batches):
    sampler = EpochBatchSampler([num_samples], num_samples, 10, num_epochs=2, batch_multiple=batch_multiple)
    assert sampler.batches_per_epoch == batches
    assert len(list(sampler)) == len(sampler) == 2 * batches


def test_fewer_samples_than_a_batch_are_repeated():
    batches = list(EpochBatchSampler([2, 1], 3, batch_size=8, num_epochs=2))
    assert len(batches) == 2
    for batch in batches:
        assert np.bincount([index for _, _, index in batch]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    assert [key[:2] for key in batches[1]] == [(1, position) for position in range(8)]


def test_several_samples_of_each_file():
    keys = [key for batch in EpochBatchSampler([3, 4], 21, batch_size=7, num_epochs=1) for key in batch]
    assert np.bincount([index for _, _, index in keys]).tolist() == [3] * 7


def test_starting_later_gives_the_rest_of_the_same_order():
    settings = {"lengths": [5, 9], "num_samples": 14, "batch_size": 2, "num_epochs": 3, "batch_multiple": 3, "seed": 4}
    for weights in [None, [2, 1]]:
        whole = list(EpochBatchSampler(**settings, weights=weights))
        assert len(whole) == 18
        for start in range(19):
            rest = EpochBatchSampler(**settings, weights=weights, start_batch=start)
            assert list(rest) == whole[start:]
            assert len(rest) == 18 - start


def test_the_seed_decides_the_order():
    first, again, other = (list(EpochBatchSampler([20], 20, 5, 2, seed=seed)) for seed in [1, 1, 2])
    assert first == again
    assert first != other


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, 0.0], [1.0, -1.0]])
def test_weights_that_do_not_fit(weights):
    with pytest.raises(InputError, match="Expected one positive weight for each of 2 sources"):
        EpochBatchSampler([3, 4], 7, 2, 1, weights=weights)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("start_update", [0, 2])
def test_processes_share_every_update(num_processes, start_update):
    accumulation_steps = 2
    settings = {"lengths": [40], "num_samples": 40, "batch_size": 3, "num_epochs": 2}
    settings["batch_multiple"] = num_processes * accumulation_steps
    start_batch = start_update * settings["batch_multiple"]
    whole = list(EpochBatchSampler(**settings))
    shards = [
        list(BatchSamplerShard(EpochBatchSampler(**settings, start_batch=start_batch), num_processes, rank))
        for rank in range(num_processes)
    ]
    interleaved = [batch for batches in zip(*shards, strict=True) for batch in batches]
    assert interleaved == whole[start_batch:]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve images, each of one gray level: twice its number."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        Image.new("L", (8, 8), 2 * number).save(folder / f"{number:02}.png")
    return folder


def levels(batches):
    return [batch["pixel_values"][:, 0, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_of_all_processes_together_give_the_whole_order(pictures, num_workers):
    dataset = load_frame_pairs(pictures, image_size=4)
    settings = {"lengths": [12], "num_samples": 12, "batch_size": 2, "num_epochs": 2, "batch_multiple": 3}
    expected = [[2 * index for _, _, index in batch] for batch in EpochBatchSampler(**settings)]
    single = list(build_dataloader(dataset, EpochBatchSampler(**settings), num_workers, pin_memory=False))
    assert levels(single) == expected
    assert all(batch["pixel_values"].dtype == torch.uint8 for batch in single)
    assert all(batch["pixel_values"].shape == (2, 2, 3, 4, 4) for batch in single)
    parts = []
    for rank in range(3):
        loader = prepare_data_loader(
            build_dataloader(dataset, EpochBatchSampler(**settings), num_workers, pin_memory=False),
            num_processes=3,
            process_index=rank,
            put_on_device=False,
        )
        assert len(loader) == 4
        parts.append(list(loader))
    together = [batch for batches in zip(*parts, strict=True) for batch in batches]
    assert levels(together) == expected
    for ours, theirs in zip(together, single, strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_global_random_state_alone(pictures, num_workers):
    dataset = load_frame_pairs(pictures, image_size=4)
    sampler = EpochBatchSampler([12], 12, batch_size=4, num_epochs=1)
    state = torch.get_rng_state()
    assert len(list(build_dataloader(dataset, sampler, num_workers, pin_memory=False))) == 3
    assert torch.equal(state, torch.get_rng_state())
