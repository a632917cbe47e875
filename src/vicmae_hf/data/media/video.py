"""Decodes videos with PyAV; `other_decoders.py` has the alternatives. `open_video` hides which library is used.

Most frames of a video are stored as differences from other frames. Only keyframes are whole, so decoding starts at the
keyframe before a wanted frame. PyAV first reads the packets (encoded frames) of a video, without decoding them; of a
long one only those of the part that is wanted (`odd_videos.py`). Their presentation times are the index: how many
frames there are, when each is shown, from which keyframe each can be decoded. A backend then decodes the few frames
that are asked for. Where it fails, or would return wrong frames, PyAV decodes them instead. docs/decoding.md has the
measurements, and the traps behind what is done here.
"""

import contextlib
import itertools
import logging
import math
import os
import re
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from ...errors import MediaDecodingError
from .images import MediaReader, check_indices


logger = logging.getLogger(__name__)

# From this length on the index of a video is not read at once: 3 hours would take a second. Longer than most clips.
LONG_SECONDS = 120.0
LONG_INDEX = 5_000  # packets, from which on a worker keeps an index
LEAP_SECONDS = 600.0  # in a transport stream, more than any pause: another clock begins
PAUSE_SECONDS = 86_400.0  # in other files: a day without a new frame is a fault of their times
# Containers with an index of their own, by which one can seek to a time: MP4 and MOV, Matroska and WebM.
SEEKABLE_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


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
        raise BackendError(first_line(error)) from error


class PyAVDecoder:
    """
    Decodes from the keyframe before a frame up to that frame, and recognises the frame by its presentation time.

    Every `VideoReader` has one, because it is also the index of the video. Every method may raise `BackendError`.

    Attributes:
        container, stream: PyAV's, of the open file.
        timestamps: float64 array (T,), seconds.
        duration: seconds.
        has_times: whether the file says when frames are shown. If not, frames can only be counted from the start.
        is_long: whether the index is still to be read: by `read_index`, or for a part of the video by `read_part`.
            Until then only `duration` is known.
        keyframes_are_entries: whether every frame from a keyframe on is complete when decoding starts there.
        groups_are_closed: whether one can seek to a keyframe and count frames from there to the right one.
    """

    # In these codecs no other frame needs a frame that is marked as "no reference". It can be skipped on the way to a
    # wanted frame, which makes PyAV fastest. (In HEVC the temporal layers above such a frame may still need it.)
    CODECS_WITH_SKIPPABLE_FRAMES = ("h264", "mpeg4")

    # What `read_index` reads.
    INDEX = ("_times", "_seek_times", "_keyframes", "_order", "_origin", "timestamps", "duration")
    INDEX += ("has_times", "keyframes_are_entries", "groups_are_closed", "_is_gradual")

    def __init__(self, source: str | bytes):
        self._source = source
        self._name = f"<{len(source)} bytes>" if isinstance(source, bytes) else source
        self._open()
        try:
            self._size = (self.stream.width, self.stream.height)  # of all frames, even if it changes on the way
            self._reformatter = VideoReformatter()
            self._origin = 0  # ticks of the stream, at which the first frame is shown
            self._has_frames = False  # whether one was decoded
            with raised_as_backend_error(av.FFmpegError):
                # Few frames are quickly read, however long they are shown.
                self.is_long = (self.container.duration or 0) > LONG_SECONDS * av.time_base and self._find_ends()
            if not self.is_long:
                self.read_index()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._is_untouched = True  # no packet was read yet
        # Imported here, because pretraining needs no more of it.
        from ...media_reading_vicmae import check_frame_size, open_container

        with raised_as_backend_error(av.FFmpegError, OSError):
            self.container = open_container(self._source)
        try:
            self.stream = self.container.streams.best("video")
            if self.stream is None or self.stream.disposition & Disposition.attached_pic:
                raise BackendError("it has no video stream")
            self._codec = self.stream.codec_context
            if self._codec is None:
                raise BackendError("its codec is unknown")
            self._codec.thread_count = 1  # workers already use all cores
            with raised_as_backend_error(ValueError):
                check_frame_size(self.stream)
        except BaseException:
            self.close()
            raise

    def _rewind(self) -> None:
        """Makes the next packet the first one. Not by seeking, which raw streams do not allow, and others do late."""
        if not self._is_untouched:
            self.close()
            self._open()

    def close(self) -> None:
        self.container.close()

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

    def _find_ends(self) -> bool:
        """Finds where a long video begins and ends. Returns whether parts of it can be read alone."""
        from .odd_videos import find_ends

        ends = find_ends(self.container, self.stream, self._packets)
        if ends is not None:
            self._origin, end = ends  # in ticks of the stream
            self.duration = float((end - self._origin) * self.stream.time_base)
        return ends is not None

    def read_index(self) -> None:
        """Reads the index of the whole video, or takes the one that was kept. May raise `BackendError`."""
        from .odd_videos import kept_indexes

        if (state := kept_indexes.find(self._source)) is not None:
            self.is_long = False
            self.__dict__.update(state)
            return
        with raised_as_backend_error(av.FFmpegError):
            self._rewind()
            self.is_long = False
            self._read_packets(self._packets())
            # Reading a truncated MP4 ends without an error, but the index at its beginning still lists all frames.
            promised = sum(entry.size > 0 for entry in self.stream.index_entries)
            if promised > len(self._times):
                raise BackendError(f"truncated: its index lists {promised} frames, {len(self._times)} are there")
            if not self._shown:
                raise BackendError("its video stream has no frames")
            if self.has_times:
                self._origin = min(self._times[position] for position in self._shown)
                if not self._begins_with_entry or self._origin < self._times[0]:
                    self._leave_out_undecodable()
                self._order_by_time()
            else:
                self._count_frames()
        if len(self._times) > LONG_INDEX or not self.has_times:
            kept_indexes.keep(self._source, {name: getattr(self, name) for name in self.INDEX}, len(self._times))

    def read_part(self, start: float, end: float) -> None:
        """
        Reads the index of a part of a long video: of at least the frames that are shown between two times in seconds,
        from a keyframe on. Where that cannot be done, reads the whole index. May raise `BackendError`.
        """
        from .odd_videos import packets_between

        duration = self.duration
        with raised_as_backend_error(av.FFmpegError):
            ticks = [self._origin + int(time / self.stream.time_base) for time in (start, end)]
            self._read_packets(packets_between(self.container, self.stream, self._packets, *ticks))
            if self.has_times and self.keyframes_are_entries and self._begins_with_entry:
                self._order_by_time()
                self.duration = duration
                self.groups_are_closed = False  # counted from the beginning, frames are others
                self.is_long = False
            else:
                self.read_index()

    def _read_packets(self, packets: Iterable[av.Packet]) -> None:
        """Reads times, keyframes and durations of packets, and which of them are frames to be shown."""
        from .odd_videos import is_gradual_refresh, is_instant_refresh

        # A packet's place in decoding order is called its position, a frame's place in presentation order its index.
        # They differ where a frame is a difference from a later one (a B-frame): the later one is stored first.
        self._times, self._seek_times, self._keyframes, self._durations, self._shown = [], [], [], [], []
        self.keyframes_are_entries, self._begins_with_entry, self._is_gradual = True, False, False
        last_decoding_time, is_ascending = -math.inf, True
        for position, packet in enumerate(packets):
            self._times.append(packet.pts)
            # Containers seek by presentation or by decoding time. The smaller one never leads behind the packet.
            self._seek_times.append(min((time for time in (packet.pts, packet.dts) if time is not None), default=0))
            self._durations.append(packet.duration or 0)
            if packet.is_keyframe:
                is_entry = self._codec.name != "h264" or is_instant_refresh(packet, self._codec)
                self._begins_with_entry |= position == 0 and is_entry
                self._keyframes.append(position)
                self.keyframes_are_entries &= is_entry
                self._is_gradual |= not is_entry and is_gradual_refresh(packet, self._codec)
            if not packet.is_discard:  # an edit list hides frames, but others may refer to them
                self._shown.append(position)
            if packet.dts is not None:
                is_ascending &= last_decoding_time <= packet.dts
                last_decoding_time = packet.dts
        if len(self._times) > LONG_INDEX and None not in self._times:  # a quarter of a list's memory
            self._times, self._seek_times = array("q", self._times), array("q", self._seek_times)
        # AVI stores no presentation times: with B-frames, what the demuxer reports are guesses.
        times_are_guesses = self.container.format.name == "avi" and self._codec.has_b_frames
        distinct = set(self._times)
        self.has_times = None not in distinct and len(distinct) == len(self._times) and not times_are_guesses
        # In joined recordings the clock may go back, or leap.
        longest = LEAP_SECONDS if self.container.format.name == "mpegts" else PAUSE_SECONDS
        pause = np.diff(sorted(distinct)).max(initial=0) * self.stream.time_base if self.has_times else 0
        if not is_ascending or pause > longest:
            self.has_times = False
            message = "%s: its clock goes back or leaps, so its frames are taken to follow each other evenly. "
            warn_once("clock", message + "Not said again for further files of this kind.", self._name)

    def _leave_out_undecodable(self) -> None:
        from .odd_videos import find_first_whole_frame

        start = self._keyframes[0] if self._keyframes else 0
        # In H.264 nothing that is shown before the first keyframe can be whole, though decoders may show it.
        earliest = self._times[start] if self._codec.name == "h264" and self._keyframes else self._origin
        packets = self._packets_from(0 if self._is_gradual else start)
        self._origin = find_first_whole_frame(self._codec, packets, earliest)
        self._shown = [position for position in self._shown if self._times[position] >= self._origin]

    def _order_by_time(self) -> None:
        self._order = sorted(self._shown, key=self._times.__getitem__)
        if len(self._order) > LONG_INDEX:
            self._order = array("q", self._order)
        ticks = np.array([self._times[position] for position in self._order], dtype=np.int64)
        time_base = self.stream.time_base
        self.timestamps = (ticks - self._origin) * time_base.numerator / time_base.denominator
        last_duration = float(self._durations[self._order[-1]] * time_base) or self._frame_duration
        self.duration = float(self.timestamps[-1]) + last_duration
        # In an open group of pictures, frames stored after a keyframe are shown before it, and need frames from before
        # it. Whoever counts frames from there arrives at the wrong one. In closed groups nothing is hidden, the video
        # begins with a keyframe, and all that is shown before a keyframe is stored before it.
        self.groups_are_closed = (
            self.keyframes_are_entries
            and len(self._shown) == len(self._times)
            and self._keyframes[:1] == [0]
            and all(self._order[position] == position for position in self._keyframes)
        )

    def _count_frames(self) -> None:
        # Only decoding tells how many frames there are. We assume that they follow each other evenly.
        num_frames = sum(1 for _ in self._decode_packets(self._packets_from(0)))
        if not num_frames:
            raise BackendError("its video stream has no frames")
        self._order = range(num_frames)
        self.timestamps = np.arange(num_frames) * self._frame_duration
        self.duration = num_frames * self._frame_duration
        self.groups_are_closed = False

    @property
    def _frame_duration(self) -> float:
        return 1 / float(self.stream.average_rate or self.stream.guessed_rate or 1)

    def _packets(self) -> Iterator[av.Packet]:
        self._is_untouched, thread = False, threading.current_thread()
        for packet in self.container.demux(self.stream):
            if getattr(thread, "is_given_up", False):  # see `ReadingThread`
                raise BackendError("given up")
            if packet.size:  # the last one is empty
                yield packet

    def _packets_from(self, position: int) -> Iterator[av.Packet]:
        # Seeking may arrive too early, and anywhere in containers without an index. So we look for the packet from
        # there, and if it lies behind us, once more from the start.
        if position == 0 and not self.has_times:
            self._rewind()
            return self._packets()
        wanted = self._times[position]
        for time in (self._seek_times[position], min(self._seek_times)):
            self.container.seek(time, stream=self.stream)  # also empties the decoder
            packets = self._packets()
            for packet in packets:
                if packet.pts == wanted:
                    return itertools.chain([packet], packets)
                if packet.dts is not None and packet.dts > wanted:  # no frame is decoded after it is shown
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
                    place = "" if frame.pts is None else f" near {float(frame.pts * self.stream.time_base):.2f} s"
                    raise BackendError(f"damaged data{place}")
                yield frame

    def _decode_by_count(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        rows = {index: row for row, index in enumerate(indices)}
        for index, frame in enumerate(self._decode_packets(self._packets_from(0))):
            if index in rows:
                yield rows[index], self._to_array(frame)
            if index == max(rows):
                return

    def _decode_by_time(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        rows = {self._times[self._order[index]]: row for row, index in enumerate(indices)}
        for first, last, times in self._runs(indices):
            # After a keyframe that is only a recovery point, frames may be missing. They are whole when decoding
            # starts before it; where pictures are refreshed little by little, three refreshes before.
            place = bisect_right(self._keyframes, first) - 1 - (3 if self._is_gradual else 1)
            before = self._keyframes[place] if place > 0 else 0
            for start in dict.fromkeys([before, 0] if self._is_gradual else [first, before, 0]):
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

    def _say_what_is_ignored(self, frame: av.VideoFrame) -> None:
        from .odd_videos import list_ignored

        for kind, what in list_ignored(self.stream, frame).items():  # by kind: ratios differ from camera to camera
            warn_once(kind, "%s: %s. Not said again for further files of this kind.", self._name, what)

    def _to_array(self, frame: av.VideoFrame) -> np.ndarray:
        if not self._has_frames:
            self._has_frames = True
            self._say_what_is_ignored(frame)
        width, height = self._size
        picture = self._reformatter.reformat(frame, width, height, format="rgb24", threads=1).to_ndarray()
        return np.rot90(picture, round(frame.rotation / 90))  # phones store pictures as the sensor lies


class VideoReader(MediaReader):
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
        with self._raised_as_decoding_error():
            self._index = PyAVDecoder(source)
        self._decoder = self._index if backend == "pyav" else None

    @property
    def is_long(self) -> bool:
        """Whether reading `timestamps` or `num_frames` takes long, and `read_part` saves it."""
        return self._index.is_long

    @property
    def timestamps(self) -> np.ndarray:
        if self._index.is_long:
            with self._raised_as_decoding_error():
                self._index.read_index()
        return self._index.timestamps

    @property
    def duration(self) -> float:
        return self._index.duration

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    def read_part(self, start: float, end: float) -> None:
        """Reads only what is shown between two times (see `MediaReader`). Raises a VideoDecodingError if it cannot."""
        with self._raised_as_decoding_error():
            self._index.read_part(start, end)
        self._decoder = self._index  # the others count frames from the beginning

    def read_whole(self) -> None:
        """Reads the index of the whole video, also after `read_part`."""
        with self._raised_as_decoding_error():
            self._index.read_index()

    @contextlib.contextmanager
    def _raised_as_decoding_error(self) -> Iterator[None]:
        try:
            yield
        except BackendError as error:
            raise VideoDecodingError(self.path, {"pyav": str(error)}) from error

    def close(self) -> None:
        self._index.close()
        self._decoder = None

    def get_frames(self, indices: Iterable[int]) -> torch.Tensor:
        """Frames at `indices` (see `MediaReader`). Raises a VideoDecodingError if one of them cannot be decoded."""
        indices = check_indices(indices, self.num_frames, self.path)
        distinct = sorted(set(indices))
        frames = self._decode(distinct)
        if indices != distinct:
            rows = {index: row for row, index in enumerate(distinct)}
            frames = frames[[rows[index] for index in indices]]
        return frames.permute(0, 3, 1, 2)  # (T, 3, H, W)

    def _decode(self, indices: list[int]) -> torch.Tensor:
        try:
            if self._decoder is None:
                from .other_decoders import OTHER_DECODERS

                self._decoder = OTHER_DECODERS[self._backend](self._source, self._index)
            return self._decoder.decode(indices)
        except BackendError as error:
            if self._decoder is self._index:
                raise VideoDecodingError(self.path, {**self._reasons, "pyav": str(error)}) from error
            self._reasons[self._backend] = str(error)
            message = "%s cannot decode %s (%s), so pyav does. Not said again for further files."
            warn_once(self._backend, message, self._backend, self.path, self._reasons[self._backend])
            self._decoder = self._index  # PyAV, for the rest of this video
            return self._decode(indices)


def open_video(source: str | os.PathLike | bytes, backend: str = "pyav") -> VideoReader:
    """
    Opens a video, in one thread. Use it in a `with` statement, or `close` it.

    Args:
        source: the path of a file, or its bytes.
        backend: what decodes the frames: "pyav", "decord" or "torchcodec" (see `check_backend`). PyAV decodes what
            the backend cannot decode correctly.

    Raises:
        VideoDecodingError: if the file is no readable video.
        InputError: if there is no such backend, or it is not installed.
    """
    if backend != "pyav":
        from .other_decoders import check_backend

        check_backend(backend)
    return VideoReader(source if isinstance(source, bytes) else os.fspath(source), backend)


said: set[str] = set()


def warn_once(key: str, message: str, *values: object, say: Callable[..., None] = logger.warning) -> None:
    """Warns, or says it as another logger does, but in this process not again with the same key."""
    if key not in said:
        said.add(key)
        say(message, *values)


def first_line(error: BaseException) -> str:
    """Returns at most 200 letters of an error's first line, without decord's source locations and stack trace."""
    message = re.sub(r"\[\d\d:\d\d:\d\d\] \S+: ", "", str(error))
    line = next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:199] + "…"
