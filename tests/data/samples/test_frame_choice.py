import itertools

import numpy as np
import pytest

from vicmae_hf.data.samples.frame_choice import choose_stored_frames, choose_view_clips
from vicmae_hf.video_processing_vicmae import sample_frame_indices


def constant_rate(num_frames, frames_per_second):
    return np.arange(num_frames) / frames_per_second, num_frames / frames_per_second


@pytest.mark.parametrize("fps", [10, 15, 24, 25, 30000 / 1001, 30, 60])
@pytest.mark.parametrize("rate", [1, 4, 7.5])
def test_stored_frames_are_those_nearest_to_even_times(fps, rate):
    timestamps = np.arange(137) / fps
    chosen = choose_stored_frames(timestamps, 137 / fps, frames_per_second=rate)
    wanted = np.arange(0, timestamps[-1] + 1e-9, 1 / rate)
    assert len(chosen) == len(wanted)
    errors = np.abs(timestamps[chosen] - wanted)
    assert np.all(errors <= np.abs(timestamps[None] - wanted[:, None]).min(axis=1) + 1e-5)
    assert chosen[0] == 0
    assert np.all(np.diff(chosen) > 0)


def test_stored_frames_of_special_videos():
    thirty = np.arange(90) / 30
    assert choose_stored_frames(thirty, 3.0, frames_per_second=7.5).tolist() == list(range(0, 90, 4))
    assert choose_stored_frames(thirty, 3.0, frames_per_second=0).tolist() == list(range(90))
    assert choose_stored_frames(thirty, 3.0, frames_per_second=100).tolist() == list(range(90))
    assert choose_stored_frames(thirty, 3.0, num_frames=4).tolist() == [0, 22, 45, 67]
    assert choose_stored_frames(thirty[:3], 0.1, num_frames=16).tolist() == [0, 1, 2]
    assert choose_stored_frames(np.zeros(1), 0.0, frames_per_second=7.5).tolist() == [0]
    slides = np.array([0, 0.01, 5.0, 5.01, 9.0])
    assert choose_stored_frames(slides, 10.0, frames_per_second=1).tolist() == [0, 1, 2, 3, 4]
    assert choose_stored_frames(slides, 10.0, frames_per_second=0.2).tolist() == [0, 2]
    # By time: the frames shown at 0, 2.5, 5 and 7.5 s.
    assert choose_stored_frames(slides, 10.0, num_frames=4).tolist() == [0, 1, 2, 3]
    assert choose_stored_frames(slides, 10.0, num_frames=2).tolist() == [0, 2]
    # Of a frame that is shown for long its neighbours are taken too, and all where there are no more.
    assert choose_stored_frames(np.array([0.0, 9.0]), 9.04, num_frames=2).tolist() == [0, 1]
    assert choose_stored_frames(np.array([0.0, 5.0, 10.0]), 10.04, num_frames=16).tolist() == [0, 1, 2]
    burst = np.append(np.arange(30) / 50, 10.0)
    assert choose_stored_frames(burst, 10.02, num_frames=4).tolist() == [0, 28, 29, 30]
    assert len(set(choose_stored_frames(burst, 10.02, num_frames=16).tolist())) == 16


def test_a_frame_at_an_absurd_time_costs_no_memory():
    assert choose_stored_frames(np.array([0, 0.5, 1e9]), 2e9, frames_per_second=7.5).tolist() == [0, 1, 2]
    assert choose_stored_frames(np.arange(5) / 30, 1 / 6, frames_per_second=1e9).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_frames", [1, 7, 24, 90])
@pytest.mark.parametrize("kept", [1, 4, 6, 100])
def test_stored_frames_begin_equal_parts(num_frames, kept):
    """Whole numbers do it for an even rate; times of containers are rounded to milliseconds."""
    timestamps, duration = constant_rate(num_frames, 30)
    expected = sorted({index * num_frames // kept for index in range(kept)})
    assert choose_stored_frames(timestamps, duration, num_frames=kept).tolist() == expected
    assert choose_stored_frames(np.round(timestamps, 3), duration, num_frames=kept).tolist() == expected


@pytest.mark.parametrize("rate", [12.5, 24, 30000 / 1001, 30, 60])
@pytest.mark.parametrize("frames_per_second", [None, 7.5, 10])
def test_views_of_an_even_rate_are_the_video_processors(rate, frames_per_second):
    for num_frames, length, num_clips in itertools.product([1, 16, 61, 240], [1, 4, 16], [1, 3, 7]):
        timestamps, duration = constant_rate(num_frames, rate)
        expected = sample_frame_indices(num_frames, length, frames_per_second, rate, num_clips)
        for times in (timestamps, np.round(timestamps, 3)):
            chosen = choose_view_clips(times, duration, length, frames_per_second, num_clips)
            assert chosen.tolist() == expected.tolist(), (num_frames, length, num_clips)


def test_views_of_uneven_times_are_the_frames_shown_at_even_ones():
    timestamps = np.array([0.0, 0.1, 0.2, 5.0, 5.1, 9.0])
    # The middles of five parts of 10 s: 1, 3, 5, 7 and 9 s.
    assert choose_view_clips(timestamps, 10.0, 5, None, 1).tolist() == [[2, 2, 3, 4, 5]]
    # A frame a second, from the one shown at (9 - 3) / 2 s: near 0.2, 1.2, 2.2 and 3.2 s.
    assert choose_view_clips(timestamps, 10.0, 4, 1.0, 1).tolist() == [[2, 2, 2, 3]]
    # An image.
    assert choose_view_clips(np.zeros(1), 0.0, 3, None, 2).tolist() == [[0, 0, 0]] * 2
