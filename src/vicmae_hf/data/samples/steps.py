"""Makes views of each step of time of recordings, of several steps at once."""

from typing import Any, Literal

import numpy as np
import torch

from ...errors import MediaDecodingError
from ...video_processing_vicmae import frames_shown
from ..media.reading import MediaLoader, MediaReader
from ..sources.segments import DURATION_TOLERANCE, SteppedSource
from .frame_choice import exact_times
from .views import CropsOfProcessor, SquaresBeforeProcessor, ViewDataset, ViewProtocol


# Frames that are decoded in one go: they are in memory in the size of the video, 400 MB at 1920 x 1080.
FRAMES_IN_ONE_GO = 64


class StepDataset(ViewDataset):
    """
    The views of the steps of a `SteppedSource`. An item is as in `ViewDataset`, but its `weights` `(S, V)` have a row
    for each of its S steps. The frames of a step are the middles of `num_frames` equal parts of it: the frames of one
    clip for `task="video"`, views by themselves for "image".
    """

    source: SteppedSource

    def __init__(
        self,
        source: SteppedSource,
        preprocess: CropsOfProcessor | SquaresBeforeProcessor,
        loader: MediaLoader,
        *,
        task: Literal["image", "video"],
        num_frames: int,
    ):
        protocols = [ViewProtocol(1 if task == "video" else num_frames)]
        options = {"task": task, "num_frames": num_frames, "frames_per_second": None, "protocols": protocols}
        super().__init__(source, preprocess, loader, **options)
        self.frames_per_step = num_frames

    @property
    def max_views(self) -> int:
        num_steps = max(1 if bounds is None else len(bounds) - 1 for bounds in self.source.bounds)
        return num_steps * self.protocols[0].num_views

    def __getitem__(self, index: int) -> dict[str, Any]:
        steps = []  # frame indices of each step (S, frames), filled while the video is open

        def choose_frames(reader: MediaReader) -> np.ndarray:
            steps.append(self.choose_step_frames(index, reader))
            return np.unique(steps[0])

        return self.read(index, choose_frames, lambda frames: self.make_step_views(frames, steps[0]))

    def choose_step_frames(self, index: int, reader: MediaReader) -> np.ndarray:
        """Chooses the frames of each step of an open item, whose time 0 is the beginning of its first step."""
        bounds = self.source.bounds[index]
        if bounds is None:
            if self.source[index].is_video:
                raise MediaDecodingError(f"{self.source[index].name}: could not be opened when its steps were counted")
            return np.zeros((1, 1 if self.task == "image" else self.frames_per_step), dtype=np.int64)
        end = float(bounds[0] + reader.duration)
        if end < bounds[-1] - DURATION_TOLERANCE:  # else its steps would repeat the last frame
            raise MediaDecodingError(
                f"{self.source[index].name}: the file ends at {end:.3f} s, and its table says {bounds[-1]:.3f} s "
                "(duration_seconds). Make the table anew, or leave that column out"
            )
        parts = (np.arange(self.frames_per_step) + 0.5) / self.frames_per_step
        times = bounds[:-1, None] - bounds[0] + np.diff(bounds)[:, None] * parts  # (S, frames)
        shown = frames_shown(exact_times(reader.timestamps, reader.duration), times)
        return shown.clip(0, reader.num_frames - 1)

    def make_step_views(self, frames: torch.Tensor, steps: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames `(F, 3, H, W)`, the distinct ones of `steps` -> views `(V, T, 3, h, w)`, weights `(S, V)`."""
        clips, views_of_steps = np.unique(steps.reshape(-1, self.num_frames), axis=0, return_inverse=True)
        views = self.preprocess(frames[np.searchsorted(np.unique(steps), clips.ravel())], 1)[0]
        views = views.unflatten(0, clips.shape)  # (V, T, 3, h, w)
        weights = torch.zeros(len(steps), len(views))
        views_of_steps = torch.from_numpy(views_of_steps.reshape(len(steps), -1))
        weights.scatter_add_(1, views_of_steps, torch.full(views_of_steps.shape, 1 / views_of_steps.shape[1]))
        return views, weights
