import numpy as np
import pytest
import torch
from PIL import Image
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data import VideoDecodingError
from vicmae_hf.data.images import ImageDecodingError
from vicmae_hf.data.labelled import list_labelled_files, read_frames
from vicmae_hf.errors import InputError


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(files, root):
    return [
        (path.removeprefix(f"{root}/"), label) for path, label in zip(files.paths, files.labels, strict=True)
    ], files.class_names


def test_classes_follow_sorted_names(tmp_path):
    make_files(tmp_path, "wash/b.mp4", "wash/a.JPG", "jump/c.webm", "Zoo/d.png")
    # No class folders, no media, or hidden (macOS leaves files like ._b.mp4).
    make_files(tmp_path, "readme.txt", "loose.mp4", "empty/notes.txt", ".cache/x.mp4", "wash/._b.mp4")
    assert listed(list_labelled_files(tmp_path), tmp_path) == (
        [("Zoo/d.png", 0), ("jump/c.webm", 1), ("wash/a.JPG", 2), ("wash/b.mp4", 2)],
        ["Zoo", "jump", "wash"],
    )


def test_classes_in_a_given_order(tmp_path):
    make_files(tmp_path, "wash/b.mp4", "jump/c.webm")
    files = list_labelled_files(tmp_path, class_names=["wash", "sing", "jump"])
    assert listed(files, tmp_path) == ([("jump/c.webm", 2), ("wash/b.mp4", 0)], ["wash", "sing", "jump"])


def test_class_that_training_did_not_have(tmp_path):
    make_files(tmp_path, "wash/b.mp4", "jump/c.webm", "dance/d.mp4")
    with pytest.raises(InputError, match="classes that the training data lacks: dance, jump"):
        list_labelled_files(tmp_path, class_names=["wash"])


def test_folders_without_labelled_files(tmp_path):
    with pytest.raises(InputError, match="gone: no such folder"):
        list_labelled_files(tmp_path / "gone")
    make_files(tmp_path, "loose.mp4", "empty/notes.txt")
    with pytest.raises(InputError, match="no videos or images found; expected FOLDER/CLASS_NAME/FILE"):
        list_labelled_files(tmp_path)


@pytest.mark.parametrize(
    ("num_frames", "middles"),
    [(1, [10]), (2, [5, 15]), (4, [2, 7, 12, 17]), (20, list(range(20))), (40, [i // 2 for i in range(40)])],
)
def test_frames_from_the_middle_of_equal_parts(tmp_path, num_frames, middles):
    path = str(tmp_path / "a.mp4")
    write_video(path, numbered_frames(20))
    frames = read_frames(path, num_frames)
    assert frames.shape == (num_frames, 3, 64, 96)
    assert frames.dtype == torch.uint8
    assert read_numbers(frames) == middles


def test_an_image_is_one_frame(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.PNG")
    frames = read_frames(str(tmp_path / "a.PNG"), 8)
    assert (frames.permute(0, 2, 3, 1).numpy() == picture[None]).all()


def test_files_that_cannot_be_read(tmp_path):
    make_files(tmp_path, "a.mp4", "a.jpg")
    with pytest.raises(VideoDecodingError, match=r"a\.mp4"):
        read_frames(str(tmp_path / "a.mp4"), 2)
    with pytest.raises(ImageDecodingError, match=r"a\.jpg"):
        read_frames(str(tmp_path / "a.jpg"), 2)
