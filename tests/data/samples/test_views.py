"""Test views: which frames and crops they are, and which of them protocols share."""

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf import ViCMAEImageProcessor, ViCMAEVideoProcessor
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.samples.views import (
    SquaresBeforeProcessor,
    ViewDataset,
    ViewProtocol,
    build_test_views,
    choose_preprocessing,
    normalize_views,
)
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError


SIZES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}}


def write_clip(path, count=60, height=40, width=64, fps=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, numbered_frames(count, height, width), fps=fps)


def views_of(folder, processor, protocols, num_frames=4, frames_per_second=None, task="video"):
    return ViewDataset(
        open_labelled(folder),
        choose_preprocessing(processor),
        MediaLoader(),
        task=task,
        num_frames=num_frames,
        frames_per_second=frames_per_second,
        protocols=[ViewProtocol(*counts) for counts in protocols],
    )


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(("video_fps", "frames_per_second"), [(30, 7.5), (29.97, 10), (25, 10), (12.5, None)])
def test_views_are_those_that_the_processor_makes_of_the_file(suffix, video_fps, frames_per_second, tmp_path):
    """The processor decodes by itself, and is what the pipeline calls."""
    path = tmp_path / "class" / f"clip{suffix}"
    write_clip(path, fps=video_fps)
    processor = ViCMAEVideoProcessor(**SIZES)
    sample = views_of(tmp_path, processor, [(3, 3)], frames_per_second=frames_per_second)[0]
    expected = processor(
        str(path),
        do_sample_frames=True,
        num_frames=4,
        fps=frames_per_second,
        num_clips=3,
        num_crops=3,
        return_tensors="pt",
    ).pixel_values
    assert sample["pixel_values"].dtype == torch.uint8
    # Three crops of a clip come together in both, the longer side first.
    assert torch.equal(normalize_views(sample["pixel_values"], processor), expected[0])
    assert sample["index"] == 0
    torch.testing.assert_close(sample["weights"], torch.full((1, 9), 1 / 9))


@pytest.mark.parametrize("frames_per_second", [5, None])
def test_clips_of_a_variable_frame_rate_follow_its_times(tmp_path, frames_per_second):
    times = np.concatenate([np.arange(15) / 30, 0.5 + np.arange(15) / 15])
    (tmp_path / "class").mkdir()
    write_video(tmp_path / "class" / "clip.mkv", numbered_frames(30, 32, 32), timestamps=times)
    processor = ViCMAEVideoProcessor(size={"shortest_edge": 32}, do_center_crop=False, do_normalize=False)
    sample = views_of(tmp_path, processor, [(1, 1)], frames_per_second=frames_per_second)[0]
    numbers = read_numbers(sample["pixel_values"][0])
    if frames_per_second is None:
        # The middles of four quarters; the container has the last frame last 1/30 s.
        middles = (times[-1] + 1 / 30) * np.array([1, 3, 5, 7]) / 8
        assert numbers == [max(np.flatnonzero(times <= middle)) for middle in middles]
    else:
        # From the frame shown at half of what 1.433 s leave to a clip of 0.6 s, a frame every 0.2 s.
        start = times[max(np.flatnonzero(times <= (times[-1] - 0.6) / 2))]
        assert numbers == [np.abs(times - (start + step * 0.2)).argmin() for step in range(4)]
        assert numbers == [12, 17, 20, 23]


def test_protocols_share_the_views_that_are_the_same(tmp_path):
    write_clip(tmp_path / "class" / "clip.mp4")
    processor = ViCMAEVideoProcessor(**SIZES)
    both = views_of(tmp_path, processor, [(5, 1), (7, 3)], frames_per_second=7.5)[0]
    # Five and seven clips, spread evenly, have the first, middle and last in common, of which both see the centre.
    assert both["pixel_values"].shape == (5 + 21 - 3, 4, 3, 24, 24)
    assert (both["weights"] > 0).sum(1).tolist() == [5, 21]
    for row, protocol in enumerate([(5, 1), (7, 3)]):
        alone = views_of(tmp_path, processor, [protocol], frames_per_second=7.5)[0]["pixel_values"]
        used = both["pixel_values"][both["weights"][row] > 0]
        assert {view.numpy().tobytes() for view in used} == {view.numpy().tobytes() for view in alone}


def test_clips_of_a_short_video_that_coincide_are_seen_once_and_weigh_alike(tmp_path):
    write_clip(tmp_path / "class" / "clip.mp4", count=6)
    processor = ViCMAEVideoProcessor(**SIZES)
    dense = views_of(tmp_path, processor, [(5, 1)], frames_per_second=7.5)[0]
    assert dense["pixel_values"].shape[0] == 1
    assert dense["weights"].tolist() == [[1.0]]
    # Two frames of three, in four clips: 0 and 1, 0 and 2 twice, 1 and 2.
    write_clip(tmp_path / "class" / "clip.mp4", count=3)
    spread = views_of(tmp_path, processor, [(4, 1)], num_frames=2)[0]
    assert spread["weights"].tolist() == [[0.25, 0.5, 0.25]]


class Recorder:
    """An image processor that shows what it was given."""

    def __call__(self, images, return_tensors, input_data_format):
        assert (return_tensors, input_data_format) == ("pt", "channels_last")
        return {"pixel_values": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)[None].float()}


@pytest.mark.parametrize(("height", "width"), [(20, 50), (50, 20)])
def test_squares_along_the_longer_side_are_cut_before_another_processor(height, width):
    frames = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    preprocess = SquaresBeforeProcessor(Recorder())
    left, middle, right = preprocess(frames, 3)
    pixels = frames.float() if width > height else frames.transpose(2, 3).float()
    for crop, start in [(left, 0), (middle, 15), (right, 30)]:
        crop = crop if width > height else crop.transpose(2, 3)
        assert torch.equal(crop, pixels[..., start : start + 20])
    assert torch.equal(preprocess(frames, 1)[0], frames.float())
    # What a processor makes of the whole frame is not what it makes of a square.
    assert set(preprocess.positions(1)).isdisjoint(preprocess.positions(3))


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False}, {"image_mean": 0.4, "image_std": 0.3}],
)
def test_frames_are_normalised_on_the_device_as_the_processor_does_it(settings, tmp_path):
    write_clip(tmp_path / "a" / "clip.mp4", count=9)
    processor = ViCMAEImageProcessor(**SIZES, **settings)
    views = views_of(tmp_path, processor, [(3, 1)], task="image")
    with open_video(str(tmp_path / "a" / "clip.mp4")) as video:
        expected = processor(list(video.get_frames([1, 4, 7])), return_tensors="pt").pixel_values
    assert views[0]["pixel_values"].dtype == torch.uint8
    assert torch.equal(views.normalize(views[0]["pixel_values"]), expected)


def test_images_and_frames_for_a_classifier_of_images(tmp_path):
    write_clip(tmp_path / "a" / "clip.mp4", count=9, height=32, width=32)
    (tmp_path / "b").mkdir()
    picture = numbered_frames(201, 32, 32)[-1]
    Image.fromarray(picture).save(tmp_path / "b" / "picture.png")
    processor = ViCMAEImageProcessor(size={"shortest_edge": 32}, do_center_crop=False, do_normalize=False)
    views = views_of(tmp_path, processor, [(3, 1)], task="image")
    assert read_numbers(views[0]["pixel_values"]) == [1, 4, 7]
    assert read_numbers(views[1]["pixel_values"]) == [200]
    assert [views.labels[index] for index in range(2)] == [0, 1]


def test_an_image_for_a_classifier_of_videos_stands_still(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(numbered_frames(5, 32, 32)[-1]).save(tmp_path / "a" / "picture.png")
    processor = ViCMAEVideoProcessor(size={"shortest_edge": 32}, do_center_crop=False, do_normalize=False)
    sample = views_of(tmp_path, processor, [(2, 1)], frames_per_second=7.5)[0]
    assert sample["pixel_values"].shape == (1, 4, 3, 32, 32)
    assert read_numbers(sample["pixel_values"][0]) == [4] * 4


def test_what_cannot_be_read_says_so_and_is_not_replaced(tmp_path):
    write_clip(tmp_path / "a" / "clip.mp4")
    (tmp_path / "a" / "broken.mp4").write_bytes(b"no video")
    views = build_test_views(
        open_labelled(tmp_path),
        ViCMAEVideoProcessor(**SIZES),
        MediaLoader(),
        task="video",
        num_frames=4,
        frames_per_second=None,
    )
    assert set(views[0]) == {"index", "error", "is_transient"}
    assert not views[0]["is_transient"]
    assert str(tmp_path / "a" / "broken.mp4") in views[0]["error"]
    assert views[1]["pixel_values"].shape == (1, 4, 3, 24, 24)


def test_a_protocol_has_a_name_and_at_least_one_view():
    assert ViewProtocol(num_clips=7, num_crops=3).name == "3x7"
    with pytest.raises(InputError, match="at least one clip and one crop, got 1 and 0"):
        ViewProtocol(1, 0)
