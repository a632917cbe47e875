"""From videos, images and datasets on disk to batches of views."""

from .bad_files import BadFiles, BadFilesError
from .frame_pairs import FramePairDataset, load_frame_pairs
from .loading import EpochBatchSampler, build_dataloader
from .media import MediaLoader
from .sampling import FrameSampling
from .sources import DataSourceError, open_source
from .video import VideoDecodingError, open_video


__all__ = [
    "BadFiles",
    "BadFilesError",
    "DataSourceError",
    "EpochBatchSampler",
    "FramePairDataset",
    "FrameSampling",
    "MediaLoader",
    "VideoDecodingError",
    "build_dataloader",
    "load_frame_pairs",
    "open_source",
    "open_video",
]
