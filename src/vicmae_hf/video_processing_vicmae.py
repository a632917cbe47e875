"""Deterministic preprocessing of videos: decoding, frame sampling, test views, crops, ImageNet normalisation."""

import os
from collections.abc import Callable

import numpy as np
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    is_pil_image,
    is_valid_image,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType, is_av_available, logging, requires_backends
from transformers.video_processing_utils import BaseVideoProcessor, BatchFeature
from transformers.video_utils import (
    VideoInput,
    VideoMetadata,
    group_videos_by_shape,
    make_batched_videos,
    reorder_videos,
)


# Arrays and tensors can be processed without PyAV, and this file must import where it is missing.
if is_av_available():
    import av

logger = logging.get_logger(__name__)


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
    """Chooses the frames of `num_clips` clips of a video by time, without chance.

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
    """Chooses the frames of `num_clips` clips of a video whose frames follow each other evenly.

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
            f"Sampling at fps={fps} needs the video's own frame rate, got None. Pass it as `video_metadata`, or "
            "sample with `num_frames` alone."
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


def read_video(
    video: str, sample_indices_fn: Callable[..., np.ndarray] | None = None
) -> tuple[torch.Tensor, VideoMetadata]:
    """Decodes frames of a file or URL, upright (the rotation in its metadata is applied).

    The frames are decoded in order from the first to the last wanted one. This is exact for every codec. The decoders
    of Transformers, which seek, are not (decord is a frame off on HEVC), and save nothing when the frames are spread
    over the video. (Training has a faster decoder, data/media/video.py. It does not travel to the Hub with this file.)

    Args:
        video (`str`): Path or URL.
        sample_indices_fn (`Callable`, *optional*): Called with `metadata=VideoMetadata`, returns the indices of the
            wanted frames, in any order and with repetitions. All frames if it is not given.

    Returns:
        Frames (T, 3, H, W), uint8, in the order of the indices; metadata with `frames_indices`.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if PyAV is not installed.
        ValueError: if the file holds no video, or cannot be decoded.
    """
    requires_backends(read_video, ["av"])
    if sample_indices_fn is None:
        sample_indices_fn = all_frame_indices
    try:
        with av.open(video) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError(f"{video}: expected a file with a video stream, found none.")
            stream.thread_type = "AUTO"  # one file at a time, so it may use all cores
            frame_rate = stream.average_rate or stream.guessed_rate
            metadata = VideoMetadata(
                # Some containers don't state their number of frames; then packets are counted.
                total_num_frames=stream.frames or sum(packet.size > 0 for packet in container.demux(stream)),
                fps=float(frame_rate) if frame_rate else None,
                video_backend="pyav",
            )
            indices = sample_indices_fn(metadata=metadata)
            frames, num_decoded = decode_frames(container, stream, indices)
            # Headers may promise more frames than there are. Then we choose again among those that are there.
            if 0 < num_decoded <= max(indices):
                logger.warning(
                    f"{video}: expected {metadata.total_num_frames} frames, found {num_decoded}; sampling those."
                )
                metadata.total_num_frames = num_decoded
                indices = sample_indices_fn(metadata=metadata)
                frames, num_decoded = decode_frames(container, stream, indices)
    except av.error.InvalidDataError as error:
        raise ValueError(f"{video}: expected a video that can be decoded, got: {error}.") from error
    if num_decoded == 0:
        raise ValueError(f"{video}: expected at least one frame, found none.")

    pixels = torch.from_numpy(np.stack([frames[index] for index in indices])).permute(0, 3, 1, 2)  # (T, 3, H, W)
    metadata.frames_indices = indices
    metadata.height, metadata.width = pixels.shape[-2:]
    if metadata.fps is not None:
        metadata.duration = metadata.total_num_frames / metadata.fps
    return pixels, metadata


def all_frame_indices(metadata: VideoMetadata) -> np.ndarray:
    return np.arange(metadata.total_num_frames)


def decode_frames(container, stream, indices: np.ndarray) -> tuple[dict[int, np.ndarray], int]:
    """Decodes from the start to the last of `indices`: those frames (H, W, 3) by index, and how many were decoded."""
    wanted, last = set(indices.tolist()), max(indices)
    frames, num_decoded = {}, 0
    container.seek(0)
    for frame in container.decode(stream):
        if num_decoded in wanted:
            # Degrees anticlockwise. Cameras turn by quarters only.
            frames[num_decoded] = np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)
        num_decoded += 1
        if num_decoded > last:
            break
    return frames, num_decoded


class ViCMAEVideoProcessorKwargs(VideosKwargs, total=False):
    """
    num_clips (`int`): Temporal test views: clips that are sampled from each video.
    num_crops (`int`): Spatial test views: crops along the longer side of each frame.
    """

    num_clips: int
    num_crops: int


class ViCMAEVideoProcessor(BaseVideoProcessor):
    """Preprocesses videos: frame sampling, short side to 256, centre crop of 224, ImageNet normalisation.

    Videos are paths or URLs, arrays or tensors (T, C, H, W) or (T, H, W, C), or lists of frames (PIL images, arrays,
    tensors), one or a list of them, of 1, 3 or 4 channels. Gray becomes RGB, transparency is blended with white.

    The output `pixel_values` is (B, T, 3, H, W), float32; with several test views (B, V, T, 3, H, W), where
    V = `num_clips` * `num_crops` and the crops of a clip follow each other (the paper's 3x7 views, spatial x temporal:
    `num_crops=3, num_clips=7`).

    `do_sample_frames=True` chooses frames by `num_frames` and `fps` (see `sample_frame_indices`); without it all
    frames are used. A file shorter than a clip repeats frames. Frames in memory are repeated if they come with their
    `fps` in `video_metadata`; without it, fewer than `num_frames` are an error, as elsewhere in Transformers.

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

    def preprocess(self, videos: VideoInput, **kwargs: Unpack[ViCMAEVideoProcessorKwargs]) -> BatchFeature:
        num_clips = kwargs.get("num_clips", self.num_clips)
        if num_clips != 1 and not kwargs.get("do_sample_frames", self.do_sample_frames):
            raise ValueError(f"Expected do_sample_frames=True with num_clips={num_clips}, got False.")
        do_convert_rgb = kwargs.get("do_convert_rgb", self.do_convert_rgb)
        input_data_format = kwargs.pop("input_data_format", self.input_data_format)
        videos = make_batched_videos(prepare_frames(videos, do_convert_rgb))
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
        indices = sample_frame_indices(metadata.total_num_frames, num_frames, fps, metadata.fps, num_clips)
        return indices.reshape(-1)

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """(T, 1 | 3 | 4, H, W) -> (T, 3, H, W), frame by frame as images are converted."""
        if video.shape[1] == 3:
            return video
        return torch.stack([TorchvisionBackend.convert_to_rgb(self, frame, ChannelDimension.FIRST) for frame in video])

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


def prepare_frames(videos: VideoInput, do_convert_rgb: bool):
    """Checks `videos` at any nesting. Paths become strings, and PIL images arrays: else their modes would be lost."""
    if isinstance(videos, list | tuple):
        if not videos:
            raise ValueError("Expected at least one video with at least one frame, got an empty list.")
        return [prepare_frames(video, do_convert_rgb) for video in videos]
    if isinstance(videos, os.PathLike):
        return os.fspath(videos)
    if is_pil_image(videos):
        return convert_to_rgb(videos, return_numpy=True) if do_convert_rgb else np.array(videos)
    if is_valid_image(videos) and (videos.ndim not in (3, 4, 5) or 0 in videos.shape):
        raise ValueError(
            "Expected frames (C, H, W) or (H, W, C), videos (T, C, H, W) or (T, H, W, C), or batches of videos, with "
            f"at least one frame and one pixel, got an array of shape {tuple(videos.shape)}."
        )
    return videos


def channels_first(video: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
    """(T, C, H, W) or (T, H, W, C) -> (T, C, H, W)."""
    channels = (1, 3, 4)
    if input_data_format is None:
        input_data_format = ChannelDimension.FIRST if video.shape[1] in channels else ChannelDimension.LAST
    # Contiguous, because torch takes no arrays with negative strides, as flipped ones have.
    frames = torch.as_tensor(np.ascontiguousarray(video) if isinstance(video, np.ndarray) else video)
    if input_data_format == ChannelDimension.LAST:
        frames = frames.permute(0, 3, 1, 2)
    if frames.shape[1] not in channels:
        raise ValueError(
            "Expected a video (T, C, H, W) or (T, H, W, C) with 1, 3 or 4 channels, got one of shape "
            f"{tuple(video.shape)}."
        )
    return frames


# With this, saved processors carry this file.
ViCMAEVideoProcessor.register_for_auto_class()

__all__ = ["ViCMAEVideoProcessor", "sample_frame_indices", "spatial_crop_offsets"]
