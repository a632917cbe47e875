import itertools
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoVideoProcessor

import vicmae_hf  # noqa: F401 (registers the processors)
from vicmae_hf.video_processing_vicmae import ViCMAEVideoProcessor, sample_frame_indices, spatial_crop_offsets


MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
SMALL = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
GRAY_STEP = 4


def write_video(path: Path, num_frames: int, rate: int = 30, codec: str = "libx264", **options: str) -> str:
    """Writes 96x64 frames whose gray is GRAY_STEP times their index, with a red square in the top left corner."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index in range(num_frames):
            pixels = np.full((64, 96, 3), GRAY_STEP * index, np.uint8)
            pixels[:16, :16] = (255, 0, 0)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


def decoded_indices(pixel_values: torch.Tensor) -> list:
    """The frames that `write_video` wrote, read from the gray in the middle of (..., 3, H, W)."""
    height, width = pixel_values.shape[-2:]
    gray = (pixel_values * STD + MEAN)[..., height // 2, width // 2].mean(-1) * 255
    assert (gray / GRAY_STEP - (gray / GRAY_STEP).round()).abs().max() < 0.4
    return (gray / GRAY_STEP).round().long().tolist()


def make_frames(num_frames: int, height: int, width: int, num_channels: int = 3) -> torch.Tensor:
    """Noise with structure (T, C, H, W), uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num_frames, num_channels, 6, 6, generator=generator)
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).to(torch.uint8)


def transcribed_indices(total_num_frames, num_frames, fps, video_fps, num_clips):
    """The rules of `sample_frame_indices` one frame at a time, in exact fractions."""
    clips = []
    for clip in range(num_clips):
        indices = []
        for position in range(num_frames):
            if fps is None:
                segment = Fraction(total_num_frames, num_frames)
                indices.append(int((position + Fraction(2 * clip + 1, 2 * num_clips)) * segment))
            else:
                step = Fraction(video_fps) / Fraction(fps)
                room = max(total_num_frames - 1 - (num_frames - 1) * step, 0)
                start = int(room / 2 if num_clips == 1 else room * clip / (num_clips - 1))
                indices.append(min(int(start + position * step + Fraction(1, 2)), total_num_frames - 1))
        clips.append(indices)
    return clips


@pytest.mark.parametrize(("fps", "video_fps"), [(None, None), (None, 25.0), (7.5, 30.0), (7.5, 24.0), (30.0, 12.5)])
def test_sampling_equals_its_transcription(fps, video_fps):
    for counts in itertools.product([1, 2, 7, 16, 61, 300], [1, 2, 6, 16], [1, 2, 7]):
        total_num_frames, num_frames, num_clips = counts
        indices = sample_frame_indices(total_num_frames, num_frames, fps, video_fps, num_clips)
        assert indices.dtype == np.int64
        expected = transcribed_indices(total_num_frames, num_frames, fps, video_fps, num_clips)
        assert indices.tolist() == expected, counts


def test_sampling_by_hand():
    assert sample_frame_indices(5).tolist() == [[0, 1, 2, 3, 4]]
    assert sample_frame_indices(8, num_frames=4).tolist() == [[1, 3, 5, 7]]
    assert sample_frame_indices(8, num_frames=4, num_clips=2).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # Kinetics: every 4th frame, 61 of 300 frames, from the middle; three clips from start to end.
    assert sample_frame_indices(300, 16, fps=7.5, video_fps=30).tolist() == [list(range(119, 180, 4))]
    clips = sample_frame_indices(300, 16, fps=7.5, video_fps=30, num_clips=3)
    assert clips[:, 0].tolist() == [0, 119, 239]
    assert clips[:, -1].tolist() == [60, 179, 299]
    # 29.97 frames per second: still every 4th frame.
    assert np.diff(sample_frame_indices(300, 16, fps=7.5, video_fps=30000 / 1001)[0]).tolist() == [4] * 15
    # Short videos repeat: spread out when uniform, the last frame when dense.
    assert sample_frame_indices(3, num_frames=6).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert sample_frame_indices(6, 4, fps=7.5, video_fps=30).tolist() == [[0, 4, 5, 5]]
    # `fps` alone: two seconds at 3 frames per second; never no frame at all.
    assert sample_frame_indices(8, fps=3, video_fps=4).tolist() == [[0, 2, 3, 4, 6, 7]]
    assert sample_frame_indices(1, fps=3, video_fps=30).tolist() == [[0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_num_frames": 0}, "total_num_frames to be at least 1, got 0"),
        ({"num_frames": 0}, "num_frames to be at least 1, got 0"),
        ({"num_frames": -2}, "num_frames to be at least 1, got -2"),
        ({"num_frames": 4, "num_clips": 0}, "num_clips to be at least 1, got 0"),
        ({"fps": 0, "video_fps": 30}, "fps to be positive, got 0"),
        ({"fps": 2, "video_fps": float("nan")}, "video_fps to be positive, got nan"),
        ({"fps": 2}, "own frame rate, got None"),
        ({"num_clips": 3}, "num_clips=1 without num_frames or fps, got num_clips=3"),
    ],
)
def test_bad_sampling_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_frame_indices(**{"total_num_frames": 10, **arguments})


def test_crop_offsets():
    assert spatial_crop_offsets(340, 224, 1) == [58]
    assert spatial_crop_offsets(340, 224, 3) == [0, 58, 116]
    assert spatial_crop_offsets(224, 224, 2) == [0, 0]
    assert spatial_crop_offsets(200, 224, 3) == [0, 0, 0]
    with pytest.raises(ValueError, match="num_crops to be at least 1, got 0"):
        spatial_crop_offsets(340, 224, 0)


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"), [(120, 161, (256, 343), (16, 59)), (301, 200, (385, 256), (80, 16))]
)
def test_values_are_resize_crop_and_normalise(height, width, resized, corner):
    frames = make_frames(3, height, width)
    output = ViCMAEVideoProcessor()(frames, return_tensors="pt")
    assert list(output) == ["pixel_values"]
    assert output.pixel_values.dtype == torch.float32

    enlarged = tvF.resize(frames, resized, tvF.InterpolationMode.BICUBIC, antialias=True)
    top, left = corner
    cropped = enlarged[..., top : top + 224, left : left + 224].double() / 255
    expected = ((cropped - MEAN) / STD).float()
    torch.testing.assert_close(output.pixel_values, expected[None], atol=2e-5, rtol=0)


def test_videos_of_every_form():
    processor = ViCMAEVideoProcessor(**SMALL)
    first, second = make_frames(4, 50, 70), make_frames(4, 70, 50).flip(-1)
    expected = torch.cat([processor(video, return_tensors="pt").pixel_values for video in (first, second)])
    assert expected.shape == (2, 4, 3, 32, 32)

    channels_last = [video.permute(0, 2, 3, 1).numpy() for video in (first, second)]
    batches = {
        "tensors": [first, second],
        "channels first": [first.numpy(), second.numpy()],
        "channels last": channels_last,
        "lists of arrays": [list(video) for video in channels_last],
        "lists of tensors": [list(first), list(second)],
        "lists of PIL images": [[Image.fromarray(frame) for frame in video] for video in channels_last],
        "nested once more": [[list(channels_last[0])], [list(channels_last[1])]],
        "both layouts": [first, channels_last[1]],
    }
    for name, batch in batches.items():
        output = processor(batch, return_tensors="pt").pixel_values
        torch.testing.assert_close(output, expected, atol=0, rtol=0, msg=name)
    single = processor(batches["lists of PIL images"][0], return_tensors="pt").pixel_values
    torch.testing.assert_close(single, expected[:1], atol=0, rtol=0)
    one_array = processor(torch.stack([first, first]), return_tensors="pt").pixel_values
    torch.testing.assert_close(one_array, expected[[0, 0]], atol=0, rtol=0)


def test_gray_becomes_rgb_and_transparency_is_left_out():
    processor = ViCMAEVideoProcessor(**SMALL)
    gray = make_frames(2, 50, 70, num_channels=1)
    expected = processor(gray.expand(-1, 3, -1, -1), return_tensors="pt").pixel_values
    pil_frames = [Image.fromarray(frame[0].numpy()) for frame in gray]
    for video in (gray, gray.permute(0, 2, 3, 1).numpy(), pil_frames):
        torch.testing.assert_close(processor(video, return_tensors="pt").pixel_values, expected, atol=0, rtol=0)

    transparent = torch.zeros(2, 4, 40, 40, dtype=torch.uint8)
    transparent[:, 0] = 200
    transparent[:, 3, :, :20] = 255
    pil_frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in transparent]
    for video, scale in ((transparent, {}), (pil_frames, {}), (transparent / 255, {"do_rescale": False})):
        values = processor(video, return_tensors="pt", **scale).pixel_values[0] * STD + MEAN
        expected = torch.tensor([200, 0, 0])[:, None, None] / 255
        torch.testing.assert_close(values, expected.expand(2, 3, 32, 32), atol=0.005, rtol=0)


@pytest.mark.parametrize("wide", [True, False])
def test_views_cover_the_video_clip_by_clip(wide):
    # The red of a pixel tells its place along the longer side, the green its frame.
    length, num_frames = 100, 20
    frames = torch.zeros(num_frames, 3, 40, length, dtype=torch.uint8)
    frames[:, 0] = torch.arange(length)
    frames[:, 1] = 10 * torch.arange(num_frames)[:, None, None]
    if not wide:
        frames = frames.transpose(2, 3)
    processor = ViCMAEVideoProcessor(
        **SMALL, do_resize=False, do_sample_frames=True, num_frames=4, fps=10, num_clips=2, num_crops=3
    )
    metadata = [{"total_num_frames": num_frames, "fps": 30.0}]
    output = processor(frames, video_metadata=metadata, return_tensors="pt").pixel_values
    assert output.shape == (1, 6, 4, 3, 32, 32)

    levels = ((output * STD + MEAN) * 255).round().long()[0]
    places, times = levels[:, :, 0], levels[:, :, 1] // 10
    if not wide:
        places = places.transpose(-1, -2)
    clips = [[0, 3, 6, 9], [10, 13, 16, 19]]
    offsets = [0, 34, 68]
    for view in range(6):
        assert times[view, :, 0, 0].tolist() == clips[view // 3]
        assert places[view, 0, 0].tolist() == list(range(offsets[view % 3], offsets[view % 3] + 32))

    one_view = processor(frames, video_metadata=metadata, num_clips=1, num_crops=1, return_tensors="pt").pixel_values
    assert one_view.shape == (1, 4, 3, 32, 32)


def test_views_of_a_batch_stay_apart():
    processor = ViCMAEVideoProcessor(**SMALL, do_sample_frames=True, num_frames=3, num_clips=2, num_crops=2)
    videos = [make_frames(9, 50, 70), make_frames(12, 70, 50), make_frames(9, 50, 70).flip(0)]
    together = processor(videos, return_tensors="pt").pixel_values
    alone = torch.cat([processor(video, return_tensors="pt").pixel_values for video in videos])
    assert together.shape == (3, 4, 3, 3, 32, 32)
    torch.testing.assert_close(together, alone, atol=0, rtol=0)


def test_settings_survive_saving(tmp_path):
    processor = ViCMAEVideoProcessor(
        **SMALL, do_sample_frames=True, num_frames=6, fps=7.5, num_clips=7, num_crops=3, image_std=[0.5, 0.5, 0.5]
    )
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "video_preprocessor_config.json",
        "video_processing_vicmae.py",
        "media_reading_vicmae.py",
    }
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is ViCMAEVideoProcessor
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.num_frames, loaded.fps, loaded.num_clips, loaded.num_crops) == (6, 7.5, 7, 3)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("plain.mp4", "libx264", {}),
        ("seekable.mp4", "libx264", {"g": "5", "bf": "2"}),
        ("no_frame_count.mkv", "libx264", {}),
        ("hevc.mp4", "libx265", {}),
    ],
)
def test_files_give_the_right_frames(name, codec, options, tmp_path):
    path = write_video(tmp_path / name, 60, codec=codec, **options)
    processor = ViCMAEVideoProcessor(**SMALL, do_sample_frames=True)

    def frames_of(videos, **settings):
        return decoded_indices(processor(videos, return_tensors="pt", **settings).pixel_values)

    assert frames_of(path) == [list(range(60))]
    assert frames_of(path, num_frames=6) == [[5, 15, 25, 35, 45, 55]]
    assert frames_of(path, num_frames=4, fps=7.5) == [[23, 27, 31, 35]]
    assert frames_of(path, fps=3) == [[5, 15, 25, 35, 45, 55]]
    # Clips overlap and go back in time.
    assert frames_of(path, num_frames=3, fps=1.5, num_clips=2) == [[[0, 20, 40], [19, 39, 59]]]
    assert frames_of([path, Path(path)], num_frames=2) == [[15, 45], [15, 45]]


def test_a_stream_without_a_container(tmp_path):
    """It tells no number of frames, and nobody can seek in it."""
    processor = ViCMAEVideoProcessor(**SMALL, do_sample_frames=True, num_frames=6)
    path = write_video(tmp_path / "stream.h264", 60)
    assert decoded_indices(processor(path, return_tensors="pt").pixel_values) == [[5, 15, 25, 35, 45, 55]]


def test_a_short_file_repeats_frames(tmp_path):
    path = write_video(tmp_path / "short.mp4", 4)
    processor = ViCMAEVideoProcessor(**SMALL)
    # This is how the video-classification pipeline calls it.
    output = processor(path, num_frames=8, do_sample_frames=True, return_tensors="pt", return_metadata=True)
    assert decoded_indices(output.pixel_values) == [[0, 0, 1, 1, 2, 2, 3, 3]]
    metadata = output.video_metadata[0]
    assert (metadata.total_num_frames, metadata.fps, metadata.height, metadata.width) == (4, 30.0, 64, 96)
    assert metadata.duration == pytest.approx(4 / 30)

    output = processor(path, num_frames=6, fps=7.5, do_sample_frames=True, return_tensors="pt")
    assert decoded_indices(output.pixel_values) == [[0, 3, 3, 3, 3, 3]]


@pytest.mark.parametrize("fps", [None, 7.5])
def test_as_many_frames_in_memory_as_a_clip_has_are_taken_as_they_are(fps, tmp_path):
    """Also by a processor that samples files by time, as `run_classification.py` saves it."""
    ViCMAEVideoProcessor(**SMALL, do_sample_frames=True, num_frames=4, fps=fps).save_pretrained(tmp_path)
    processor = AutoVideoProcessor.from_pretrained(tmp_path)
    video = torch.randint(0, 256, (4, 3, 30, 40), dtype=torch.uint8)
    expected = processor(video, do_sample_frames=False, return_tensors="pt").pixel_values
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in video]
    for clip in (video, video.numpy(), list(video), pictures, [pictures, pictures]):
        found = processor(clip, return_tensors="pt").pixel_values
        assert torch.equal(found, expected.expand(len(found), *expected.shape[1:]))
    # With a rate of their own they are sampled by time, as a file is: here 4 frames in 0.1 s, at 7.5 per second.
    if fps is not None:
        metadata = [{"total_num_frames": 4, "fps": 40.0}]
        timed = processor(video, video_metadata=metadata, return_tensors="pt").pixel_values
        assert not torch.equal(timed, expected)
        with pytest.raises(ValueError, match=r"own frame rate, got None.*exactly `num_frames` frames"):
            processor(torch.zeros(5, 3, 30, 40, dtype=torch.uint8), return_tensors="pt")
        with pytest.raises(ValueError, match="own frame rate, got None"):
            processor(video, num_clips=2, return_tensors="pt")


def test_frames_in_memory_repeat_only_with_their_rate():
    processor = ViCMAEVideoProcessor(**SMALL, do_sample_frames=True, num_frames=6)
    with pytest.raises(ValueError, match="at least num_frames=6 frames, got 3"):
        processor(make_frames(3, 50, 50))
    metadata = [{"total_num_frames": 3, "fps": 30.0}]
    output = processor(make_frames(3, 50, 50), video_metadata=metadata, return_tensors="pt").pixel_values
    torch.testing.assert_close(output[0, ::2], output[0, 1::2], atol=0, rtol=0)
    assert output.shape == (1, 6, 3, 32, 32)


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), (slice(0, 8), slice(0, 8))),
        ((0, 1, -1, 0), (slice(0, 8), slice(-8, None))),
        ((-1, 0, 0, -1), (slice(-8, None), slice(-8, None))),
        ((0, -1, 1, 0), (slice(-8, None), slice(0, 8))),
    ],
)
def test_rotated_files_are_upright(matrix, corner, tmp_path):
    path = Path(write_video(tmp_path / "rotated.mp4", 3))
    content = bytearray(path.read_bytes())
    # The track header: 8 bytes of size and name, 40 of times and layers, then the matrix a, b, u, c, d, v, x, y, w.
    offset = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (element << 16 for element in matrix)
    content[offset : offset + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)

    pixel_values = ViCMAEVideoProcessor(do_resize=False, do_center_crop=False)(
        str(path), return_tensors="pt"
    ).pixel_values
    assert pixel_values.shape[-2:] == ((64, 96) if matrix[0] else (96, 64))
    red = (pixel_values * STD + MEAN)[0, 0]
    square = red[:, *corner]
    torch.testing.assert_close(square.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]), atol=0.06, rtol=0)
    assert red[0].mean() < 0.05


def test_a_file_that_is_cut_off_is_sampled_from_what_is_left(tmp_path):
    path = Path(write_video(tmp_path / "cut.mp4", 60, movflags="faststart", g="5", bf="0"))
    content = path.read_bytes()
    path.write_bytes(content[: int(0.9 * len(content))])
    processor = ViCMAEVideoProcessor(**SMALL, do_sample_frames=True, num_frames=4)
    output = processor(str(path), return_tensors="pt", return_metadata=True)
    num_left = output.video_metadata[0].total_num_frames
    assert 4 < num_left < 60
    assert decoded_indices(output.pixel_values) == sample_frame_indices(num_left, 4).tolist()


def test_bad_files_are_named(tmp_path):
    processor = ViCMAEVideoProcessor()
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        processor(str(tmp_path / "missing.mp4"))
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4: expected a video that can be decoded"):
        processor(str(text))
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(ValueError, match=r"sound\.wav: expected a file with a video stream, found none"):
        processor(str(sound))


@pytest.mark.parametrize(
    ("videos", "settings", "message"),
    [
        ([], {}, "at least one frame, got an empty list"),
        ([[]], {}, "at least one frame, got an empty list"),
        (np.zeros((0, 3, 30, 40), np.uint8), {}, r"at least one frame.*\(0, 3, 30, 40\)"),
        ([np.zeros((30, 40), np.uint8)] * 3, {}, r"frames \(C, H, W\).*\(30, 40\)"),
        (np.zeros((4, 30, 40, 2), np.uint8), {}, r"1, 3 or 4 channels.*\(4, 30, 40, 2\)"),
        (torch.zeros(4, 5, 30, 40), {"input_data_format": "channels_first"}, r"1, 3 or 4 channels.*\(4, 5, 30, 40\)"),
        (torch.zeros(4, 3, 30, 40), {"do_sample_frames": True, "num_frames": 0}, "num_frames to be at least 1, got 0"),
        (torch.zeros(4, 3, 30, 40), {"do_sample_frames": True, "fps": 2}, "own frame rate, got None"),
        (torch.zeros(4, 3, 30, 40), {"num_clips": 2}, "do_sample_frames=True with num_clips=2, got False"),
        (torch.zeros(4, 3, 30, 40), {"num_crops": 0}, "num_crops to be at least 1, got 0"),
        (torch.zeros(4, 3, 30, 40), {"num_crops": 3, "do_center_crop": False}, "do_center_crop=True with num_crops=3"),
    ],
)
def test_bad_input_is_named(videos, settings, message):
    with pytest.raises(ValueError, match=message):
        ViCMAEVideoProcessor(**SMALL)(videos, return_tensors="pt", **settings)


@pytest.mark.slow  # tests/test_hub.py opens a whole folder so
def test_code_travels_with_the_settings(tmp_path):
    ViCMAEVideoProcessor(**SMALL, num_crops=3).save_pretrained(tmp_path / "export")
    path = write_video(tmp_path / "video.mp4", 12)
    script = f"""
import sys
sys.modules["vicmae_hf"] = None
from transformers import AutoVideoProcessor
processor = AutoVideoProcessor.from_pretrained({str(tmp_path / "export")!r}, trust_remote_code=True)
output = processor({path!r}, do_sample_frames=True, num_frames=4, return_tensors="pt")
print(type(processor).__name__, *output.pixel_values.shape)
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["ViCMAEVideoProcessor", "1", "3", "4", "3", "32", "32"]
