import numpy as np
import pytest
from PIL import Image
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data.media.excerpts import name_excerpt, view_video
from vicmae_hf.data.media.reading import EncodedItem, MediaLoader
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
