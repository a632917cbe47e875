from collections import Counter

import numpy as np
import pytest

from vicmae_hf.data.samples.frame_sampling import FrameSampling
from vicmae_hf.errors import InputError


STRATEGIES = ["distant", "fixed_gap", "max_gap", "adjacent", "same"]


def constant_rate(num_frames, frames_per_second):
    return np.arange(num_frames) / frames_per_second, num_frames / frames_per_second


def draw(sampling, timestamps, duration, count, seed=0):
    generator = np.random.default_rng(seed)
    pairs = [sampling.sample(np.asarray(timestamps), duration, generator) for _ in range(count)]
    assert all(type(index) is int for pair in pairs for index in pair)
    return np.array(pairs)


def map_to_tuples(rows):
    return [tuple(map(int, row)) for row in rows]


def assert_uniform(values, expected_values):
    """Every value as often as any other, within 4.5 standard deviations of a fair draw, and no others."""
    expected_values = list(expected_values)
    counts = Counter(values)
    assert set(counts) == set(expected_values)
    share = 1 / len(expected_values)
    tolerance = 4.5 * np.sqrt(len(values) * share * (1 - share))
    assert max(abs(count - len(values) * share) for count in counts.values()) <= tolerance


def test_distant_gap_is_that_of_two_halves_of_the_papers_window():
    count, frames_per_second, half = 3000, 30, 32 / 30
    pairs = draw(FrameSampling(), *constant_rate(300, frames_per_second), count)
    gaps = (pairs[:, 1] - pairs[:, 0]) / frames_per_second
    # One time uniform in each half: the gap has a triangular distribution on (0, 2 * half).
    assert abs(gaps.mean() - 1.067) < 4.5 * half / np.sqrt(6 * count)
    assert gaps.min() > 0
    assert gaps.max() <= 2 * half + 1 / frames_per_second
    rounded_half_frame = 0.5 / frames_per_second
    for share_of_half in [0.25, 0.5, 1.0, 1.5]:
        expected = share_of_half**2 / 2 if share_of_half <= 1 else 1 - (2 - share_of_half) ** 2 / 2
        tolerance = 4.5 * np.sqrt(expected * (1 - expected) / count) + rounded_half_frame / half
        assert abs((gaps <= share_of_half * half).mean() - expected) < tolerance


def test_distant_window_lies_anywhere_with_the_same_probability():
    pairs = draw(FrameSampling(), *constant_rate(300, 30), 3000)
    # Away from the ends (one half window) every frame is as likely as any other.
    first = pairs[:, 0][(pairs[:, 0] >= 32) & (pairs[:, 0] < 232)]
    assert_uniform((first - 32) // 20, range(10))
    assert pairs.min() < 5
    assert pairs.max() > 294


@pytest.mark.parametrize("window_seconds", [0, 2.0, 64 / 30, 1000])
def test_distant_in_a_video_shorter_than_the_window_takes_one_frame_of_each_half(window_seconds):
    pairs = draw(FrameSampling(window_seconds=window_seconds), *constant_rate(40, 20), 2000)
    assert_uniform(pairs[:, 0], range(20))
    assert_uniform(pairs[:, 1], range(20, 40))


def test_window_of_zero_takes_a_long_video_whole():
    pairs = draw(FrameSampling(window_seconds=0), *constant_rate(3000, 30), 2000)
    assert_uniform(pairs[:, 0] // 150, range(10))
    assert_uniform(pairs[:, 1] // 150, range(10, 20))


def test_distant_takes_two_different_segments_of_several():
    pairs = draw(FrameSampling(window_seconds=0, num_segments=4), *constant_rate(40, 10), 3000)
    segments = pairs // 10
    assert_uniform(map_to_tuples(segments), [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
    assert_uniform(pairs[segments[:, 0] == 1, 0], range(10, 20))


def test_distant_goes_by_time_and_not_by_frame_number():
    # The eleventh frame is shown from 1 s to 9 s of 10.
    timestamps = [*np.arange(11) / 10, 9.0, 9.5]
    pairs = draw(FrameSampling(window_seconds=0), timestamps, 10.0, 2000)
    counts = Counter(map_to_tuples(pairs))
    tolerance = 4.5 * np.sqrt(0.25 / 2000)
    # A first time from 1 s on (4 of 5 s) shows frame 10; so does a second time before 9 s, and then frame 11 follows.
    assert abs(sum(count for (first, _), count in counts.items() if first == 10) / 2000 - 0.8) < tolerance
    assert abs(sum(count for (_, second), count in counts.items() if second == 10) / 2000 - 0.2 * 0.8) < tolerance
    assert abs(counts[10, 11] / 2000 - 0.8 * 0.9) < tolerance
    assert abs(counts[10, 12] / 2000 - 0.8 * 0.1) < tolerance


def test_distant_never_gives_a_frame_twice():
    assert {*map_to_tuples(draw(FrameSampling(), [0.0, 1.0], 60.0, 200))} == {(0, 1)}
    assert {*map_to_tuples(draw(FrameSampling(), [0.0, 59.0], 60.0, 200))} == {(0, 1)}
    assert {*map_to_tuples(draw(FrameSampling(), [0.0, 20.0, 40.0], 60.0, 200))} == {(0, 1), (1, 2)}


def test_distant_at_one_frame_per_second():
    pairs = draw(FrameSampling(), *constant_rate(60, 1), 2000)
    gaps = pairs[:, 1] - pairs[:, 0]
    assert {1, 2} <= {*gaps.tolist()} <= {1, 2, 3}
    assert {*pairs[:, 0].tolist()} >= {*range(58)}


@pytest.mark.parametrize(
    ("frames_per_second", "gap_seconds", "gap_frames"),
    [(30, 1.0, 30), (24, 0.5, 12), (30000 / 1001, 1.001, 30), (10, 0.3, 3)],
)
def test_fixed_gap_is_exact_at_a_constant_rate(frames_per_second, gap_seconds, gap_frames):
    sampling = FrameSampling("fixed_gap", gap_seconds=gap_seconds)
    pairs = draw(sampling, *constant_rate(50, frames_per_second), 3000)
    assert {*(pairs[:, 1] - pairs[:, 0]).tolist()} == {gap_frames}
    assert_uniform(pairs[:, 0], range(50 - gap_frames))


def test_fixed_gap_takes_the_nearest_frame_at_a_variable_rate():
    timestamps = np.concatenate([[0.0], np.cumsum(np.random.default_rng(7).uniform(0.01, 0.3, size=60))])
    pairs = draw(FrameSampling("fixed_gap", gap_seconds=0.7), timestamps, timestamps[-1] + 0.1, 3000)
    expected = {}
    for first, time in enumerate(timestamps):
        if time + 0.7 <= timestamps[-1]:
            errors = {later: abs(timestamps[later] - time - 0.7) for later in range(first + 1, len(timestamps))}
            expected[first] = min(errors, key=errors.get)
    assert {*map_to_tuples(pairs)} == {*expected.items()}


def test_fixed_gap_in_a_short_video_takes_its_ends():
    assert {*map_to_tuples(draw(FrameSampling("fixed_gap", gap_seconds=1.0), *constant_rate(30, 30), 50))} == {(0, 29)}


def test_fixed_gap_below_the_frame_interval_takes_neighbours():
    pairs = draw(FrameSampling("fixed_gap", gap_seconds=0.01), *constant_rate(10, 10), 500)
    assert {*map_to_tuples(pairs)} == {(first, first + 1) for first in range(9)}


@pytest.mark.parametrize(("gap_seconds", "largest"), [(0.35, 3), (0.3, 3), (0.1, 1), (100.0, 19)])
def test_max_gap_is_never_exceeded(gap_seconds, largest):
    pairs = draw(FrameSampling("max_gap", gap_seconds=gap_seconds), *constant_rate(20, 10), 3000)
    every_pair = {(first, second) for second in range(20) for first in range(second) if second - first <= largest}
    assert {*map_to_tuples(pairs)} == every_pair


def test_max_gap_at_a_variable_rate():
    timestamps = np.concatenate([[0.0], np.cumsum(np.random.default_rng(8).uniform(0.05, 0.19, size=30))])
    pairs = draw(FrameSampling("max_gap", gap_seconds=0.2), timestamps, timestamps[-1] + 0.1, 3000)
    times = timestamps[pairs]
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert (times[:, 1] - times[:, 0]).max() <= 0.2
    close = [(i, j) for j in range(31) for i in range(j) if timestamps[j] - timestamps[i] <= 0.2]
    assert {*map_to_tuples(pairs)} == {*close}


def test_max_gap_takes_the_nearest_frame_where_none_is_close_enough():
    pairs = draw(FrameSampling("max_gap", gap_seconds=0.5), [0.0, 3.0, 7.0, 7.2], 8.0, 500)
    assert {*map_to_tuples(pairs)} == {(0, 1), (2, 3)}


def test_adjacent_frames():
    pairs = draw(FrameSampling("adjacent"), *constant_rate(10, 30), 3000)
    assert_uniform(map_to_tuples(pairs), [(first, first + 1) for first in range(9)])


def test_same_frame():
    pairs = draw(FrameSampling("same"), *constant_rate(10, 30), 3000)
    assert_uniform(map_to_tuples(pairs), [(index, index) for index in range(10)])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_videos_of_one_and_two_frames(strategy):
    sampling = FrameSampling(strategy)
    assert {*map_to_tuples(draw(sampling, [0.0], 1 / 30, 20))} == {(0, 0)}
    two = {*map_to_tuples(draw(sampling, [0.0, 1 / 30], 2 / 30, 50))}
    assert two == ({(0, 0), (1, 1)} if strategy == "same" else {(0, 1)})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_generator_alone_decides(strategy):
    video = constant_rate(300, 30)
    first, again, other = (draw(FrameSampling(strategy), *video, 20, seed=seed) for seed in [1, 1, 2])
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frame_sampling": "far"}, "frame_sampling must be one of distant, .*, got 'far'"),
        ({"window_seconds": -1.0}, "window_seconds .*-1"),
        ({"window_seconds": float("nan")}, "window_seconds .*nan"),
        ({"num_segments": 1}, "num_segments .*1"),
        ({"gap_seconds": 0.0}, "gap_seconds .*0"),
        ({"gap_seconds": float("nan")}, "gap_seconds .*nan"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        FrameSampling(**settings)
