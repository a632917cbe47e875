"""Folders of numbered frames as videos."""

import logging

import numpy as np
import pytest
from PIL import Image

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.media import frame_folders
from vicmae_hf.data.media.images import ImageDecodingError, ImageOptions
from vicmae_hf.data.media.reading import EncodedItem, MediaLoader
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import SourceSettings, open_source
from vicmae_hf.errors import InputError


RATE = ImageOptions(frame_folders=True, frames_per_second=5)


def write_frames(folder, names, size=(24, 32)):
    """Frame k of its folder is of the gray 10 * k."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(np.full((*size, 3), 10 * number, np.uint8)).save(folder / name)
    return str(folder)


def grays(frames):
    return [round(float(frame.float().mean()) / 10) for frame in frames]


def open_folder(folder):
    return EncodedItem(folder, folder, is_video=True, image_options=RATE).open("pyav")


@pytest.mark.parametrize(
    "names",
    [
        [f"{number:06d}.jpg" for number in range(1, 13)],
        [f"img_{number}.png" for number in range(12)],  # 10 comes behind 9
        [f"frame {number}.JPEG" for number in range(95, 107)],
        [f"v1.2_cam3-{number}.bmp" for number in range(0, 36, 3)],
    ],
)
def test_frames_come_in_the_order_of_their_numbers(names, tmp_path):
    folder = write_frames(tmp_path / "video", names)
    (tmp_path / "video" / "notes.txt").write_text("no frame")
    (tmp_path / "video" / ".hidden.jpg").write_text("no frame")
    with open_folder(folder) as reader:
        assert reader.num_frames == 12
        np.testing.assert_allclose(reader.timestamps, np.arange(12) / 5)
        assert reader.duration == pytest.approx(12 / 5)
        assert grays(reader.get_frames([11, 0, 9, 10, 0])) == [11, 0, 9, 10, 0]
        with pytest.raises(ValueError, match="has frames 0 to 11, asked for"):
            reader.get_frames([12])


def test_only_wanted_frames_are_read(tmp_path, monkeypatch):
    folder = write_frames(tmp_path / "video", [f"{number}.jpg" for number in range(12)])
    read = []
    read_image = frame_folders.read_image
    monkeypatch.setattr(
        frame_folders, "read_image", lambda path, options: read.append(path) or read_image(path, options)
    )
    item = EncodedItem(folder, folder, is_video=True, image_options=RATE)
    assert grays(MediaLoader().read_frames(item, lambda reader: [3, 7, 3])) == [3, 7, 3]
    assert read == [f"{folder}/3.jpg", f"{folder}/7.jpg"]


def test_frames_that_cannot_be_read(tmp_path):
    folder = write_frames(tmp_path / "video", ["1.jpg", "2.jpg"])
    write_frames(tmp_path / "video", ["3.jpg"], size=(32, 24))
    (tmp_path / "video" / "4.jpg").write_text("no image")
    with open_folder(folder) as reader:
        with pytest.raises(ImageDecodingError, match=r"3\.jpg: 24x32 pixels, other frames of its folder have 32x24"):
            reader.get_frames([0, 2])
        with pytest.raises(ImageDecodingError, match=r"4\.jpg: "):
            reader.get_frames([0, 3])
        assert grays(reader.get_frames([0, 1])) == [0, 1]
    for path in (tmp_path / "video").iterdir():
        path.unlink()
    with pytest.raises(ImageDecodingError, match="has no frames"):
        open_folder(folder)


SETTINGS = {"frame_folders": True, "source_frames_per_second": 5}


def test_folders_are_the_items_of_a_source(tmp_path):
    for video in ("a/one", "a/two", "b.mp4"):  # a folder may be called like the file that it was
        write_frames(tmp_path / video, [f"{number}.jpg" for number in range(4)])
    (tmp_path / "a" / "whole.mp4").write_bytes(b"a video")
    source = open_source(tmp_path, SourceSettings(**SETTINGS))
    assert source.list_names() == ["a/whole.mp4", "a/one", "a/two", "b.mp4"]
    assert [source[index].is_video for index in range(4)] == [True] * 4
    assert source.list_sizes()[1] == sum(path.stat().st_size for path in (tmp_path / "a" / "one").iterdir())
    for index in (1, 2, 3):
        with source[index].open("pyav") as reader:
            assert grays(reader.get_frames(range(4))) == [0, 1, 2, 3]
    assert len(open_source(tmp_path)) == 13  # not asked for: each frame is an image


def test_labels_of_folders(tmp_path):
    for video in ("x/1", "x/2", "y/1"):
        write_frames(tmp_path / video, ["1.jpg", "2.jpg"])
    source = open_labelled(tmp_path, settings=SourceSettings(**SETTINGS))
    assert (source.list_names(), source.labels.tolist()) == (["x/1", "x/2", "y/1"], [0, 0, 1])
    with pytest.raises(InputError, match="has no labels"):
        open_labelled(tmp_path)


def test_a_list_of_folders(tmp_path):
    for video in ("first clip", "second"):
        write_frames(tmp_path / "frames" / video, ["1.jpg", "2.jpg"])
    (tmp_path / "list.csv").write_text("path,label,end\nsecond,b,\nfirst clip,a,0.1\n")
    settings = SourceSettings(**SETTINGS, data_root=str(tmp_path / "frames"))
    source = open_labelled(tmp_path / "list.csv", settings=settings)
    assert source.labels.tolist() == [1, 0]
    for index, num_frames in enumerate([2, 1]):
        with source[index].open("pyav") as reader:
            assert reader.num_frames == num_frames
            assert grays(reader.get_frames([num_frames - 1])) == [num_frames - 1]


def test_images_that_look_like_frames_are_told_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "vicmae_hf.data.media.frame_folders")
    for video in ("a", "b"):
        write_frames(tmp_path / "frames" / video, [f"img_{number:03d}.jpg" for number in range(1, 13)])
        write_frames(tmp_path / "images" / video, [f"img_{number:03d}.jpg" for number in range(1, 36, 3)])
    assert len(open_source(tmp_path / "images")) == 24
    assert caplog.messages == []
    for _ in range(2):
        assert len(open_source(tmp_path / "frames")) == 24
    [message] = caplog.messages
    assert f"If folders like {tmp_path}/frames/a hold the frames of a video, give --frame_folders." in message


def test_pairs_are_of_two_frames(tmp_path):
    for video in range(3):
        write_frames(tmp_path / str(video), [f"{number}.png" for number in range(12)])
    settings = {"crop_scale": [1.0, 1.0], "horizontal_flip": False, "frame_sampling": "fixed_gap", "gap_seconds": 0.8}
    dataset = load_frame_pairs(tmp_path, 32, frame_folders=True, frames_per_second=5, **settings)
    assert len(dataset) == 3
    for sample in dataset.examples(3):
        first, second = grays(sample["pixel_values"])
        assert second - first == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1.jpg", "cover.jpg"], r"cover\.jpg: has no number before its extension"),
        (["img_1.jpg", "flow_x_1.jpg"], r"frames of several names, flow_x_1\.jpg and img_1\.jpg"),
        (["01.jpg", "1.jpg"], r"two frames of one number, 01\.jpg and 1\.jpg"),
    ],
)
def test_folders_that_are_no_videos_are_refused(names, message, tmp_path):
    write_frames(tmp_path / "video", names)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path, SourceSettings(**SETTINGS))


def test_the_rate_has_to_be_given():
    with pytest.raises(InputError, match="--frame_folders: give the frame rate"):
        SourceSettings(frame_folders=True)
