import pytest
from classifier_flags import make_files


@pytest.fixture
def folders(tmp_path):
    """Flags of a run on videos of three classes."""
    make_files(tmp_path / "train", *(f"{name}/{index}.mp4" for name in "abc" for index in range(4)))
    make_files(tmp_path / "eval", "c/0.mp4", "a/0.mp4")
    return ["--train_data", tmp_path / "train", "--eval_data", tmp_path / "eval", "--output_dir", tmp_path / "out"]
