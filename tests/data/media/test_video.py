import gc
import logging
import os
import pickle
import random
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf import media_reading_vicmae
from vicmae_hf.data.media import video as video_module
from vicmae_hf.data.media.other_decoders import BACKENDS, OTHER_DECODERS, check_backend
from vicmae_hf.data.media.video import VideoDecodingError, open_video
from vicmae_hf.errors import InputError
from vicmae_hf.media_reading_vicmae import read_video


NUM_FRAMES = 40
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:scenecut=0:keyint=12"}
X265 = {"x265-params": "keyint=12:log-level=none:pools=1"}
# Keyframes are frequent, so that the decoders have to seek.
KINDS = {
    "h264.mp4": {"options": {"g": "12"}},
    "h264.mkv": {"options": {"g": "12"}},
    "h264.mov": {"options": {"g": "12"}},
    "h264.avi": {"options": {"g": "12"}},  # B-frames in a container that cannot tell their times
    "h264_fragmented.mp4": {"options": {"g": "12"}, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h264_open_groups.mp4": {"options": OPEN_GROUPS},
    "h264_open_groups.mkv": {"options": OPEN_GROUPS},
    "h264_gradual_refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}},
    "h264_yuv444.mp4": {"pix_fmt": "yuv444p"},
    "h264_10_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "h264_gray.mp4": {"pix_fmt": "gray"},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc.mkv": {"codec": "libx265", "options": X265},
    "hevc_layers.mp4": {
        "codec": "libx265",
        "options": {"x265-params": "keyint=20:temporal-layers=3:bframes=7:b-adapt=0:log-level=none:pools=1"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "lag-in-frames": "16", "auto-alt-ref": "1"}},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "12", "lag-in-frames": "16", "auto-alt-ref": "1"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"g": "12", "preset": "12"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mpeg4_no_b_frames.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}


def usable(name: str) -> bool:
    try:
        check_backend(name)
    except InputError:
        return False
    return True


@pytest.fixture(params=BACKENDS)
def backend(request):
    if not usable(request.param):
        pytest.skip(f"{request.param} is not usable on this machine")
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / request.param
    write_video(path, numbered_frames(NUM_FRAMES), **KINDS[request.param])
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """H.264 in MP4, closed groups of 12 frames, 30 frames/s."""
    path = tmp_path_factory.mktemp("plain") / "plain.mp4"
    write_video(path, numbered_frames(NUM_FRAMES), options={"g": "12"})
    return path


def decode_sequentially(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def overwrite_packet(path: Path, position: int, offset: int, content: bytes) -> None:
    """Write `content` over a packet's bytes from `offset` on."""
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][position]
        start, size = packet.pos + offset, packet.size
    assert offset + len(content) <= size
    data = bytearray(path.read_bytes())
    data[start : start + len(content)] = content
    path.write_bytes(data)


def test_frames_are_the_ones_asked_for(kind, backend):
    reference = decode_sequentially(kind)
    generator = random.Random(0)
    asked = [[index] for index in range(0, NUM_FRAMES, 5)] + [
        [generator.randrange(NUM_FRAMES) for _ in range(4)] for _ in range(8)
    ]
    for indices in asked:  # each time afresh: whether a decoder errs depends on where it comes from
        with open_video(kind, backend) as video:
            frames = video.get_frames(indices)
        assert frames.shape == (len(indices), 3, 64, 96) and frames.dtype == torch.uint8
        assert read_numbers(frames) == indices
        # At 10 bits, versions of FFmpeg differ in how they interpolate colour.
        difference = (frames.float() - reference[indices].float()).abs()
        assert difference.mean() < 4 if "10_bit" in kind.name else difference.max() <= 1


def test_one_reader_serves_many_requests(kind, backend):
    with open_video(kind, backend) as video:
        for indices in ([30, 2, 17, 2], [0], list(range(NUM_FRAMES)), [39], [5, 4]):
            assert read_numbers(video.get_frames(indices)) == indices


def test_times(kind, backend):
    with open_video(kind, backend) as video:
        assert video.num_frames == NUM_FRAMES
        assert video.timestamps.dtype == np.float64 and video.timestamps[0] == 0
        # Matroska rounds times to milliseconds.
        np.testing.assert_allclose(video.timestamps, np.arange(NUM_FRAMES) / 30, atol=6e-4)
        assert video.duration == pytest.approx(NUM_FRAMES / 30, abs=1.1e-3)


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9")])
def test_variable_frame_rate_and_late_start(tmp_path, backend, suffix, codec):
    path = tmp_path / f"variable.{suffix}"
    steps = np.random.default_rng(0).integers(10, 120, NUM_FRAMES)
    timestamps = 5 + np.cumsum(steps) / 1000
    write_video(path, numbered_frames(NUM_FRAMES), codec=codec, timestamps=timestamps, options={"g": "12"})
    with open_video(path, backend) as video:
        np.testing.assert_allclose(video.timestamps, timestamps - timestamps[0], atol=1e-9)
        assert timestamps[-1] - timestamps[0] < video.duration < timestamps[-1] - timestamps[0] + 0.2
        assert read_numbers(video.get_frames([33, 7, 20])) == [33, 7, 20]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation_metadata_is_applied(tmp_path, backend, suffix, rotation):
    path = tmp_path / f"rotated.{suffix}"
    stored = np.rot90(numbered_frames(8, height=96, width=64), -rotation // 90, axes=(1, 2))
    write_video(path, np.ascontiguousarray(stored), rotation=rotation)
    with open_video(path, backend) as video:
        frames = video.get_frames([6, 1])
    assert frames.shape == (2, 3, 96, 64)
    assert read_numbers(frames) == [6, 1]


def test_frames_hidden_by_an_edit_list_do_not_count(plain, tmp_path, backend):
    data = bytearray(plain.read_bytes())
    media_time = data.index(b"elst") + 16  # after type, version and flags, count, duration of the segment
    start = struct.unpack_from(">i", data, media_time)[0]
    frame = 15360 // 30  # the muxer counts in 1/15360 s
    struct.pack_into(">i", data, media_time, start + 5 * frame)
    path = tmp_path / "edited.mp4"
    path.write_bytes(data)
    with open_video(path, backend) as video:
        assert video.num_frames == NUM_FRAMES - 5
        assert video.timestamps[0] == 0 and video.timestamps[1] == pytest.approx(1 / 30)
        for index in (0, 6, 7, 20, 34):
            assert read_numbers(video.get_frames([index])) == [index + 5]


@pytest.mark.parametrize(
    "name, options",
    [
        ("odd.webm", {"codec": "libvpx-vp9"}),
        ("odd.avi", {"codec": "mpeg4"}),
        ("odd.mp4", {"pix_fmt": "yuv444p"}),
    ],
)
def test_odd_sizes(tmp_path, backend, name, options):
    write_video(tmp_path / name, numbered_frames(10, height=53, width=97), **options)
    with open_video(tmp_path / name, backend) as video:
        frames = video.get_frames([9, 0, 4])
    assert frames.shape == (3, 3, 53, 97)
    assert read_numbers(frames) == [9, 0, 4]


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")])
def test_video_of_one_frame(tmp_path, backend, suffix, codec):
    write_video(tmp_path / f"one.{suffix}", numbered_frames(6)[5:], fps=25, codec=codec)
    with open_video(tmp_path / f"one.{suffix}", backend) as video:
        assert video.num_frames == 1 and video.timestamps.tolist() == [0]
        assert video.duration == pytest.approx(1 / 25, abs=1e-3)
        assert read_numbers(video.get_frames([0, 0])) == [5, 5]


@pytest.mark.parametrize("full_range", [False, True])
def test_colours(tmp_path, backend, full_range):
    colour = np.array([200, 40, 90], dtype=np.uint8)
    path = tmp_path / "colour.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        color_range = 2 if full_range else 1  # AVCOL_RANGE_JPEG, AVCOL_RANGE_MPEG
        stream.codec_context.color_range = color_range
        frame = av.VideoFrame.from_ndarray(np.broadcast_to(colour, (64, 96, 3)).copy(), format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_color_range=color_range)))
        container.mux(stream.encode(None))
    with open_video(path, backend) as video:
        mean = video.get_frames([0])[0].float().mean(dim=(1, 2))
    torch.testing.assert_close(mean, torch.tensor(colour).float(), atol=3, rtol=0)


def test_bytes_are_read_like_the_file(kind, backend):
    with open_video(kind, backend) as from_path, open_video(kind.read_bytes(), backend) as from_bytes:
        assert from_bytes.timestamps.tolist() == from_path.timestamps.tolist()
        assert from_bytes.duration == from_path.duration
        assert torch.equal(from_bytes.get_frames([31, 8]), from_path.get_frames([31, 8]))


def test_frames_are_not_copied_into_another_layout(plain):
    with open_video(plain, "pyav") as video:
        frames = video.get_frames([3, 9])
    assert frames.permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.parametrize("name", ["av1.mp4", "hevc.mp4", "mjpeg.avi"])
def test_pyav_stands_in_for_decord_and_says_so_once(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(video_module, "said", set())
    write_video(tmp_path / name, numbered_frames(NUM_FRAMES), **KINDS[name])
    with caplog.at_level(logging.WARNING, logger="vicmae_hf"):
        for _ in range(2):
            with open_video(tmp_path / name, "decord") as video:
                assert [read_numbers(video.get_frames([index])) for index in (30, 3, 5)] == [[30], [3], [5]]
    (record,) = caplog.records
    assert "decord" in record.message and "pyav" in record.message and str(tmp_path / name) in record.message


def test_nothing_is_said_where_decord_decodes(plain, monkeypatch, caplog):
    monkeypatch.setattr(video_module, "said", set())
    with open_video(plain, "decord") as video:
        video.get_frames([3])
    assert not caplog.records


def write_text(path: Path) -> None:
    path.write_text("This is no video.\n" * 100)


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_without_its_end(path: Path) -> None:
    write_video(path, numbered_frames(NUM_FRAMES), options={"g": "12"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def write_without_its_end_but_with_its_index(path: Path) -> None:
    write_video(path, numbered_frames(NUM_FRAMES), container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def write_no_file(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    "write",
    [
        write_text,
        write_nothing,
        write_audio,
        write_without_its_end,
        write_without_its_end_but_with_its_index,
        write_no_file,
    ],
)
def test_files_that_are_no_videos(tmp_path, backend, write):
    path = tmp_path / "broken.mp4"
    write(path)
    with pytest.raises(VideoDecodingError) as caught:
        open_video(path, backend)
    assert caught.value.path == str(path) and "pyav" in caught.value.reasons
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if path.exists():
        with pytest.raises(VideoDecodingError, match="bytes"):
            open_video(path.read_bytes(), backend)


def test_damage_inside_a_video(plain, tmp_path, backend):
    path = tmp_path / "damaged.mp4"
    path.write_bytes(plain.read_bytes())
    overwrite_packet(path, 15, 0, b"\xff" * 4)  # an impossible length, in the second group of 12 frames
    for indices in ([3, 11], [24, 39]):
        with open_video(path, backend) as video:
            assert read_numbers(video.get_frames(indices)) == indices
    with open_video(path, backend) as video, pytest.raises(VideoDecodingError) as caught:
        video.get_frames([23])
    assert set(caught.value.reasons) == {backend, "pyav"}
    assert "\n" not in str(caught.value)


def test_damage_that_decoders_conceal(plain, tmp_path):
    path = tmp_path / "damaged.mp4"
    path.write_bytes(plain.read_bytes())
    overwrite_packet(path, 12, 200, np.random.default_rng(0).bytes(300))  # the second keyframe
    assert len(decode_sequentially(path)) == NUM_FRAMES
    with open_video(path, "pyav") as video:
        assert read_numbers(video.get_frames([11, 24])) == [11, 24]
        for index in (12, 17, 23):
            with pytest.raises(VideoDecodingError, match=r"damaged data near 0\.40 s"):
                video.get_frames([index])


def test_frames_that_would_fill_the_memory_are_refused(plain, monkeypatch):
    with open_video(plain, "pyav") as video:
        height, width = video.get_frames([0]).shape[-2:]
    monkeypatch.setattr(media_reading_vicmae, "MAX_FRAME_PIXELS", height * width)
    open_video(plain, "pyav").close()
    read_video(str(plain))
    monkeypatch.setattr(media_reading_vicmae, "MAX_FRAME_PIXELS", height * width - 1)
    expected = f"frames have {width}x{height} pixels, and at most {height * width - 1:,} are read"
    with pytest.raises(VideoDecodingError, match=expected):
        open_video(plain, "pyav")
    with pytest.raises(ValueError, match=f"{plain}: its {expected}"):  # of the saved processors
        read_video(str(plain))


def test_a_matroska_file_without_its_end_has_the_frames_that_are_there(tmp_path, backend):
    path = tmp_path / "short.mkv"
    write_video(path, numbered_frames(NUM_FRAMES), options={"g": "12"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with open_video(path, backend) as video:
        assert 5 < video.num_frames < NUM_FRAMES
        indices = [0, video.num_frames // 2, 4]
        assert read_numbers(video.get_frames(indices)) == indices


def test_a_song_with_a_cover_is_no_video(tmp_path, backend):
    path = tmp_path / "song.mp3"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("libmp3lame", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 64, 96, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered_frames(1)[0], format="rgb24")))
        container.mux(cover.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    with av.open(str(path)) as container:
        assert container.streams.video  # the cover, which must not be taken for a video
    with pytest.raises(VideoDecodingError, match="no video stream"):
        open_video(path, backend)


@pytest.mark.parametrize("indices", [[], [NUM_FRAMES], [3, -1]])
def test_indices_that_do_not_exist(plain, backend, indices):
    with open_video(plain, backend) as video, pytest.raises(ValueError, match="frames 0 to 39"):
        video.get_frames(indices)


def test_unknown_backend(plain):
    with pytest.raises(InputError, match="decord, torchcodec, pyav"):
        open_video(plain, "opencv")


def test_backend_that_is_not_installed(plain, monkeypatch):
    def import_library():
        raise ImportError("No module named 'torchcodec'")

    monkeypatch.setattr(OTHER_DECODERS["torchcodec"], "import_library", import_library)
    with pytest.raises(InputError, match=r"'torchcodec' cannot be used: No module named 'torchcodec'\. Install it"):
        open_video(plain, "torchcodec")


def test_error_can_leave_a_process():
    error = pickle.loads(pickle.dumps(VideoDecodingError("a.mp4", {"decord": "no", "pyav": "neither"})))
    assert error.path == "a.mp4" and error.reasons == {"decord": "no", "pyav": "neither"}
    assert str(error) == "cannot decode a.mp4: decord: no; pyav: neither"


class EveryFrame(torch.utils.data.Dataset):
    def __init__(self, path: Path, backend: str):
        self.path, self.backend = path, backend

    def __len__(self) -> int:
        return NUM_FRAMES

    def __getitem__(self, index: int) -> torch.Tensor:
        with open_video(self.path, self.backend) as video:
            return video.get_frames([index])[0]


def test_workers_after_the_parent_process_decoded(plain, backend):
    dataset = EveryFrame(plain, backend)
    dataset[0]
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="fork")
    assert read_numbers(torch.cat(list(loader))) == list(range(NUM_FRAMES))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_files_are_closed(plain, tmp_path, backend):
    broken = tmp_path / "broken.mp4"
    write_without_its_end_but_with_its_index(broken)

    def use() -> None:
        with open_video(plain, backend) as video:
            video.get_frames([3])
        with pytest.raises(VideoDecodingError):
            open_video(broken, backend)

    use()
    gc.collect()  # what tests before this one left open may be closed at any time
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(5):
        use()
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_memory_stays_flat(plain, backend):
    def resident_mebibytes() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

    data = plain.read_bytes()

    def use(times: int) -> None:
        for turn in range(times):
            with open_video(data if turn % 2 else plain, backend) as video:
                video.get_frames([3, 30])

    use(400)
    before = resident_mebibytes()
    use(2000)
    assert resident_mebibytes() - before < 20
