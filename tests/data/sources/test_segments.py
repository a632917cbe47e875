"""Long recordings as many items."""

import json
import logging
import math
import threading

import datasets
import numpy as np
import pytest
from launching import run_here
from PIL import Image
from tiny_models import tiny_overrides
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.media import video as video_module
from vicmae_hf.data.media.reading import EncodedItem, MediaLoader
from vicmae_hf.data.samples.pairs import PairSettings
from vicmae_hf.data.samples.steps import StepDataset
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.segments import cut_into_steps
from vicmae_hf.data.sources.sources import SourceSettings, open_source
from vicmae_hf.errors import InputError, MediaDecodingError


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Of 7 s and 2.5 s at 10 frames a second, a file that is no video, an image."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / "day").mkdir()
    (folder / "night").mkdir()
    write_video(folder / "day" / "long.mp4", numbered_frames(70), 10, options={"g": "10"})
    write_video(folder / "night" / "short.mkv", numbered_frames(25), 10, options={"g": "10"})
    Image.new("RGB", (64, 64)).save(folder / "night" / "still.png")
    return folder


SETTINGS = SourceSettings(segment_seconds=2.0)


@pytest.mark.parametrize("long_seconds", [1.0, 100.0])
def test_segments_are_items_with_their_frames_names_and_labels(recordings, monkeypatch, caplog, long_seconds):
    monkeypatch.setattr(video_module, "LONG_SECONDS", long_seconds)
    with caplog.at_level(logging.INFO, logger="vicmae_hf"):
        source = open_labelled(recordings, settings=SETTINGS)
    assert "1 files are divided into 4 segments of about 2 s, 2 others stay whole." in caplog.text
    # 7 s are four segments of 1.75 s, 2.5 s are one.
    names = ["day/long.mp4 [0.0-1.75 s]", "day/long.mp4 [1.75-3.5 s]", "day/long.mp4 [3.5-5.25 s]"]
    names += ["day/long.mp4 [5.25-7.0 s]", "night/short.mkv", "night/still.png"]
    assert source.list_names() == names
    assert [source[index].name for index in range(6)] == [str(recordings / name) for name in names]
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1] and source.class_names == ["day", "night"]
    # The frame that is on the screen when a segment begins belongs to it.
    for index, expected in enumerate([range(18), range(17, 35), range(35, 53), range(52, 70), range(25)]):
        with source[index].open("pyav") as reader:
            assert read_numbers(reader.get_frames(range(reader.num_frames))) == list(expected)
            assert reader.timestamps[0] == 0 and reader.duration == pytest.approx(1.75 if index < 4 else 2.5)


def test_segments_of_parts_that_a_list_names(recordings, tmp_path):
    (tmp_path / "list.csv").write_text("path,start,end\nday/long.mp4,1,5\n")
    settings = SourceSettings(segment_seconds=2.0, data_root=str(recordings))
    source = open_source(tmp_path / "list.csv", settings)
    assert [(source[index].start, source[index].end) for index in range(2)] == [(1, 3), (3, 5)]
    names = ["day/long.mp4 [1.0-3.0 s]", "day/long.mp4 [3.0-5.0 s]"]
    assert source.list_names() == names and len(source) == 2
    assert [source[index].name for index in range(2)] == [str(recordings / name) for name in names]


def test_short_videos_are_said_to_stay_whole_and_images_are_not(recordings, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="vicmae_hf")
    (tmp_path / "still.png").symlink_to(recordings / "night" / "still.png")
    settings = SourceSettings(segment_seconds=2.0)
    assert len(open_source(tmp_path, settings)) == 1 and "long enough" not in caplog.text
    assert len(open_source(recordings / "night", settings)) == 2
    assert "night: no file is long enough for two segments of 2 s, so each stays whole." in caplog.text


def test_a_file_that_takes_too_long_stays_whole(recordings, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(EncodedItem, "open", lambda item, backend: ended.wait(30))
    source = open_source(recordings, PairSettings(segment_seconds=1.0, seconds_per_file=0.05))
    ended.set()
    assert source.list_names() == ["day/long.mp4", "night/short.mkv", "night/still.png"]


def test_pairs_of_an_epoch_come_from_all_segments(recordings):
    dataset = load_frame_pairs(recordings, 32, segment_seconds=1.0, frame_sampling="same")
    assert len(dataset) == 7 + 3 + 1  # 2.5 s: 2.5 rounds up


def test_scripts_take_segments(recordings, tmp_path):
    flags = ["--segment_seconds", 2]
    store = tmp_path / "store"
    packed = run_here("pack_frames.py", "--input", recordings, "--output", store, "--frames_per_second", 2, *flags)
    assert packed.returncode == 0, packed.stderr
    rows = {row["name"]: row for row in datasets.load_from_disk(str(store))}
    assert sorted(len(row["frames"]) for row in rows.values()) == [1, 4, 4, 4, 4, 5]
    timestamps = rows["day/long.mp4 [1.75-3.5 s]"]["timestamps"]
    np.testing.assert_allclose(timestamps, [0, 0.5, 1.0, 1.5], atol=0.051)
    refused = run_here("pack_frames.py", "--input", store, "--output", tmp_path / "again", *flags)
    assert "a frame store cannot be divided" in refused.stderr
    trained = run_here(
        "run_pretraining.py",
        *("--train_data", recordings, "--output_dir", tmp_path / "run", "--image_size", 32, *flags),
        *("--config_overrides", tiny_overrides(), "--max_train_steps", 2, "--per_device_train_batch_size", 3),
    )
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "arguments.json").read_text())["steps_per_epoch"] == 2
    exported = run_here(
        "export_features.py",
        *("--model_name_or_path", tmp_path / "run", "--data", recordings, "--output", tmp_path / "features.parquet"),
        *flags,
    )
    assert exported.returncode == 0, exported.stderr
    assert len(datasets.Dataset.from_parquet(str(tmp_path / "features.parquet"))) == 6


@pytest.fixture
def open_table(recordings, tmp_path):
    """Opens a table of long.mp4, which is of 7 s, with any `duration_seconds`."""
    features = datasets.Features({"video": datasets.Video(), "duration_seconds": datasets.Value("float64")})

    def open_table(seconds, settings=None):
        rows = {"video": [str(recordings / "day" / "long.mp4")], "duration_seconds": [seconds]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table.parquet")
        return open_source(tmp_path / "table.parquet", settings)

    return open_table


@pytest.mark.parametrize("seconds", [4.0, 6.98, 6.995, 7.0, 8.0])
@pytest.mark.parametrize("is_stepped", [True, False])
def test_a_file_that_is_longer_than_its_table_says(recordings, open_table, monkeypatch, caplog, seconds, is_stepped):
    monkeypatch.setattr(video_module, "said", set())
    if is_stepped:
        source = cut_into_steps(open_table(seconds), 1.0, steps_per_item=2, seconds_per_file=60)
    else:
        source = open_table(seconds, SourceSettings(segment_seconds=2.0))
    for index in (0, 1):
        with source[index].open("pyav") as reader:
            assert reader.num_frames >= 17  # ten a second
    if seconds > 6.99:
        assert caplog.messages == []
    else:
        file = recordings / "day" / "long.mp4"
        assert caplog.messages == [
            f"{file}: the file is 7.000 s long, but its table says {seconds:.3f} s (duration_seconds), so the rest "
            "is not read. Make the table anew, or leave that column out. Not said again for further files."
        ]


def test_steps_by_the_durations_of_a_table(open_table):
    for unknown in (None, math.nan, 0.0):  # it is of 7 s
        (steps,) = cut_into_steps(open_table(unknown), 1.0, steps_per_item=64, seconds_per_file=60).bounds
        assert steps.tolist() == pytest.approx(range(8))
    for wrong in (-1.0, math.inf):
        with pytest.raises(InputError, match=rf"table\.parquet\[0\]: expected seconds .* got {wrong}\."):
            open_table(wrong)
    source = cut_into_steps(
        open_table(9.0), 1.0, steps_per_item=4, seconds_per_file=60
    )  # a table of a file that was longer
    dataset = StepDataset(source, None, MediaLoader(), task="image", num_frames=1)
    with source[0].open("pyav") as reader:
        assert dataset.choose_step_frames(0, reader).tolist() == [[5], [15], [25], [35]]
    message = r"long\.mp4 \[4\.0-8\.0 s\]: the file ends at 7\.000 s, and its table says 8\.000 s \(duration_seconds\)"
    with source[1].open("pyav") as reader, pytest.raises(MediaDecodingError, match=message):
        dataset.choose_step_frames(1, reader)
    with pytest.raises(MediaDecodingError, match=r"has no frames, the file ends at 7\.000 s"):
        source[2].open("pyav")
