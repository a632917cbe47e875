"""Long videos read in parts, clips that were cut without encoding, recordings that were joined."""

import logging
import struct
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_video import KINDS
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.media import odd_videos
from vicmae_hf.data.media import video as video_module
from vicmae_hf.data.media.odd_videos import KeptIndexes
from vicmae_hf.data.media.reading import EncodedItem, TimeLimitError, call_within
from vicmae_hf.data.media.video import VideoDecodingError, open_video
from vicmae_hf.errors import MediaDecodingError


def copy_packets(source, target, times=1, first_keyframe=0, length=None):
    """Writes the packets of a video again: several times one after the other, or from a later keyframe on."""
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        stream = given.streams.video[0]
        copied = made.add_stream_from_template(stream)
        packets = [packet for packet in given.demux(stream) if packet.size]
        start = [index for index, packet in enumerate(packets) if packet.is_keyframe][first_keyframe]
        packets = packets[start:][:length]
        base = packets[0].dts
        duration = int(Fraction(len(packets)) / stream.average_rate / stream.time_base)
        values = [(bytes(p), p.pts - base, p.dts - base, p.is_keyframe, p.duration) for p in packets]
        for repetition in range(times):
            for data, pts, dts, is_keyframe, packet_duration in values:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = copied, stream.time_base, is_keyframe
                packet.pts, packet.dts = (time + repetition * duration for time in (pts, dts))
                packet.duration = packet_duration
                made.mux(packet)


def frames_that_a_decoder_shows(path) -> list[int]:
    with av.open(str(path)) as container:
        frames = [frame for frame in container.decode(video=0) if not frame.is_corrupt]
    return read_numbers(torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1) for f in frames]))


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / request.param
    write_video(path, numbered_frames(120), **KINDS[request.param])
    return path


PARTS = [(0.0, 0.5), (0.999, 2.0), (1.51, 1.52), (2.0, 3.9), (3.7, 9.0)]


@pytest.mark.parametrize("is_long", [True, False])
def test_a_part_has_the_frames_and_times_of_the_whole(kind, is_long, monkeypatch):
    with open_video(kind) as whole:
        timestamps, duration = whole.timestamps, whole.duration
    monkeypatch.setattr(video_module, "LONG_SECONDS", 1.0 if is_long else 100.0)
    for start, end in PARTS:
        with open_video(kind) as video:
            assert video.duration == pytest.approx(duration, abs=1e-9)
        with EncodedItem(str(kind), "video", True, start, end).open("pyav") as part:
            first = np.searchsorted(timestamps, start, side="right") - 1
            numbers = list(range(first, np.searchsorted(timestamps, end)))
            np.testing.assert_array_equal(part.timestamps, np.maximum(timestamps[numbers] - start, 0))
            assert part.duration == pytest.approx(min(end, duration) - start)
            assert read_numbers(part.get_frames(range(part.num_frames))) == [number % 256 for number in numbers]
            assert read_numbers(part.get_frames([part.num_frames - 1])) == numbers[-1:]
    with pytest.raises(MediaDecodingError, match=r"video: has no frames, the file ends at 4\.000 s"):
        EncodedItem(str(kind), "video", True, 4.5, 5.0).open("pyav")


def test_a_part_keeps_the_times_of_the_whole_and_gives_way_to_it(kind, monkeypatch):
    with open_video(kind) as whole:
        timestamps, duration = whole.timestamps, whole.duration
    monkeypatch.setattr(video_module, "LONG_SECONDS", 1.0)
    with open_video(kind) as video:
        if video.is_long:
            video.read_part(2.0, 2.5)
            listed = video.timestamps
            np.testing.assert_array_equal(listed[(listed > 1.99) & (listed < 2.49)], timestamps[60:75])
            assert video.duration == duration
            assert read_numbers(video.get_frames([int(listed.searchsorted(1.99))])) == [60]
        video.read_whole()
        np.testing.assert_array_equal(video.timestamps, timestamps)
        assert read_numbers(video.get_frames([0, 119])) == [0, 119]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_pair_of_an_hour_reads_little_of_the_file(tmp_path, suffix):
    write_video(tmp_path / "short.mp4", numbered_frames(250), options={"g": "50", "bf": "2"})
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / f"hour.{suffix}"
    copy_packets(tmp_path / "short.mp4", path, times=432)  # 108,000 frames
    dataset = load_frame_pairs(tmp_path / "data", 32)
    with open_video(str(path)) as whole:
        assert whole.is_long and whole.duration == pytest.approx(3600, abs=0.1)
        assert whole.num_frames == 108_000 and not whole.is_long
    kept = len(odd_videos.kept_indexes.indexes)
    before = bytes_read()
    samples = [dataset[(epoch, 0, 0)] for epoch in range(4)]
    # The list of frames at the end of an MP4 has to be read, and a read is of 32 KiB; these pictures are small.
    assert (bytes_read() - before) / 4 < path.stat().st_size * (0.4 if suffix == "mp4" else 0.05)
    assert len(odd_videos.kept_indexes.indexes) == kept  # no whole index was read
    assert not torch.equal(samples[0]["pixel_values"], samples[1]["pixel_values"])


CUT_KINDS = {
    "hevc.mkv": ("libx265", {"x265-params": "keyint=12:log-level=none:pools=1"}),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=12:log-level=none:pools=1"}),
    "h264.ts": ("libx264", {"x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=12"}),
    "mpeg2.ts": ("mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg2.mkv": ("mpeg2video", {"g": "12", "bf": "2"}),
    "vp9.webm": ("libvpx-vp9", {"g": "12"}),
}


@pytest.mark.parametrize("name", CUT_KINDS)
def test_a_clip_that_was_cut_without_encoding_begins_with_its_first_whole_frame(tmp_path, name):
    codec, options = CUT_KINDS[name]
    source, clip = tmp_path / f"source.{name.split('.')[1]}", tmp_path / name
    write_video(source, numbered_frames(80), codec=codec, options=options)
    copy_packets(source, clip, first_keyframe=2, length=40)
    expected = frames_that_a_decoder_shows(clip)
    assert 30 < len(expected) <= 40
    with open_video(clip) as video:
        assert video.timestamps[0] == 0
        assert read_numbers(video.get_frames(range(video.num_frames))) == expected
        assert read_numbers(video.get_frames([0])) == expected[:1]
        assert read_numbers(video.get_frames([20])) == expected[20:21]


def test_a_capture_that_begins_inside_a_group(tmp_path):
    """As from a camera: packets before the first keyframe, which nobody can decode."""
    source, capture = tmp_path / "source.ts", tmp_path / "capture.ts"
    write_video(source, numbered_frames(80), codec="mpeg2video", options={"g": "12", "bf": "0"})
    content = source.read_bytes()
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    place = packets[5].pos  # of a transport packet of 188 bytes
    capture.write_bytes(content[: 188 * 3] + content[place - place % 188 :])
    with open_video(capture) as video:
        numbers = read_numbers(video.get_frames(range(video.num_frames)))
    assert numbers == list(range(12, 80))


def test_recordings_that_were_joined_follow_each_other(tmp_path):
    parts = []
    for seed, start in ((0, 0.0), (1, 0.4)):
        frames = numbered_frames(60, seed=seed)
        write_video(tmp_path / f"{seed}.ts", frames, timestamps=start + np.arange(60) / 30, options={"bf": "0"})
        parts.append((tmp_path / f"{seed}.ts").read_bytes())
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    with open_video(tmp_path / "joined.ts") as video:
        assert video.num_frames == 120 and video.duration == pytest.approx(4.0, abs=0.15)
        assert read_numbers(video.get_frames([0, 59, 60, 119])) == [0, 59, 0, 59]


def test_an_index_that_took_long_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(odd_videos, "kept_indexes", KeptIndexes(max_packets=300))
    monkeypatch.setattr(video_module, "LONG_INDEX", 50)
    paths = [tmp_path / f"{index}.ts" for index in range(4)]
    for index, path in enumerate(paths):
        write_video(path, numbered_frames(100, seed=index), options={"g": "25"})
    for path in [*paths[:3], paths[0], paths[3]]:
        with open_video(str(path)) as video:
            assert read_numbers(video.get_frames([77, 3])) == [77, 3]
    assert [Path(path).name for path, _, _ in odd_videos.kept_indexes.indexes] == ["2.ts", "0.ts", "3.ts"]
    write_video(paths[0], numbered_frames(60), options={"g": "25"})
    with open_video(str(paths[0])) as video:
        assert video.num_frames == 60


def test_a_file_that_is_removed_meanwhile_is_a_bad_file(tmp_path, monkeypatch):
    monkeypatch.setattr(odd_videos, "kept_indexes", KeptIndexes(max_packets=300))
    monkeypatch.setattr(video_module, "LONG_INDEX", 10)
    monkeypatch.setattr(video_module, "LONG_SECONDS", 1.0)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, numbered_frames(60), options={"g": "10"})
    with open_video(str(tmp_path / "a.mp4")) as video:
        assert video.num_frames == 60  # one index is kept
    with open_video(str(tmp_path / "b.mp4")) as video:
        assert video.is_long
        (tmp_path / "b.mp4").unlink()
        with pytest.raises(VideoDecodingError, match=r"b\.mp4: pyav: .*No such file or directory"):
            video.get_frames([5])


def test_reading_ends_with_the_time_limit(tmp_path):
    write_video(tmp_path / "video.mp4", numbered_frames(60))
    ended = []

    def read_for_ever():
        try:
            with open_video(str(tmp_path / "video.mp4")) as video:
                while True:
                    video.get_frames([30])
        except VideoDecodingError as error:
            ended.append(str(error))
            raise

    with pytest.raises(TimeLimitError):
        call_within(0.3, read_for_ever, "video.mp4")
    limit = time.monotonic() + 10
    while not ended and time.monotonic() < limit:
        time.sleep(0.01)
    assert "given up" in ended[0]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("wide.mp4", {"sample_aspect_ratio": Fraction(4, 3)}, "its pixels are not square (4/3)"),
        ("interlaced.ts", {"options": {"flags": "+ildct+ilme", "top": "1"}}, "its pictures are interlaced"),
        ("mirrored.mp4", {}, "its pictures should be mirrored"),
        ("plain.mp4", {}, None),
    ],
)
def test_what_is_not_done_to_pictures_is_said_once(tmp_path, monkeypatch, caplog, name, change, expected):
    monkeypatch.setattr(video_module, "said", set())
    caplog.set_level(logging.WARNING, logger="vicmae_hf.data.media.video")
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("mpeg2video" if name.endswith("ts") else "libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.options = change.get("options", {})
        if "sample_aspect_ratio" in change:
            stream.codec_context.sample_aspect_ratio = change["sample_aspect_ratio"]
        if name == "mirrored.mp4":
            stream.set_display_rotation(180)
        for array in numbered_frames(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    if name == "mirrored.mp4":  # from a turn by 180 degrees, (-1, 0, 0, -1), to a horizontal mirror, (-1, 0, 0, 1)
        content = bytearray((tmp_path / name).read_bytes())
        place = content.index(struct.pack(">5i", -(1 << 16), 0, 0, 0, -(1 << 16)))
        struct.pack_into(">i", content, place + 16, 1 << 16)
        (tmp_path / name).write_bytes(content)
    for _ in range(2):
        with open_video(str(tmp_path / name)) as video:
            video.get_frames([1, 3])
    assert caplog.text.count("Not said again") == (expected is not None)
    assert expected is None or f"{name}: {expected}" in caplog.text


def test_pixels_of_another_shape_are_no_other_kind(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(video_module, "said", set())
    for ratio in (Fraction(4, 3), Fraction(16, 15)):
        with av.open(str(tmp_path / f"{ratio.numerator}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
            stream.codec_context.sample_aspect_ratio = ratio
            for array in numbered_frames(3):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            container.mux(stream.encode(None))
        with open_video(str(tmp_path / f"{ratio.numerator}.mp4")) as video:
            video.get_frames([1])
    assert caplog.text.count("its pixels are not square") == 1


@pytest.mark.parametrize("name", ["hevc.mkv", "mpeg2.mkv", "hevc.mp4", "h264.mkv"])
def test_long_clips_that_begin_inside_a_group_lose_nothing(tmp_path, monkeypatch, name):
    codec, options = CUT_KINDS.get(name, CUT_KINDS["h264.ts"])
    write_video(tmp_path / f"source.{name.split('.')[1]}", numbered_frames(200), codec=codec, options=options)
    copy_packets(tmp_path / f"source.{name.split('.')[1]}", tmp_path / name, first_keyframe=2, length=150)
    with open_video(str(tmp_path / name)) as video:
        expected = read_numbers(video.get_frames(range(video.num_frames)))
    monkeypatch.setattr(video_module, "LONG_SECONDS", 1.0)
    with open_video(str(tmp_path / name)) as video:
        assert read_numbers(video.get_frames(range(video.num_frames))) == expected
        assert len(expected) > 130


def test_raw_streams_are_read(tmp_path):
    write_video(tmp_path / "video.h264", numbered_frames(40), options={"g": "12", "bf": "0"})
    (tmp_path / "raw.mp4").write_bytes((tmp_path / "video.h264").read_bytes())
    for name in ("video.h264", "raw.mp4"):
        with open_video(str(tmp_path / name)) as video:
            assert video.num_frames == 40
            assert read_numbers(video.get_frames([7, 33])) == [7, 33]
            assert read_numbers(video.get_frames([2])) == [2]


def test_pairs_of_a_long_recording_that_stands_still_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "LONG_SECONDS", 60.0)
    times = np.concatenate([np.arange(0, 300, 25), 300 + np.arange(600) / 4])  # a picture every 25 s, then 4 a second
    write_video(tmp_path / "screen.mp4", numbered_frames(len(times)), 4, timestamps=times, options={"g": "4"})
    for strategy in ("distant", "adjacent", "fixed_gap"):
        dataset = load_frame_pairs(
            tmp_path, (64, 96), frame_sampling=strategy, crop_scale=[1, 1], horizontal_flip=False
        )
        for epoch in range(12):
            first, second = dataset[epoch, 0, 0]["pixel_values"]
            assert not torch.equal(first, second)


def test_a_video_of_one_keyframe_is_not_read_whole_for_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "LONG_SECONDS", 1.0)
    monkeypatch.setattr(odd_videos, "MAX_TAIL_PACKETS", 50)
    write_video(tmp_path / "one.mp4", numbered_frames(120), options={"g": "9999", "sc_threshold": "0"})
    with open_video(str(tmp_path / "one.mp4")) as video:
        assert not video.is_long and video.num_frames == 120


@pytest.mark.parametrize(("keyint", "suffix"), [(40, "mp4"), (12, "mkv"), (40, "ts")])
def test_pictures_that_are_refreshed_little_by_little_are_whole(tmp_path, keyint, suffix):
    path = tmp_path / f"refresh.{suffix}"
    options = {"x264-params": f"intra-refresh=1:keyint={keyint}:bframes=0"}
    write_video(path, numbered_frames(300), options=options)
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for index in range(120, 280, 7):
        with open_video(str(path)) as video:
            (frame,) = video.get_frames([index]).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(frame, expected[index])


def test_joined_recordings_whose_clock_goes_back_or_leaps(tmp_path):
    parts = []
    for seed, start in ((0, 2000.0), (1, 0.0), (2, 5000.0)):
        times = start + np.arange(60) / 30
        write_video(tmp_path / f"{seed}.ts", numbered_frames(60, seed=seed), timestamps=times, options={"bf": "0"})
        parts.append((tmp_path / f"{seed}.ts").read_bytes())
    for name, content in {"back.ts": parts[0] + parts[1], "leap.ts": parts[1] + parts[2]}.items():
        (tmp_path / name).write_bytes(content)
        with open_video(tmp_path / name) as video:
            assert video.num_frames == 120 and video.duration == pytest.approx(4.0, abs=0.15)
            assert read_numbers(video.get_frames([0, 59, 60, 119])) == [0, 59, 0, 59]


@pytest.mark.parametrize("late", [[2e6], [2e6, 2e6 + 0.1], [5.0, 90_000.0]])
def test_times_that_leap_by_more_than_a_day_are_no_times(tmp_path, caplog, late):
    # Else a recording of two seconds would have two million steps of a second, nearly all of one frame.
    path = tmp_path / "leap.mkv"
    write_video(path, numbered_frames(20 + len(late)), 10, timestamps=[*np.arange(20) / 10, *late])
    video_module.said.discard("clock")
    with open_video(path) as video:
        assert video.duration == pytest.approx((20 + len(late)) / 10)
        assert read_numbers(video.get_frames([3, 20])) == [3, 20]
    assert "leap.mkv: its clock goes back or leaps" in caplog.text


def test_a_long_matroska_file_is_read_in_parts_unless_its_keyframes_leap(tmp_path, monkeypatch):
    write_video(tmp_path / "long.mkv", numbered_frames(120), options={"g": "10"})  # a keyframe every third of a second
    monkeypatch.setattr(video_module, "LONG_SECONDS", 1.0)
    for pause, is_long in ((0.5, True), (0.2, False)):
        monkeypatch.setattr(odd_videos, "PAUSE_SECONDS", pause)
        with open_video(str(tmp_path / "long.mkv")) as video:
            assert video.is_long == is_long and video.duration == pytest.approx(4.0)


def test_a_pause_of_some_hours_stays(tmp_path):
    write_video(tmp_path / "pause.mkv", numbered_frames(21), 10, timestamps=[*np.arange(20) / 10, 80_000.0])
    with open_video(tmp_path / "pause.mkv") as video:
        assert video.timestamps[-1] == 80_000.0 and video.duration > 80_000.0


def test_a_part_in_which_a_picture_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(video_module, "LONG_SECONDS", 10.0)
    times = np.concatenate([np.arange(60) / 10, 100 + np.arange(60) / 10])
    options = {"g": "30", "bf": "2", "x264-params": "scenecut=0"}
    write_video(tmp_path / "pause.mp4", numbered_frames(120), 10, timestamps=times, options=options)
    for start, end, expected in ((40, 41, [59]), (50, 100.25, [59, 60, 61, 62])):
        with open_video(str(tmp_path / "pause.mp4")) as video:
            assert video.is_long
        with EncodedItem(str(tmp_path / "pause.mp4"), "video", True, start, end).open("pyav") as part:
            assert read_numbers(part.get_frames(range(part.num_frames))) == expected
