import pytest
from saved_classifiers import NAMES
from video_files import numbered_frames, write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven videos of three classes, of different lengths and shapes."""
    root = tmp_path_factory.mktemp("videos")
    for index, count in enumerate([20, 12, 33, 8, 40, 16, 25]):
        folder = root / NAMES[index % 3]
        folder.mkdir(exist_ok=True)
        height, width = [(40, 56), (48, 40)][index % 2]
        write_video(folder / f"{index}.mp4", numbered_frames(count, height, width, seed=index), fps=15)
    return root
