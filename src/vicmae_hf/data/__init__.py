"""From videos, images and datasets on disk to batches of views."""

from .bad_files import BadFiles, BadFilesError
from .frame_pairs import FramePairDataset, load_frame_pairs
from .labelled import LabelledSource, open_labelled
from .loading import EpochBatchSampler, build_dataloader
from .media import MediaLoader
from .sampling import FrameSampling
from .sources import DataSourceError, open_source
from .streaming import FramePairStream, build_stream_dataloader
from .video import VideoDecodingError, open_video
from .views import ViewDataset, ViewProtocol, build_test_views


__all__ = [
    "BadFiles",
    "BadFilesError",
    "DataSourceError",
    "EpochBatchSampler",
    "FramePairDataset",
    "FramePairStream",
    "FrameSampling",
    "LabelledSource",
    "MediaLoader",
    "VideoDecodingError",
    "ViewDataset",
    "ViewProtocol",
    "build_dataloader",
    "build_stream_dataloader",
    "build_test_views",
    "load_frame_pairs",
    "open_labelled",
    "open_source",
    "open_video",
]
