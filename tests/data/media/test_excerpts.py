import numpy as np
import pytest
from PIL import Image
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data.media.excerpts import name_excerpt, view_video
from vicmae_hf.data.media.images import MediaReader
from vicmae_hf.data.media.reading import EncodedItem, MediaLoader, part_at_random
from vicmae_hf.data.samples.frame_sampling import FrameSampling
from vicmae_hf.errors import MediaDecodingError


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """50 frames, one every 0.1 s."""
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    write_video(path, numbered_frames(50), fps=10)
    return str(path)


def read(path, start, end, choose=lambda reader: range(reader.num_frames)):
    return MediaLoader().read_frames(EncodedItem(path, "video", True, start, end), choose)


@pytest.mark.parametrize(
    ("start", "end", "numbers"),
    [
        (1.0, 2.0, range(10, 20)),  # a frame begins at both ends
        (1.25, 1.45, [12, 13, 14]),  # the first and the last are on the screen for a part
        (0.0, 0.05, [0]),
        (4.8, None, [48, 49]),
        (None, 0.3, [0, 1, 2]),
        (4.75, 100.0, [47, 48, 49]),  # lists round up
    ],
)
def test_an_excerpt_has_the_frames_on_the_screen(video, start, end, numbers):
    assert read_numbers(read(video, start, end)) == list(numbers)
    with EncodedItem(video, "video", True, start, end).open("pyav") as reader:
        start, end = start or 0.0, 5.0 if end is None else min(end, 5.0)
        shown = [max(0.1 * number - start, 0.0) for number in numbers]
        np.testing.assert_allclose(reader.timestamps, shown, atol=1e-6)
        assert reader.timestamps[0] == 0
        assert reader.duration == pytest.approx(end - start)
        assert reader.num_frames == len(numbers)


def test_frames_in_any_order_but_none_beside_the_excerpt(video):
    assert read_numbers(read(video, 1.0, 2.0, lambda reader: [7, 0, 7, 9])) == [17, 10, 17, 19]
    for index in (-1, 10):
        with pytest.raises(ValueError, match="has frames 0 to 9"):
            read(video, 1.0, 2.0, lambda reader, index=index: [index])


def test_an_excerpt_behind_the_end_cannot_be_read(video, tmp_path):
    for start, end in [(5.0, 6.0), (7.5, None)]:
        with pytest.raises(MediaDecodingError, match=r"video: has no frames, the file ends at 5\.000 s"):
            read(video, start, end)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(MediaDecodingError, match=r"a\.png: has no frames"):
        EncodedItem(str(tmp_path / "a.png"), "a.png", False, 1.0, 2.0).open("pyav")


class BrokenVideo:
    """A video whose index cannot be read."""

    duration, is_long, is_closed = 300.0, True, False

    def read_part(self, start, end):
        raise MediaDecodingError("no index")

    @property
    def num_frames(self):
        raise MediaDecodingError("no index")

    def close(self):
        self.is_closed = True


@pytest.mark.parametrize(("start", "rate"), [(1.0, None), (None, 30.0)])
def test_a_video_that_cannot_be_shown_otherwise_is_closed(start, rate):
    reader = BrokenVideo()
    with pytest.raises(MediaDecodingError, match="no index"):
        view_video(reader, start, None, "video", rate)
    assert reader.is_closed


def test_names_of_excerpts():
    assert [name_excerpt(12.5, 17.0), name_excerpt(None, 2.0), name_excerpt(1.0, None)] == [
        "[12.5-17.0 s]",
        "[0.0-2.0 s]",
        "[1.0-end s]",
    ]


class Recording(MediaReader):
    """Ten frames a second of a long video, of which only the times are asked for."""

    def __init__(self, duration: float):
        self.duration = duration
        self.timestamps = np.arange(int(10 * duration)) / 10
        self.num_frames = len(self.timestamps)
        self.is_long = True

    def read_part(self, start: float, end: float) -> None:
        self.is_long = False


def test_pairs_are_as_frequent_at_the_ends_of_a_long_video_as_elsewhere():
    sampling, generator = FrameSampling(), np.random.default_rng(0)
    found = []
    for _ in range(5000):
        part = part_at_random(Recording(130.0), sampling.span, generator)
        first, _ = sampling.sample(part.timestamps, part.duration, generator)
        found.append(0.1 * (part.first + first))
    # A window of 2.13 s begins anywhere, and the first frame is from its first half.
    windows = np.random.default_rng(1).uniform(0, 130 - 64 / 30, 10**6)
    expected = windows + np.random.default_rng(2).uniform(0, 32 / 30, 10**6)
    for start, end in ((0, 5), (5, 10), (60, 65), (120, 125), (125, 130)):
        share, wanted = (np.mean((start <= np.array(times)) & (np.array(times) < end)) for times in (found, expected))
        assert share == pytest.approx(wanted, rel=0.3), (start, end)
