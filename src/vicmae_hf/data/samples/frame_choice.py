"""
Chooses frames of a video for random clips, test views and stores. All choose by time and not by number, because frame
rates differ between videos and vary within them. `frame_sampling.py` does it for pairs.
"""

from dataclasses import dataclass

import numpy as np

from ...errors import InputError
from ...video_processing_vicmae import choose_clips, frames_shown, nearest_frames
from ..media.video import warn_once


# Seconds: many containers keep times to the millisecond.
CONTAINER_ROUNDING = 1e-3


@dataclass(frozen=True)
class ClipSampling:
    """
    Draws the frames of a training clip from the times at which a video's frames start.

    Args:
        num_frames: frames of a clip.
        frames_per_second: of the clip, which starts at a random frame (the paper: 16 frames, every 4th at 30 frames/s,
            that is 7.5). A clip that is longer than the video repeats the last frame. 0 spreads the frames over the
            whole video instead: one at a random time in each of `num_frames` equal segments, as on
            Something-Something.

    Raises:
        InputError: if a setting is out of range.
    """

    num_frames: int
    frames_per_second: float = 7.5

    def __post_init__(self):
        if self.num_frames < 1:
            raise InputError(f"num_frames must be at least 1, got {self.num_frames}.")
        if not self.frames_per_second >= 0:
            raise InputError(
                f"frames_per_second must be at least 0 (0: the whole video), got {self.frames_per_second}."
            )

    @property
    def span(self) -> float | None:
        """How many seconds of a video a clip needs; None: the whole."""
        return self.num_frames / self.frames_per_second if self.frames_per_second else None

    def sample(self, timestamps: np.ndarray, duration: float, generator: np.random.Generator) -> np.ndarray:
        """Draws frame indices `(num_frames,)`, ascending; arguments as in `FrameSampling.sample`."""
        steps = np.arange(self.num_frames)
        if self.frames_per_second == 0:
            times = (steps + generator.uniform(size=self.num_frames)) * duration / self.num_frames
            return np.searchsorted(timestamps, times, side="right") - 1
        offsets = steps / self.frames_per_second
        num_starts = np.searchsorted(timestamps, timestamps[-1] - offsets[-1] + CONTAINER_ROUNDING, side="right")
        start = generator.integers(max(num_starts, 1))  # a video shorter than the clip: from its first frame
        return nearest_frames(timestamps, timestamps[start] + offsets)


def warn_of_repetitions(name: str, timestamps: np.ndarray, frames_per_second: float | None) -> None:
    """Says once that clips of `frames_per_second` show every frame four times or more, as those of a slow camera."""
    if not frames_per_second or len(timestamps) < 2:
        return
    seconds = (timestamps[-1] - timestamps[0]) / (len(timestamps) - 1)
    if seconds * frames_per_second >= 4:
        warn_once(
            "repetitions",
            "%s has a frame every %.3g s, so a clip of %g frames per second shows each of them many times. Choose "
            "fewer frames per second, spread a clip over the whole video, or count frames in place of seconds "
            "(--nominal_frames_per_second). Not said again for further files.",
            *(name, seconds, frames_per_second),
        )


def choose_view_clips(
    timestamps: np.ndarray, duration: float, num_frames: int, frames_per_second: float | None, num_clips: int
) -> np.ndarray:
    """
    Chooses the frames of test views, without chance, by the rule of the video processor (see `choose_clips` there)
    and the times of the file: indices `(num_clips, num_frames)`. `timestamps` and `duration` as in `FrameSampling`;
    `frames_per_second` None spreads a clip over the whole video.
    """
    return choose_clips(exact_times(timestamps, duration), duration, num_frames, frames_per_second, num_clips)


def choose_stored_frames(
    timestamps: np.ndarray, duration: float, frames_per_second: float | None = None, num_frames: int | None = None
) -> np.ndarray:
    """
    Chooses the frames of a video that a frame store keeps: ascending indices that begin with 0.

    Args:
        timestamps, duration: as in `FrameSampling.sample`.
        frames_per_second: takes the frames nearest to even times at this rate, each once; 0 takes all.
        num_frames: takes the frames shown at the start of `num_frames` equal parts, or, where that is one frame
            several times, its neighbours too; all frames if there are not more.
    """
    if num_frames is not None:
        places = np.arange(min(num_frames, len(timestamps)))
        shown = frames_shown(exact_times(timestamps, duration), places * duration / len(places))
        # A frame that is shown for long counts once; those next to it, earlier at the end, fill up the number.
        distinct = np.maximum.accumulate(shown - places) + places
        return np.minimum(distinct, len(timestamps) - len(places) + places)
    if frames_per_second == 0:
        return np.arange(len(timestamps))
    # A frame is the nearest from halfway after the frame before to halfway before the next frame. It is kept if one of
    # the even times lies there. 1e-6 s: times in files are rounded.
    ends = np.append((timestamps[1:] + timestamps[:-1]) / 2 - 1e-6, timestamps[-1] + 1e-6)
    return np.flatnonzero(np.diff(np.floor(ends * frames_per_second), prepend=-1) > 0)


def exact_times(timestamps: np.ndarray, duration: float) -> np.ndarray:
    """
    Returns `timestamps` without the rounding of containers, if the frame rate is constant. Otherwise a frame that
    starts exactly at the time asked for would be taken from one container and missed in another.
    """
    even = np.arange(len(timestamps)) * duration / len(timestamps)
    return even if np.abs(timestamps - even).max() <= CONTAINER_ROUNDING else timestamps
