"""
Chooses the two frames of a video that make a pair. Like all choices of frames (see `frame_choice.py`) by time and not
by number, because frame rates differ between videos and vary within them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...settings import Settings, setting


Strategy = Literal["distant", "fixed_gap", "max_gap", "adjacent", "same"]


@dataclass
class FrameSampling(Settings):
    """
    Draws the indices of two frames from the times at which a video's frames start.

    Args:
        frame_sampling:
            `"distant"`: a window at a random place is split into equal segments, and the frames come from two of them,
            each at a random time (Algorithm 1: distant sampling). `"fixed_gap"`: two frames `gap_seconds` apart.
            `"max_gap"`: two different frames at most `gap_seconds` apart. `"adjacent"`: two neighbouring frames.
            `"same"`: one frame twice.
        window_seconds: length of the window; 0 takes the whole video, as a video shorter than the window always does.
            The default is the paper's stored clip: 16 frames, every 4th at 30 frames/s.
        num_segments: segments of the window.
        gap_seconds: gap for `"fixed_gap"` and `"max_gap"`. A video shorter than a fixed gap gives its first and last
            frame. Where frames are further apart than the largest gap, two neighbours are taken.

    A video of one frame gives that frame twice. A longer video gives a frame twice only with `"same"`.

    Raises:
        ArgumentsError: if a setting is out of range.
    """

    frame_sampling: Strategy = setting("distant", "which two frames of a video make a pair")
    window_seconds: float = setting(64 / 30, "window of distant sampling; 0 takes the whole video", minimum=0)
    num_segments: int = setting(2, "parts of that window; the two frames are from different ones", minimum=2)
    gap_seconds: float = setting(1.0, "seconds between the two frames (fixed_gap), at most (max_gap)", above=0)

    @property
    def span(self) -> float | None:
        """How many seconds of a video a pair needs at most; None: the whole."""
        if self.frame_sampling == "distant":
            return self.window_seconds or None
        return {"fixed_gap": self.gap_seconds, "max_gap": 2 * self.gap_seconds}.get(self.frame_sampling, 0.0)

    def sample(self, timestamps: np.ndarray, duration: float, generator: np.random.Generator) -> tuple[int, int]:
        """
        Args:
            timestamps: start of every frame in seconds, ascending from 0, of shape `(num_frames,)`.
            duration: end of the last frame in seconds.
            generator: source of randomness.

        Returns:
            Two frame indices, in order of time.
        """
        if len(timestamps) == 1:
            return 0, 0
        draw = {
            "distant": self._distant,
            "fixed_gap": self._fixed_gap,
            "max_gap": self._max_gap,
            "adjacent": self._adjacent,
            "same": self._same,
        }[self.frame_sampling]
        first, second = draw(timestamps, duration, generator)
        return int(first), int(second)

    def _distant(self, timestamps, duration, generator):
        window = min(self.window_seconds or duration, duration)
        start = generator.uniform(0, duration - window)
        # Two different segments: the second number skips the first one. (numpy's choice without replacement would be
        # 4 % of the time to make a pair from a store.)
        segment, other = int(generator.integers(self.num_segments)), int(generator.integers(self.num_segments - 1))
        segments = sorted((segment, other + (other >= segment)))
        # A random time in each, then the frame that is on the screen at that time: the last one that starts before it.
        times = [start + (segment + generator.random()) * window / self.num_segments for segment in segments]
        first, second = timestamps.searchsorted(times, side="right") - 1
        if first == second:
            # One frame is shown at both times, as in a slide show. A neighbour makes the pair differ.
            return (first, second + 1) if second + 1 < len(timestamps) else (first - 1, second)
        return first, second

    def _fixed_gap(self, timestamps, duration, generator):
        latest_start = timestamps[-1] - self.gap_seconds
        starts = np.searchsorted(timestamps, latest_start + 1e-6, side="right")  # 1e-6 s: times are rounded
        if starts == 0:
            return 0, len(timestamps) - 1
        first = generator.integers(starts)
        distances = np.abs(timestamps[first + 1 :] - timestamps[first] - self.gap_seconds)
        return first, first + 1 + np.argmin(distances)

    def _max_gap(self, timestamps, duration, generator):
        first = generator.integers(len(timestamps))
        distances = np.abs(timestamps - timestamps[first])
        distances[first] = np.inf
        near = np.flatnonzero(distances <= self.gap_seconds + 1e-6)
        second = generator.choice(near) if len(near) else np.argmin(distances)
        return min(first, second), max(first, second)

    def _adjacent(self, timestamps, duration, generator):
        first = generator.integers(len(timestamps) - 1)
        return first, first + 1

    def _same(self, timestamps, duration, generator):
        first = generator.integers(len(timestamps))
        return first, first
