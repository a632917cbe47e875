"""Decodes videos with PyAV; `other_decoders.py` has the alternatives. `open_video` hides which library is used.

Most frames of a video are stored as differences from other frames. Only keyframes are whole, so decoding starts at the
keyframe before a wanted frame. PyAV first reads the packets (encoded frames) of every video, without decoding them.
Their presentation times are the index: how many frames there are, when each is shown, from which keyframe each can be
decoded. A backend then decodes the few frames that are asked for. Where it fails, or would return wrong frames, PyAV
decodes them instead. docs/decoding.md has the measurements, and the traps behind what is done here.
"""

import contextlib
import io
import itertools
import logging
import math
import operator
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from ...errors import InputError, MediaDecodingError


logger = logging.getLogger(__name__)

# Three times 8K. Some kilobytes may unpack to larger frames, and a clip of them would fill the memory.
MAX_FRAME_PIXELS = 100_000_000


class VideoDecodingError(MediaDecodingError):
    """
    A video cannot be decoded.

    Attributes:
        path: the file, or how many bytes it was read from.
        reasons: what each backend that was tried met with, by its name.
    """

    def __init__(self, path: str, reasons: dict[str, str]):
        self.path = path
        self.reasons = reasons
        super().__init__(f"cannot decode {path}: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))

    def __reduce__(self):  # pickle, by which workers send it, would call __init__ with the message alone
        return type(self), (self.path, self.reasons)


class BackendError(Exception):
    """One backend cannot decode a video correctly. PyAV takes over; users never see this error."""


@contextlib.contextmanager
def raised_as_backend_error(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise BackendError(one_line(error)) from error


class PyAVDecoder:
    """
    Decodes from the keyframe before a frame up to that frame, and recognises the frame by its presentation time.

    Every `VideoReader` has one, because it is also the index of the video. Every method may raise `BackendError`.

    Attributes:
        timestamps: float64 array (T,), seconds.
        duration: seconds.
        has_times: whether the file says when frames are shown. If not, frames can only be counted from the start.
        keyframes_are_entries: whether every frame from a keyframe on is complete when decoding starts there.
        groups_are_closed: whether one can seek to a keyframe and count frames from there to the right one.
    """

    # In these codecs no other frame needs a frame that is marked as "no reference". It can be skipped on the way to a
    # wanted frame, which makes PyAV fastest. (In HEVC the temporal layers above such a frame may still need it.)
    CODECS_WITH_SKIPPABLE_FRAMES = ("h264", "mpeg4")

    def __init__(self, source: str | bytes):
        with raised_as_backend_error(av.FFmpegError, OSError):
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            self._container = av.open(file, metadata_errors="ignore")  # titles may be wrongly encoded
        try:
            self._stream = self._container.streams.best("video")
            if self._stream is None or self._stream.disposition & Disposition.attached_pic:
                raise BackendError("it has no video stream")
            self._codec = self._stream.codec_context
            if self._codec is None:
                raise BackendError("its codec is unknown")
            self._codec.thread_count = 1  # workers already use all cores
            self._size = (self._stream.width, self._stream.height)  # of all frames, even if it changes on the way
            if math.prod(self._size) > MAX_FRAME_PIXELS:
                size = "{}x{}".format(*self._size)
                raise BackendError(f"its frames have {size} pixels, and at most {MAX_FRAME_PIXELS:,} are read")
            self._reformatter = VideoReformatter()
            with raised_as_backend_error(av.FFmpegError):
                self._read_index()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._container.close()

    def decode(self, indices: list[int]) -> torch.Tensor:
        """Frames (T, H, W, 3), uint8, at `indices`, which are sorted and differ."""
        pictures = self._decode_by_time(indices) if self.has_times else self._decode_by_count(indices)
        frames, missing = None, set(range(len(indices)))
        with raised_as_backend_error(av.FFmpegError):
            for row, picture in pictures:
                if frames is None:
                    frames = np.empty((len(indices), *picture.shape), dtype=np.uint8)
                frames[row] = picture
                missing.discard(row)
        if missing:
            raise BackendError(f"frames {[indices[row] for row in sorted(missing)]} cannot be decoded")
        return torch.from_numpy(frames)

    def rotation(self) -> int:
        """Degrees, counterclockwise, by which the stored pictures have to be turned."""
        with raised_as_backend_error(av.FFmpegError, StopIteration):
            return next(self._decode_packets(self._packets_from(0))).rotation

    @property
    def container_format(self) -> str:
        return self._container.format.name

    @property
    def stream_index(self) -> int:
        return self._stream.index

    def _read_index(self) -> None:
        # A packet's place in decoding order is called its position, a frame's place in presentation order its index.
        # They differ where a frame is a difference from a later one (a B-frame): the later one is stored first.
        durations, shown = self._read_packets()
        # Reading a truncated MP4 ends without an error, but the index at its beginning still lists all frames.
        promised = sum(entry.size > 0 for entry in self._stream.index_entries)
        if promised > len(self._times):
            raise BackendError(f"truncated: its index lists {promised} frames, {len(self._times)} are there")
        if not shown:
            raise BackendError("its video stream has no frames")

        self._positions = {time: position for position, time in enumerate(self._times)}
        frame_duration = 1 / float(self._stream.average_rate or self._stream.guessed_rate or 1)
        # AVI stores no presentation times: with B-frames, what the demuxer reports are guesses.
        times_are_guesses = self.container_format == "avi" and self._codec.has_b_frames
        self.has_times = (
            None not in self._positions and len(self._positions) == len(self._times) and not times_are_guesses
        )
        if self.has_times:
            self._order_by_time(shown)
            last_duration = float(durations[self._order[-1]] * self._stream.time_base) or frame_duration
            self.duration = float(self.timestamps[-1]) + last_duration
        else:
            # Only decoding tells how many frames there are. We assume that they follow each other evenly.
            num_frames = sum(1 for _ in self._decode_packets(self._packets_from(0)))
            if not num_frames:
                raise BackendError("its video stream has no frames")
            self.timestamps = np.arange(num_frames) * frame_duration
            self.duration = num_frames * frame_duration
            self.groups_are_closed = False

    def _read_packets(self) -> tuple[list[int], list[int]]:
        """Reads times and keyframes. Returns the duration of every packet and the positions of frames to be shown."""
        self._times, self._seek_times, self._keyframes, durations, shown = [], [], [], [], []
        self.keyframes_are_entries = True
        for position, packet in enumerate(self._packets()):
            self._times.append(packet.pts)
            # Containers seek by presentation or by decoding time. The smaller one never leads behind the packet.
            self._seek_times.append(min((time for time in (packet.pts, packet.dts) if time is not None), default=0))
            durations.append(packet.duration or 0)
            if packet.is_keyframe:
                self._keyframes.append(position)
                self.keyframes_are_entries &= self._codec.name != "h264" or self._is_instant_refresh(packet)
            if not packet.is_discard:  # an edit list hides frames, but others may refer to them
                shown.append(position)
        return durations, shown

    def _order_by_time(self, shown: list[int]) -> None:
        self._order = sorted(shown, key=self._times.__getitem__)
        ticks = np.array([self._times[position] for position in self._order], dtype=np.int64)
        time_base = self._stream.time_base
        self.timestamps = (ticks - ticks[0]) * time_base.numerator / time_base.denominator
        # In an open group of pictures, frames stored after a keyframe are shown before it, and need frames from before
        # it. Whoever counts frames from there arrives at the wrong one. In closed groups nothing is hidden, the video
        # begins with a keyframe, and all that is shown before a keyframe is stored before it.
        self.groups_are_closed = (
            self.keyframes_are_entries
            and len(shown) == len(self._times)
            and self._keyframes[:1] == [0]
            and all(self._order[position] == position for position in self._keyframes)
        )

    def _is_instant_refresh(self, packet: av.Packet) -> bool:
        """
        Whether an H.264 keyframe is an IDR picture, at which decoding can start. Other keyframes are only recovery
        points: the frames after them may be incomplete at first. (ITU-T H.264, table 7-1: NAL unit type 5.)
        """
        data, header = bytes(packet), self._codec.extradata or b""
        if len(header) < 5 or header[0] != 1:  # start codes (Annex B)
            return any(unit[:1] and unit[0] & 31 == 5 for unit in data.split(b"\0\0\1")[1:])
        length_size, offset = (header[4] & 3) + 1, 0  # lengths (ISO/IEC 14496-15, 5.3.3.1)
        while offset + length_size < len(data):
            if data[offset + length_size] & 31 == 5:
                return True
            offset += length_size + int.from_bytes(data[offset : offset + length_size], "big")
        return False

    def _packets(self) -> Iterator[av.Packet]:
        return (packet for packet in self._container.demux(self._stream) if packet.size)  # it ends with an empty one

    def _packets_from(self, position: int) -> Iterator[av.Packet]:
        # Seeking may arrive too early, and anywhere in containers without an index. So we look for the packet from
        # there, and if it lies behind us, once more from the start.
        for time in (self._seek_times[position], min(self._seek_times)):
            self._container.seek(time, stream=self._stream)  # also empties the decoder
            packets = self._packets()
            if position == 0 and not self.has_times:
                return packets
            for packet in packets:
                if self._positions.get(packet.pts, -1) == position:
                    return itertools.chain([packet], packets)
                if self._positions.get(packet.pts, -1) > position:
                    break
        raise BackendError(f"seeking to packet {position} failed")

    def _decode_packets(self, packets: Iterable[av.Packet], wanted: set[int] | None = None) -> Iterator[av.VideoFrame]:
        """Yields all frames of `packets`; with `wanted` (presentation times) at least the frames of these times."""
        can_skip = wanted is not None and self._codec.name in self.CODECS_WITH_SKIPPABLE_FRAMES
        first_time = None
        for packet in itertools.chain(packets, [None]):  # None asks for the frames that the decoder holds back
            if packet is not None:
                first_time = packet.pts if first_time is None else first_time
                self._codec.skip_frame = "NONREF" if can_skip and packet.pts not in wanted else "DEFAULT"
            for frame in self._codec.decode(packet):
                # Frames shown before the keyframe, but stored after it, lack their references here. That is no damage.
                if frame.is_corrupt and not (self.has_times and frame.pts < first_time):
                    place = "" if frame.pts is None else f" near {float(frame.pts * self._stream.time_base):.2f} s"
                    raise BackendError(f"damaged data{place}")
                yield frame

    def _decode_by_count(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        rows = {index: row for row, index in enumerate(indices)}
        for index, frame in enumerate(self._decode_packets(self._packets_from(0))):
            if index in rows:
                yield rows[index], self._to_array(frame)
            if index == indices[-1]:
                return

    def _decode_by_time(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        rows = {self._times[self._order[index]]: row for row, index in enumerate(indices)}
        for first, last, times in self._runs(indices):
            # After a keyframe that is only a recovery point, frames may be missing. They are decoded from the start.
            for start in dict.fromkeys([first, 0]):
                packets = itertools.islice(self._packets_from(start), last - start + 1)
                for frame in self._decode_packets(packets, times):
                    if frame.pts in times:
                        times.remove(frame.pts)
                        yield rows[frame.pts], self._to_array(frame)
                if not times:
                    break

    def _runs(self, indices: list[int]) -> list[tuple[int, int, set[int]]]:
        """
        Returns what to decode for `indices`: first and last position, and presentation times of the wanted frames.
        """
        runs = []
        for position in (self._order[index] for index in indices):
            keyframe = bisect_right(self._keyframes, position) - 1
            while keyframe >= 0 and self._times[self._keyframes[keyframe]] > self._times[position]:
                keyframe -= 1  # shown before this keyframe: it may refer to frames stored before it
            start = self._keyframes[keyframe] if keyframe >= 0 else 0
            if runs and start <= runs[-1][1] + 1:  # one run for both: frames between are decoded once
                start, last, times = runs.pop()
                runs.append((start, max(last, position), times | {self._times[position]}))
            else:
                runs.append((start, position, {self._times[position]}))
        return runs

    def _to_array(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = self._size
        picture = self._reformatter.reformat(frame, width, height, format="rgb24", threads=1).to_ndarray()
        return np.rot90(picture, round(frame.rotation / 90))  # phones store pictures as the sensor lies


BACKENDS = ("decord", "torchcodec", "pyav")


def decoder_class(backend: str) -> type:
    """Returns the class that decodes for a backend. Raises an ImportError if what it needs is not installed."""
    if backend == "pyav":
        return PyAVDecoder
    # Imported here: decord's wheel does not load on every machine, and torchcodec is an extra.
    from .other_decoders import OTHER_DECODERS

    OTHER_DECODERS[backend].import_library()
    return OTHER_DECODERS[backend]


class VideoReader:
    """
    An open video (see `MediaReader`), its frames in the order in which they are shown.

    Attributes:
        path: the file, or how many bytes it was read from.
    """

    def __init__(self, source: str | bytes, backend: str = "pyav"):
        self.path = f"<{len(source)} bytes>" if isinstance(source, bytes) else source
        self._source = source
        self._backend = backend
        self._reasons = {}
        try:
            self._index = PyAVDecoder(source)
        except BackendError as error:
            raise VideoDecodingError(self.path, {"pyav": str(error)}) from error
        self._decoder = self._index if backend == "pyav" else None
        self.timestamps = self._index.timestamps
        self.duration = self._index.duration
        self.num_frames = len(self.timestamps)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self) -> None:
        self._index.close()
        self._decoder = None

    def get_frames(self, indices: Iterable[int]) -> torch.Tensor:
        """
        Returns the frames at `indices`, (T, 3, H, W), uint8, upright. The indices may be in any order and repeat
        themselves. In memory the channels are last.

        Raises:
            VideoDecodingError: if one of them cannot be decoded.
            ValueError: if there is no index, or one that the video doesn't have.
        """
        indices = [operator.index(index) for index in indices]
        if not indices or min(indices) < 0 or max(indices) >= self.num_frames:
            raise ValueError(f"{self.path} has frames 0 to {self.num_frames - 1}, asked for {indices}")
        distinct = sorted(set(indices))
        frames = self._decode(distinct)
        if indices != distinct:
            rows = {index: row for row, index in enumerate(distinct)}
            frames = frames[[rows[index] for index in indices]]
        return frames.permute(0, 3, 1, 2)  # (T, 3, H, W)

    def _decode(self, indices: list[int]) -> torch.Tensor:
        try:
            if self._decoder is None:
                self._decoder = decoder_class(self._backend)(self._source, self._index)
            return self._decoder.decode(indices)
        except BackendError as error:
            if self._decoder is self._index:
                raise VideoDecodingError(self.path, {**self._reasons, "pyav": str(error)}) from error
            self._reasons[self._backend] = str(error)
            log_fallback_once(self._backend, self)
            self._decoder = self._index  # PyAV, for the rest of this video
            return self._decode(indices)


def open_video(source: str | os.PathLike | bytes, backend: str = "pyav") -> VideoReader:
    """
    Opens a video, in one thread. Use it in a `with` statement, or `close` it.

    Args:
        source: the path of a file, or its bytes.
        backend: what decodes the frames, one of `BACKENDS`. PyAV decodes what the backend cannot decode correctly.

    Raises:
        VideoDecodingError: if the file is no readable video.
        InputError: if there is no such backend, or it is not installed.
    """
    check_backend(backend)
    return VideoReader(source if isinstance(source, bytes) else os.fspath(source), backend)


def check_backend(backend: str) -> None:
    """Raises an InputError if there is no such backend, or it is not installed."""
    if backend not in BACKENDS:
        raise InputError(f"Unknown video backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    try:
        decoder_class(backend)
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"The video backend {backend!r} cannot be used: {one_line(error)}. Install it (see docs/decoding.md), or "
            f"choose another one of {', '.join(BACKENDS)}."
        ) from error


_logged_fallbacks = set()


def log_fallback_once(backend: str, reader: VideoReader) -> None:
    """Warns that PyAV decodes in place of `backend`, once per process and not for every file."""
    if backend not in _logged_fallbacks:
        _logged_fallbacks.add(backend)
        logger.warning(
            "%s cannot decode %s (%s), so pyav does. Not said again for further files.",
            backend,
            reader.path,
            reader._reasons[backend],
        )


def one_line(error: BaseException, limit: int = 200) -> str:
    """Returns the first line of an error's message, without decord's source locations and stack trace."""
    message = re.sub(r"\[\d\d:\d\d:\d\d\] \S+: ", "", str(error))
    line = next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= limit else line[: limit - 1] + "…"
