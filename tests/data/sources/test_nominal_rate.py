"""Sampling by frames: videos whose frames follow each other at a nominal rate."""

import datasets
import numpy as np
import pytest
from launching import run_here
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data.media.bad_files import BadFiles
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.samples.clips import ClipDataset
from vicmae_hf.data.samples.frame_choice import ClipSampling
from vicmae_hf.data.samples.frame_sampling import FrameSampling
from vicmae_hf.data.samples.streaming import open_stream
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import DataSourceError, SourceSettings, open_source


BY_FRAMES = SourceSettings(nominal_frames_per_second=30)
NUM_FRAMES = 80


@pytest.fixture(scope="module")
def cameras(tmp_path_factory):
    """A frame every 5 s, and one at uneven times."""
    folder = tmp_path_factory.mktemp("cameras")
    times = {
        "slow": 5.0 * np.arange(NUM_FRAMES),
        "uneven": np.cumsum(np.random.default_rng(0).uniform(1, 9, NUM_FRAMES)),
    }
    for name, timestamps in times.items():
        (folder / name).mkdir()
        frames = numbered_frames(NUM_FRAMES)
        write_video(folder / name / "day.mp4", frames, 10, timestamps=timestamps - timestamps[0], options={"g": "10"})
    return folder


class Whole:
    """A view that leaves frames as they are."""

    def __call__(self, frames, seed):
        return frames


def test_clips_of_training_and_test_take_every_fourth_frame(cameras):
    source = open_labelled(cameras, settings=BY_FRAMES)
    dataset = ClipDataset(source, ClipSampling(16, 7.5), Whole(), BadFiles(None, 2, 0.0), MediaLoader(), seed=0)
    starts = set()
    for epoch in range(10):
        numbers = read_numbers(dataset[epoch, 0, 0]["pixel_values"])
        assert numbers == list(range(numbers[0], numbers[0] + 61, 4))
        starts.add(numbers[0])
    assert len(starts) > 3 and max(starts) <= NUM_FRAMES - 61


@pytest.mark.parametrize("index", [0, 1])
def test_pairs_are_so_many_frames_apart(cameras, index):
    sampling = FrameSampling(frame_sampling="fixed_gap", gap_seconds=0.5)
    generator = np.random.default_rng(0)
    item = open_source(cameras, BY_FRAMES)[index]
    for _ in range(5):
        frames = MediaLoader().read_frames(
            item, lambda reader: sampling.sample(reader.timestamps, reader.duration, generator)
        )
        first, second = read_numbers(frames)
        assert second - first == 15


def test_parts_and_segments_are_of_real_seconds(cameras, tmp_path):
    (tmp_path / "list.csv").write_text("path,start,end\nslow/day.mp4,50,100\n")
    settings = SourceSettings(nominal_frames_per_second=30, data_root=str(cameras))
    with open_source(tmp_path / "list.csv", settings)[0].open("pyav") as reader:
        assert read_numbers(reader.get_frames(range(reader.num_frames))) == list(range(10, 20))
        np.testing.assert_allclose(reader.timestamps, np.arange(10) / 30)
        assert reader.duration == pytest.approx(10 / 30)
    segments = open_source(cameras / "slow", SourceSettings(nominal_frames_per_second=30, segment_seconds=100))
    assert len(segments) == 4  # of 395 s
    with segments[1].open("pyav") as reader:
        assert read_numbers(reader.get_frames(range(reader.num_frames))) == list(range(19, 40))


def test_stores_keep_the_times_with_which_they_were_packed(cameras, tmp_path):
    store, flags = tmp_path / "store", ["--frames_per_second", 7.5, "--nominal_frames_per_second", 30]
    packed = run_here("pack_frames.py", "--input", cameras, "--output", store, "--labelled", *flags)
    assert packed.returncode == 0, packed.stderr
    for row in datasets.load_from_disk(str(store)):
        np.testing.assert_allclose(row["timestamps"], np.arange(0, NUM_FRAMES, 4) / 30)
        assert row["duration"] == pytest.approx(NUM_FRAMES / 30) and row["fps"] == pytest.approx(30)
    other = run_here("pack_frames.py", "--input", cameras, "--output", store, "--labelled", *flags[:2])
    assert other.returncode == 1 and "was begun with other files" in other.stderr
    for opened in (open_source, open_stream):
        with pytest.raises(DataSourceError, match="has its times from packing; pack it with --nominal_frames_per"):
            opened(store, BY_FRAMES)
