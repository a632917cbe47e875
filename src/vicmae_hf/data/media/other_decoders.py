"""Decoders that may take PyAV's place where they return the same frames: decord and torchcodec."""

import functools
import io

import torch

from .video import BackendError, PyAVDecoder, raised_as_backend_error


class DecordDecoder:
    """decord counts frames from the keyframe before the wanted one, which is right in closed groups of pictures."""

    @staticmethod
    @functools.cache
    def import_library():
        import decord

        decord.logging.set_level(decord.logging.QUIET)  # what matters arrives as exceptions
        return decord

    def __init__(self, source: str | bytes, index: PyAVDecoder):
        if not index.groups_are_closed:
            raise BackendError("seeking by count finds wrong frames here (open groups of pictures, or no frame times)")
        if "matroska" in index.container_format and index.rotation():
            raise BackendError("it does not know the rotation metadata of Matroska")
        decord = self.import_library()
        self._errors = (decord.DECORDError, RuntimeError, AssertionError)
        with raised_as_backend_error(*self._errors):
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            self._reader = decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
        if len(self._reader) != len(index.timestamps):
            raise BackendError(f"it counts {len(self._reader)} frames instead of {len(index.timestamps)}")

    def decode(self, indices: list[int]) -> torch.Tensor:
        """Frames (T, H, W, 3), uint8, at `indices`, which are sorted and differ."""
        with raised_as_backend_error(*self._errors):
            return torch.from_numpy(self._reader.get_batch(indices).asnumpy())


class TorchCodecDecoder:
    """torchcodec, with the FFmpeg libraries that are installed on the machine."""

    @staticmethod
    @functools.cache
    def import_library():
        import torchcodec

        if torchcodec.ffmpeg_major_version is None:
            raise ImportError("it finds no FFmpeg libraries on this machine")
        return torchcodec

    def __init__(self, source: str | bytes, index: PyAVDecoder):
        if not index.has_times:
            raise BackendError("it orders frames by their times, which are missing here")
        if not index.keyframes_are_entries:
            raise BackendError("it takes unfinished pictures after a recovery point for frames")
        with raised_as_backend_error(RuntimeError, ValueError):
            self._decoder = self.import_library().decoders.VideoDecoder(
                source, stream_index=index.stream_index, dimension_order="NHWC", num_ffmpeg_threads=1
            )
        if len(self._decoder) != len(index.timestamps):
            raise BackendError(f"it counts {len(self._decoder)} frames instead of {len(index.timestamps)}")

    def decode(self, indices: list[int]) -> torch.Tensor:
        """Frames (T, H, W, 3), uint8, at `indices`, which are sorted and differ."""
        with raised_as_backend_error(RuntimeError, ValueError):
            return self._decoder.get_frames_at(indices).data


OTHER_DECODERS = {"decord": DecordDecoder, "torchcodec": TorchCodecDecoder}
