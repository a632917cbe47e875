"""Deterministic preprocessing of videos: decoding, frame sampling, test views, crops, ImageNet normalisation."""

from collections.abc import Callable

import numpy as np
import torch
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType
from transformers.video_processing_utils import BaseVideoProcessor, BatchFeature
from transformers.video_utils import (
    VideoInput,
    VideoMetadata,
    group_videos_by_shape,
    make_batched_videos,
    reorder_videos,
)


# Seconds: times are sums of rounded numbers. A frame that starts exactly at the time asked for must count as shown.
TIME_TOLERANCE = 1e-6


def frames_shown(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Finds the frames that are on the screen at `times`, from the starts of all frames, both in seconds."""
    return np.searchsorted(timestamps, times + TIME_TOLERANCE, side="right") - 1


def nearest_frames(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Finds the frames that start nearest to `times`; halfway between two, the later one."""
    borders = (timestamps[1:] + timestamps[:-1]) / 2
    return np.searchsorted(borders, times + TIME_TOLERANCE, side="right")


def choose_clips(
    timestamps: np.ndarray, duration: float, num_frames: int, fps: float | None = None, num_clips: int = 1
) -> np.ndarray:
    """Chooses the frames of `num_clips` clips of a video by time, deterministically.

    - without `fps`: uniform over the whole video, as on Something-Something v2. The video is cut into `num_frames`
      equal segments. Clip k of K takes from each segment the frame that is shown at the fraction (k + 1/2) / K, so a
      single clip takes the middles. A video of fewer frames repeats them.
    - with `fps`: dense, as on Kinetics (16 frames, every 4th of 30 per second: `fps=7.5`). One clip lies in the middle
      of the video; several are spread from its start to its end. Each begins with a frame and takes the frames nearest
      to even steps from there. A clip that is longer than the video repeats the last frame.

    Args:
        timestamps (`np.ndarray` of shape (T,)): Start of each frame in seconds, ascending from 0.
        duration (`float`): End of the last frame in seconds.
        num_frames, fps, num_clips: See `sample_frame_indices`.

    Returns:
        `np.ndarray` of shape (num_clips, num_frames): indices in [0, T), int64.
    """
    clips = np.arange(num_clips)[:, None]  # (num_clips, 1)
    frames = np.arange(num_frames)[None]  # (1, num_frames)
    if fps is None:
        return frames_shown(timestamps, (frames + (clips + 0.5) / num_clips) * duration / num_frames)
    offsets = frames / fps
    room = max(timestamps[-1] - offsets[0, -1], 0)  # by how much the start of a clip may move
    starts = room * clips / (num_clips - 1) if num_clips > 1 else np.array([[room / 2]])
    return nearest_frames(timestamps, timestamps[frames_shown(timestamps, starts)] + offsets)


def sample_frame_indices(
    total_num_frames: int,
    num_frames: int | None = None,
    fps: float | None = None,
    video_fps: float | None = None,
    num_clips: int = 1,
) -> np.ndarray:
    """Chooses the frames of `num_clips` clips of a video whose frames are evenly spaced in time.

    With `num_frames`, the rule is that of `choose_clips`. With `fps` alone, a clip has as many frames as the video
    lasts at that rate, at least one. With neither, one clip has every frame.

    Args:
        total_num_frames (`int`): Frames in the video.
        num_frames (`int`, *optional*): Frames per clip.
        fps (`float`, *optional*): Frames per second of the clip.
        video_fps (`float`, *optional*): Frames per second of the video; needed with `fps`.
        num_clips (`int`, *optional*, defaults to 1): Clips per video, temporal test views.

    Returns:
        `np.ndarray` of shape (num_clips, frames per clip): indices in [0, total_num_frames), int64.

    Raises:
        ValueError: for counts below 1, rates that are not positive, `fps` without `video_fps`, and several clips
            without `num_frames` or `fps`.
    """
    check_sampling(total_num_frames, num_frames, fps, video_fps, num_clips)
    if num_frames is None and fps is None:
        return np.arange(total_num_frames)[None]
    rate = 1.0 if video_fps is None else video_fps  # without fps, the unit of time does not matter
    timestamps, duration = np.arange(total_num_frames) / rate, total_num_frames / rate
    if num_frames is None:
        return choose_clips(timestamps, duration, max(1, int(duration * fps)), num_clips=num_clips)
    return choose_clips(timestamps, duration, num_frames, fps, num_clips)


def check_sampling(
    total_num_frames: int, num_frames: int | None, fps: float | None, video_fps: float | None, num_clips: int
) -> None:
    """Raises the ValueErrors of `sample_frame_indices`."""
    counts = {"total_num_frames": total_num_frames, "num_frames": num_frames, "num_clips": num_clips}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"Expected {name} to be at least 1, got {count}.")
    for name, rate in {"fps": fps, "video_fps": video_fps}.items():
        if rate is not None and not rate > 0:
            raise ValueError(f"Expected {name} to be positive, got {rate}.")
    if fps is not None and video_fps is None:
        raise ValueError(
            f"Sampling at fps={fps} needs the video's own frame rate, got None. Pass it as `video_metadata`, or pass "
            "exactly `num_frames` frames, or sample with `num_frames` alone."
        )
    if num_frames is None and fps is None and num_clips > 1:
        raise ValueError(f"Expected num_clips=1 without num_frames or fps, got num_clips={num_clips}.")


def spatial_crop_offsets(length: int, crop_length: int, num_crops: int) -> list[int]:
    """Offsets in pixels of `num_crops` crops along a side of `length` pixels, evenly spaced from edge to edge.

    One crop lies in the centre; three are left, centre and right (top, centre and bottom). Fewer than one are refused.
    """
    if num_crops < 1:
        raise ValueError(f"Expected num_crops to be at least 1, got {num_crops}.")
    room = max(length - crop_length, 0)
    if num_crops == 1:
        return [room // 2]
    return [room * crop // (num_crops - 1) for crop in range(num_crops)]


class ViCMAEVideoProcessorKwargs(VideosKwargs, total=False):
    """
    num_clips (`int`): Temporal test views: clips that are sampled from each video.
    num_crops (`int`): Spatial test views: crops along the longer side of each frame.
    image_range (`str`): See `ViCMAEImageProcessorKwargs`; for frames in memory.
    """

    num_clips: int
    num_crops: int
    image_range: str


class ViCMAEVideoProcessor(BaseVideoProcessor):
    """Preprocesses videos: frame sampling, short side to 256, centre crop of 224, ImageNet normalisation.

    Videos are paths or URLs, arrays or tensors (T, C, H, W) or (T, H, W, C), or lists of frames (PIL images, arrays,
    tensors), one or a list of them, of 1, 3 or 4 channels. They become RGB of 8 bits as images do (see the image
    processor).

    The output `pixel_values` is (B, T, 3, H, W), float32; with several test views (B, V, T, 3, H, W), where
    V = `num_clips` * `num_crops` and the crops of a clip follow each other (the paper's 3x7 views, spatial x temporal:
    `num_crops=3, num_clips=7`).

    `do_sample_frames=True` chooses frames by `num_frames` and `fps` (see `sample_frame_indices`); without it all
    frames are used. A file shorter than a clip repeats frames. Frames in memory are repeated if they come with their
    `fps` in `video_metadata`; without it, `num_frames` of them are a clip, and fewer are an error.

    Raises:
        ValueError: for empty input, a wrong number of channels, more frames wanted than there are in memory, `fps`
            without the video's frame rate, several clips without sampling, several crops without `do_center_crop`,
            and files that cannot be decoded.
    """

    valid_kwargs = ViCMAEVideoProcessorKwargs
    model_input_names = ["pixel_values"]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_sample_frames = False
    num_clips = 1
    num_crops = 1
    image_range = "type"

    def preprocess(self, videos: VideoInput, **kwargs: Unpack[ViCMAEVideoProcessorKwargs]) -> BatchFeature:
        num_clips = kwargs.get("num_clips", self.num_clips)
        if num_clips != 1 and not kwargs.get("do_sample_frames", self.do_sample_frames):
            raise ValueError(f"Expected do_sample_frames=True with num_clips={num_clips}, got False.")
        do_convert_rgb = kwargs.get("do_convert_rgb", self.do_convert_rgb)
        input_data_format = kwargs.pop("input_data_format", self.input_data_format)
        from .media_reading_vicmae import channels_first, prepare_frames  # see the image processor

        image_range = kwargs.get("image_range", self.image_range)
        videos = make_batched_videos(prepare_frames(videos, do_convert_rgb, image_range))
        videos = [
            video if isinstance(video, str | list) else channels_first(video, input_data_format) for video in videos
        ]
        return super().preprocess(videos, input_data_format=ChannelDimension.FIRST, **kwargs)

    def fetch_videos(self, video_url_or_urls, sample_indices_fn: Callable[..., np.ndarray] | None = None):
        """Decodes with PyAV, because the library's own method needs torchcodec and an installed FFmpeg."""
        if isinstance(video_url_or_urls, list):
            return list(
                zip(*(self.fetch_videos(video, sample_indices_fn) for video in video_url_or_urls), strict=True)
            )
        from .media_reading_vicmae import read_video  # here, because training has a reader of its own

        return read_video(video_url_or_urls, sample_indices_fn)

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        num_clips: int | None = None,
        **kwargs,
    ) -> np.ndarray:
        """Chooses the frames of all clips, clip after clip: indices (num_clips * frames per clip)."""
        num_frames = num_frames if num_frames is not None else self.num_frames
        fps = fps if fps is not None else self.fps
        num_clips = num_clips if num_clips is not None else self.num_clips
        if metadata.fps is None and num_frames is not None and num_frames > metadata.total_num_frames:
            raise ValueError(
                f"Expected at least num_frames={num_frames} frames, got {metadata.total_num_frames}. To repeat "
                "frames, pass `video_metadata` with their `fps`; to take them as they are, `do_sample_frames=False`."
            )
        if metadata.fps is None and num_frames == metadata.total_num_frames and num_clips == 1:
            return np.arange(num_frames)  # somebody has chosen them already
        indices = sample_frame_indices(metadata.total_num_frames, num_frames, fps, metadata.fps, num_clips)
        return indices.reshape(-1)

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """(T, 1 | 3 | 4, H, W) -> (T, 3, H, W), as images are converted: transparency is left out."""
        return video[:, :3] if video.shape[1] > 1 else video.expand(-1, 3, -1, -1)

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        num_clips: int,
        num_crops: int,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        if num_crops > 1 and not do_center_crop:
            raise ValueError(f"Expected do_center_crop=True with num_crops={num_crops}, got {do_center_crop}.")
        grouped_videos, grouped_videos_index = group_videos_by_shape(videos)
        for shape, frames in grouped_videos.items():  # (B, num_clips * T, C, H, W): one group for each size of frames
            if do_resize:
                frames = self.resize(frames, size=size, resample=resample)
            crops = self.crop_along_longer_side(frames, crop_size, num_crops) if do_center_crop else [frames]
            views = torch.stack(crops, dim=1).unflatten(2, (num_clips, -1))  # (B, num_crops, num_clips, T, C, H, W)
            views = views.transpose(1, 2).flatten(1, 2)  # (B, num_clips * num_crops, T, C, H, W)
            views = self.rescale_and_normalize(views, do_rescale, rescale_factor, do_normalize, image_mean, image_std)
            # A single view gets no axis of its own, as in other processors.
            grouped_videos[shape] = views.squeeze(1) if views.shape[1] == 1 else views
        pixel_values = reorder_videos(grouped_videos, grouped_videos_index)
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def crop_along_longer_side(self, videos: torch.Tensor, crop_size: SizeDict, num_crops: int) -> list[torch.Tensor]:
        """Cuts `num_crops` crops of videos (..., H, W), evenly along the longer side, in the centre of the other."""
        height, width = videos.shape[-2:]
        axis, length, crop_length = (-2, height, crop_size.height) if height > width else (-1, width, crop_size.width)
        offsets = spatial_crop_offsets(length, crop_length, num_crops)
        # A side shorter than the crop is taken whole, and `center_crop` pads it.
        windows = [videos.narrow(axis, offset, min(crop_length, length)) for offset in offsets]
        return [self.center_crop(window, crop_size) for window in windows]


# With this, saved processors carry this file.
ViCMAEVideoProcessor.register_for_auto_class()

__all__ = ["ViCMAEVideoProcessor", "sample_frame_indices", "spatial_crop_offsets"]
