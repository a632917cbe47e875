"""decord and torchcodec: decoders that may take PyAV's place where they return the same frames.

Both return wrong frames of some videos, without an error (docs/decoding.md, "Traps"). So each of them first looks at
the index that PyAV has read. It refuses such a video with a `BackendError`, and PyAV decodes it.
"""

import functools
import io

import av
import torch

from ...errors import InputError
from .odd_videos import is_fragmented
from .video import SEEKABLE_CONTAINERS, BackendError, PyAVDecoder, first_line, raised_as_backend_error


class DecordDecoder:
    """
    decord counts frames from the keyframe before the wanted one. It finds the right frame only in closed groups of
    pictures (see `groups_are_closed` of `PyAVDecoder`), and was compared with PyAV in MP4, MOV and Matroska only.
    """

    @staticmethod
    @functools.cache
    def import_library():
        import decord  # here, because its wheel does not load on every machine

        decord.logging.set_level(decord.logging.QUIET)  # what matters arrives as exceptions
        return decord

    def __init__(self, source: str | bytes, index: PyAVDecoder):
        if not index.groups_are_closed:
            raise BackendError("seeking by count finds wrong frames here (open groups of pictures, or no frame times)")
        container, stream = index.container, index.stream
        is_known = container.format.name in SEEKABLE_CONTAINERS and stream.codec_context.name != "hevc"
        if not is_known or is_fragmented(container, stream):
            raise BackendError("it finds wrong frames in some files of this kind, or crashes")
        if "matroska" in container.format.name and is_turned(index):
            raise BackendError("it does not know the rotation metadata of Matroska")
        decord = self.import_library()
        # decord raises errors of its own from native code, and others from its Python code.
        self._errors = (decord.DECORDError, RuntimeError, AssertionError)
        with raised_as_backend_error(*self._errors):
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            self._reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
        # Edit lists that hide frames confuse its count: every index behind them would be wrong.
        if len(self._reader) != len(index.timestamps):
            raise BackendError(f"it counts {len(self._reader)} frames instead of {len(index.timestamps)}")

    def decode(self, indices: list[int]) -> torch.Tensor:
        """Returns the frames (T, H, W, 3), uint8, at `indices`, which are sorted and differ."""
        with raised_as_backend_error(*self._errors):
            return torch.from_numpy(self._reader.get_batch(indices).asnumpy())


def is_turned(index: PyAVDecoder) -> bool:
    """Whether the pictures of a video are stored otherwise than upright."""
    with raised_as_backend_error(av.FFmpegError, StopIteration):
        return next(index._decode_packets(index._packets_from(0))).rotation != 0


class TorchCodecDecoder:
    """torchcodec, with the FFmpeg libraries that are installed on the machine."""

    @staticmethod
    @functools.cache
    def import_library():
        import torchcodec

        # Importing succeeds without FFmpeg. Only decoding would fail, and for every file.
        if torchcodec.ffmpeg_major_version is None:
            raise ImportError("it finds no FFmpeg libraries on this machine")
        return torchcodec

    def __init__(self, source: str | bytes, index: PyAVDecoder):
        # Both would pass without an error, with frames in a wrong order or with half a picture in them.
        if not index.has_times:
            raise BackendError("it orders frames by their times, which are missing here")
        if not index.keyframes_are_entries:
            raise BackendError("it returns incomplete pictures after a recovery point")
        with raised_as_backend_error(RuntimeError, ValueError):
            self._decoder = self.import_library().decoders.VideoDecoder(
                source, stream_index=index.stream.index, dimension_order="NHWC", num_ffmpeg_threads=1
            )
        if len(self._decoder) != len(index.timestamps):
            raise BackendError(f"it counts {len(self._decoder)} frames instead of {len(index.timestamps)}")

    def decode(self, indices: list[int]) -> torch.Tensor:
        """Returns the frames (T, H, W, 3), uint8, at `indices`, which are sorted and differ."""
        with raised_as_backend_error(RuntimeError, ValueError):
            return self._decoder.get_frames_at(indices).data


OTHER_DECODERS = {"decord": DecordDecoder, "torchcodec": TorchCodecDecoder}
BACKENDS = (*OTHER_DECODERS, "pyav")


def check_backend(backend: str) -> None:
    """Raises an InputError if there is no such backend, or it is not installed."""
    if backend not in BACKENDS:
        raise InputError(f"Unknown video backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    try:
        if backend != "pyav":
            OTHER_DECODERS[backend].import_library()
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"The video backend {backend!r} cannot be used: {first_line(error)}. Install it (see docs/decoding.md), "
            f"or choose another one of {', '.join(BACKENDS)}."
        ) from error
