"""
Videos unlike short clips. Long ones are read in parts: one seeks to the keyframe before a time, and reads the packets
from there, so that a pair of frames of a recording of hours costs as much as one of a clip. Captures, and clips that
were cut without encoding, begin inside a group of pictures, with frames that cannot be decoded.
"""

import itertools
import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import av
from av.sidedata.sidedata import Type

from .video import PAUSE_SECONDS, SEEKABLE_CONTAINERS, BackendError


DISPLAY_MATRIX = Type.DISPLAYMATRIX

MAX_HEAD_PACKETS = 64  # more than any codec needs to reorder
MAX_TAIL_PACKETS = 2_000  # from one keyframe to the next; with more, a part would cost nearly as much as the whole
MAX_SOUND_SECONDS = 5.0


def find_ends(
    container: av.container.InputContainer, stream: av.VideoStream, read_packets: Callable[[], Iterator[av.Packet]]
) -> tuple[int, int] | None:
    """
    Finds when a video begins and ends, in ticks of its stream: the first frame's start, the last one's end. None if
    only the whole index tells, because the container has no index to seek by, the video does not begin with a
    keyframe, keyframes are rare, or a packet has no time.

    Args:
        read_packets: reads packets from where the container is.
    """
    if container.format.name not in SEEKABLE_CONTAINERS or is_fragmented(container, stream):
        return None
    # Few frames are quickly read, however long they are shown. A truncated file lists more frames than are there.
    entries = stream.index_entries
    is_truncated = len(entries) > 0 and entries[-1].pos + entries[-1].size > container.size
    if is_truncated or not stream.average_rate or stream.average_rate < 1:
        return None
    head = list(itertools.islice(read_packets(), MAX_HEAD_PACKETS))
    shown = [packet for packet in head if not packet.is_discard]
    if not shown or shown[0] is not head[0] or not head[0].is_keyframe or any(packet.pts is None for packet in head):
        return None
    if stream.codec_context.name == "h264" and not is_instant_refresh(head[0], stream.codec_context):
        return None
    origin = min(packet.pts for packet in shown)
    if origin < head[0].pts:  # it may lack the frames that the first ones refer to
        return None
    expected = int(container.duration / av.time_base / stream.time_base) + origin
    container.seek(expected, stream=stream)
    ends = []
    for packet in itertools.islice((packet for packet in read_packets() if not packet.is_discard), MAX_TAIL_PACKETS):
        if packet.pts is None:
            return None
        ends.append(packet.pts + (packet.duration or int(1 / (stream.average_rate * stream.time_base))))
    # Seeking to the end may have arrived elsewhere. The sound may end a little before or after the pictures.
    if not ends or len(ends) == MAX_TAIL_PACKETS or abs(max(ends) - expected) * stream.time_base > MAX_SOUND_SECONDS:
        return None
    if container.format.name == SEEKABLE_CONTAINERS[1] and container.duration > PAUSE_SECONDS * av.time_base:
        # Other containers say a rate that tells. This one lists its keyframes only, which is quickly read.
        times = [origin, *(entry.timestamp for entry in stream.index_entries), max(ends)]
        if max(later - time for time, later in itertools.pairwise(times)) * stream.time_base > PAUSE_SECONDS:
            return None  # a fault of the clock, which the whole index shows
    return origin, max(ends)


def is_fragmented(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    """Whether an MP4 or MOV file lists its frames in several places."""
    if container.format.name != SEEKABLE_CONTAINERS[0]:
        return False
    # An edit list may hide frames at the ends, which are not listed then.
    return stream.frames == 0 or len(stream.index_entries) > stream.frames


def packets_between(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    read_packets: Callable[[], Iterator[av.Packet]],
    start: int,
    end: int,
) -> Iterator[av.Packet]:
    """
    Yields the packets from a keyframe on that is shown at `start` or before, until no frame before `end` can follow.
    Times are in ticks of the stream. `read_packets` as in `find_ends`.
    """
    step = int(1 / stream.time_base)  # a second
    for back in (0, *(step << power for power in range(20))):  # a picture may stand still for days
        container.seek(start - back, stream=stream)
        packets = read_packets()
        first = next(packets, None)
        # Containers that seek by decoding times may arrive at a keyframe that is shown later.
        if first is None or first.pts is None or first.pts <= start:
            break
    for packet in itertools.chain([first] if first else [], packets):
        if packet.dts is not None and packet.dts >= end:  # no frame is decoded after it is shown
            break
        yield packet


def list_units(packet: av.Packet, codec: av.VideoCodecContext) -> Iterator[bytes]:
    """Divides a packet of H.264 into its NAL units."""
    data, header = bytes(packet), codec.extradata or b""
    if len(header) < 5 or header[0] != 1:  # start codes (Annex B)
        yield from (unit for unit in data.split(b"\0\0\1")[1:] if unit)
        return
    length_size, offset = (header[4] & 3) + 1, 0  # lengths (ISO/IEC 14496-15, 5.3.3.1)
    while offset + length_size < len(data):
        start = offset + length_size
        offset = start + int.from_bytes(data[offset:start], "big")
        yield data[start:offset]


def is_instant_refresh(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """
    Whether an H.264 keyframe is an IDR picture, at which decoding can start. Other keyframes are only recovery points:
    the frames after them may be incomplete at first. (ITU-T H.264, table 7-1: NAL unit type 5.)
    """
    return any(unit[0] & 31 == 5 for unit in list_units(packet, codec))


def is_gradual_refresh(packet: av.Packet, codec: av.VideoCodecContext) -> bool:
    """
    Whether an H.264 keyframe is a recovery point after which pictures become whole little by little. (ITU-T H.264,
    D.1.8: an SEI message of type 6 begins with the number of frames that it takes; a leading 1 bit stands for none.)
    """
    for unit in list_units(packet, codec):
        offset = 1
        while unit[0] & 31 == 6 and offset + 1 < len(unit) and unit[offset] != 128:  # 128: the end
            numbers = []  # type and size of a message, each in bytes of 255 and a last one
            for _ in range(2):
                numbers.append(0)
                while offset < len(unit) - 1 and unit[offset] == 255:
                    numbers[-1] += 255
                    offset += 1
                numbers[-1] += unit[offset]
                offset = min(offset + 1, len(unit) - 1)
            if numbers[0] == 6:
                return not unit[offset] & 128
            offset += numbers[1]
    return False


def find_first_whole_frame(codec: av.VideoCodecContext, packets: Iterator[av.Packet], earliest: int) -> int:
    """
    Decodes until the first frame without damage, and returns its time. May raise `BackendError`.

    Args:
        packets: from the first keyframe on, or from the start if there is none.
        earliest: frames before this time are passed over.
    """
    for packet in itertools.chain(packets, [None]):
        for frame in codec.decode(packet):
            if not frame.is_corrupt and frame.pts is not None and frame.pts >= earliest:
                return frame.pts
    raise BackendError("no frame of its video stream can be decoded")


def list_ignored(stream: av.VideoStream, frame: av.VideoFrame) -> dict[str, str]:
    """Says what players would do to a video's pictures, and this package does not; under the kind of each."""
    ignored = {}
    if stream.sample_aspect_ratio and stream.sample_aspect_ratio != 1:
        ratio = stream.sample_aspect_ratio
        ignored["pixels"] = f"its pixels are not square ({ratio}) but are read as if they were"
    if frame.interlaced_frame:
        ignored["interlaced"] = "its pictures are interlaced, and are not deinterlaced"
    try:
        matrix = frame.side_data.get(DISPLAY_MATRIX)
    except ValueError:  # PyAV lists all side data, and does not know every kind that FFmpeg does
        matrix = None
    if matrix is not None:
        # (a, b, u, c, d, v, x, y, w) maps (x, y) to (ax + cy, bx + dy); a mirror has a negative determinant.
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
        if a * d - b * c < 0:
            ignored["mirrored"] = "its pictures should be mirrored, and are not"
    return ignored


class KeptIndexes:
    """
    Indexes of the files that were read last and took long. Each worker keeps its own.

    Args:
        max_packets: how many packets they may have together, at about 32 bytes each.
    """

    def __init__(self, max_packets: int):
        self.max_packets = max_packets
        self.indexes: OrderedDict[tuple, tuple[dict[str, Any], int]] = OrderedDict()

    def find(self, source: str | bytes) -> dict[str, Any] | None:
        """Returns what was kept of a file, if it was not changed since."""
        key = file_key(source) if self.indexes and not isinstance(source, bytes) else None
        if key not in self.indexes:
            return None
        self.indexes.move_to_end(key)
        return self.indexes[key][0]

    def keep(self, source: str | bytes, state: dict[str, Any], num_packets: int) -> None:
        """Keeps the index of a file, and forgets those that were not used for longest if they are too many."""
        if isinstance(source, bytes) or (key := file_key(source)) is None:
            return
        self.indexes[key] = state, num_packets
        while sum(num for _, num in self.indexes.values()) > self.max_packets and len(self.indexes) > 1:
            self.indexes.popitem(last=False)


def file_key(path: str) -> tuple[str, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:  # it was removed after it was opened
        return None
    return path, status.st_size, status.st_mtime_ns


kept_indexes = KeptIndexes(max_packets=4_000_000)
