"""Clips as training samples: which frames, which labels, what is reproduced, what happens to unreadable files."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data.loading.loader import EpochBatchSampler, build_dataloader
from vicmae_hf.data.media import video as video_module
from vicmae_hf.data.media.bad_files import BadFiles, BadFilesError
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.samples.clip_augmentation import RandomClip
from vicmae_hf.data.samples.clips import ClipDataset
from vicmae_hf.data.samples.frame_choice import ClipSampling
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError
from vicmae_hf.video_processing_vicmae import sample_frame_indices


def constant_rate(num_frames, rate):
    return np.arange(num_frames) / rate, num_frames / rate


def draws(sampling, timestamps, duration, count=200):
    return np.stack([sampling.sample(timestamps, duration, np.random.default_rng(seed)) for seed in range(count)])


def test_every_fourth_frame_at_thirty_per_second_from_anywhere():
    clips = draws(ClipSampling(16, 7.5), *constant_rate(100, 30), count=600)
    assert (np.diff(clips) == 4).all()
    # 61 frames are spanned, so that a clip starts at one of 40.
    counts = np.bincount(clips[:, 0], minlength=40)
    assert len(counts) == 40
    assert counts.min() > 3 and counts.max() < 35


@pytest.mark.parametrize(("rate", "step"), [(7.5, 1), (15, 2), (60, 8)])
def test_the_clip_is_as_long_at_other_rates(rate, step):
    clips = draws(ClipSampling(8, 7.5), *constant_rate(80, rate))
    assert (np.diff(clips) == step).all()


def test_rates_that_do_not_divide():
    timestamps, duration = constant_rate(100, 25)
    clips = draws(ClipSampling(16, 7.5), timestamps, duration)
    wanted = timestamps[clips[:, :1]] + np.arange(16) / 7.5
    # The frame nearest to each time is at most half a frame away.
    assert np.abs(timestamps[clips] - wanted).max() <= 0.5 / 25 + 1e-9


def test_times_count_where_the_rate_varies():
    # Two seconds at 30 frames/s, then two at 10.
    timestamps = np.concatenate([np.arange(60) / 30, 2 + np.arange(20) / 10])
    clips = draws(ClipSampling(8, 5), timestamps, 4.0)
    wanted = timestamps[clips[:, :1]] + np.arange(8) / 5
    distances = np.abs(timestamps[None, None] - wanted[..., None])
    np.testing.assert_allclose(np.abs(timestamps[clips] - wanted), distances.min(-1), atol=1e-6)


def test_a_clip_longer_than_the_video_repeats_its_last_frame():
    timestamps, duration = constant_rate(10, 30)
    clips = draws(ClipSampling(16, 7.5), timestamps, duration, count=5)
    assert (clips == [0, 4, 8] + [9] * 13).all()
    # As in evaluation.
    assert (clips == sample_frame_indices(10, num_frames=16, fps=7.5, video_fps=30)).all()


def test_a_stored_clip_that_fits_exactly_starts_at_its_first_frame():
    rounded = np.round(np.arange(16) / 7.5, 3)
    clips = draws(ClipSampling(16, 7.5), rounded, 16 / 7.5, count=10)
    assert (clips == np.arange(16)).all()


def test_one_random_frame_from_each_segment_of_the_whole_video():
    timestamps, duration = constant_rate(80, 12)
    clips = draws(ClipSampling(8, 0), timestamps, duration, count=400)
    assert (clips // 10 == np.arange(8)).all()
    for segment in range(8):
        counts = np.bincount(clips[:, segment] - 10 * segment, minlength=10)
        assert counts.min() > 15 and counts.max() < 75
    # Evaluation takes the middles of the same segments.
    assert (sample_frame_indices(80, num_frames=8)[0] // 10 == np.arange(8)).all()


def test_segments_are_of_time_and_short_videos_repeat_frames():
    # The first frame stands for a second, 10 more for another.
    timestamps = np.concatenate([[0.0], 1 + np.arange(10) / 10])
    clips = draws(ClipSampling(4, 0), timestamps, 2.0)
    assert (clips[:, :2] == 0).all()
    assert (clips[:, 2] >= 1).all() and (clips[:, 2] <= 5).all()
    assert (draws(ClipSampling(4, 0), np.array([0.0]), 0.04) == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [((0, 7.5), "num_frames must be at least 1"), ((4, -1), "frames_per_second must be at least 0")],
)
def test_sampling_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        ClipSampling(*settings)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three classes of four videos; file v of a class has 40 + 10 v frames at 30 frames/s."""
    root = tmp_path_factory.mktemp("videos")
    for label, class_name in enumerate(["jump", "run", "wash"]):
        (root / class_name).mkdir()
        for video in range(4):
            frames = numbered_frames(40 + 10 * video, seed=10 * label + video)
            write_video(root / class_name / f"{video}.mp4", frames)
    return root


CLIPS_OF_FOUR = ClipSampling(4, 7.5)


class WholeFrames:
    """The frames as they are, for reading their numbers."""

    def __call__(self, frames, seed):
        return frames


def build(root, view, *, bad_files=None, seed=0, sampling=CLIPS_OF_FOUR):
    source = open_labelled(root)
    bad_files = BadFiles(None, len(source), 0.5) if bad_files is None else bad_files
    return ClipDataset(source, sampling, view, bad_files, MediaLoader(), seed)


def test_samples_are_clips_with_their_labels(videos):
    dataset = build(videos, WholeFrames())
    starts = set()
    for epoch in range(3):
        for index in range(12):
            sample = dataset[epoch, index, index]
            assert sample["labels"] == index // 4
            numbers = read_numbers(sample["pixel_values"])
            assert np.diff(numbers).tolist() == [4, 4, 4]
            starts.add(numbers[0])
    assert len(starts) > 10


def test_samples_depend_on_seed_epoch_and_position_alone(videos):
    view = RandomClip((32, 32), rand_augment_magnitude=9.0, random_erasing=0.5)
    dataset = build(videos, view)
    sample = dataset[2, 5, 3]["pixel_values"]
    torch.rand(3), np.random.rand(3)
    assert torch.equal(build(videos, view)[2, 5, 3]["pixel_values"], sample)
    for other in [dataset[1, 5, 3], dataset[2, 6, 3], build(videos, view, seed=1)[2, 5, 3]]:
        assert not torch.equal(other["pixel_values"], sample)


def test_batches_are_the_same_for_any_number_of_workers(videos):
    dataset = build(videos, RandomClip((16, 16), rand_augment_magnitude=9.0))

    def batches(num_workers):
        sampler = EpochBatchSampler([12], 12, batch_size=5, num_epochs=2)
        return list(build_dataloader(dataset, sampler, num_workers, pin_memory=False))

    alone, together = batches(0), batches(2)
    assert [batch["pixel_values"].shape for batch in alone] == [(5, 4, 3, 16, 16)] * 4
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first["pixel_values"], second["pixel_values"])
        assert torch.equal(first["labels"], second["labels"])
    assert len({label for batch in alone for label in batch["labels"].tolist()}) == 3


def test_images_are_samples_of_one_frame(tmp_path):
    for class_name, value in [("dark", 20), ("light", 220)]:
        (tmp_path / class_name).mkdir()
        Image.fromarray(np.full((30, 40, 3), value, dtype=np.uint8)).save(tmp_path / class_name / "a.png")
    dataset = build(tmp_path, RandomClip((16, 24)), sampling=None)
    for index, value in enumerate([20, 220]):
        sample = dataset[0, index, index]
        assert sample["pixel_values"].shape == (3, 16, 24)
        assert (sample["pixel_values"] == value).all()
        assert sample["labels"] == index


def test_an_image_model_on_animations_says_once_that_it_sees_their_first_frames(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(video_module, "said", set())
    pictures = [Image.new("RGB", (16, 16), (value, value, value)) for value in (40, 120, 200)]
    for name in ("a/one.gif", "b/two.gif"):
        (tmp_path / name).parent.mkdir()
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100)
    pictures[1].save(tmp_path / "a" / "still.png")
    dataset = build(tmp_path, WholeFrames(), sampling=None)
    assert [int(dataset[0, index, index]["pixel_values"].max()) for index in range(3)] == [40, 120, 40]
    [message] = caplog.messages
    assert message.startswith(
        f"{tmp_path}/a/one.gif has 3 frames, and an image model is trained on the first. --task v"
    )


@pytest.fixture
def damaged(tmp_path):
    """Twelve images of three classes, file i of one grey, 20 i, except for the sixth."""
    for index in range(12):
        path = tmp_path / "images" / "abc"[index // 4] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 20 * index, dtype=np.uint8)).save(path)
    (tmp_path / "images" / "b" / "05.png").write_bytes(b"no image" * 100)
    return tmp_path / "images"


def test_an_unreadable_file_is_recorded_and_replaced_by_another_with_its_label(damaged, tmp_path):
    record = tmp_path / "bad_files.jsonl"
    dataset = build(damaged, WholeFrames(), bad_files=BadFiles(record, 12, 0.5), sampling=None)
    again = build(damaged, WholeFrames(), sampling=None)
    found = []
    for epoch in range(20):
        sample = dataset[epoch, 0, 5]
        index = sample["pixel_values"][0, 0, 0].item() // 20
        assert sample["labels"] == index // 4
        assert torch.equal(again[epoch, 0, 5]["pixel_values"], sample["pixel_values"])
        found.append(index)
    assert 5 not in found
    assert len(set(found)) > 5
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(damaged / "b" / "05.png")]


def test_too_many_unreadable_files(damaged):
    dataset = build(damaged, WholeFrames(), bad_files=BadFiles(None, 12, 0.0), sampling=None)
    with pytest.raises(BadFilesError, match=r"1 of 12 files.*b/05\.png"):
        dataset[0, 0, 5]


def test_no_readable_file_ends_the_run_whatever_is_allowed(tmp_path):
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"broken")
    # The record counts held-out files too, so that it would allow these.
    dataset = build(tmp_path, WholeFrames(), bad_files=BadFiles(None, 100, 1.0), sampling=None)
    with pytest.raises(BadFilesError, match="none of 3 files could be read"):
        dataset[0, 0, 0]


def test_files_that_have_all_timed_out_end_the_run_without_being_opened(damaged, tmp_path):
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 100, 1.0)
    for name in sorted(damaged.glob("*/*.png")):
        bad_files.add(str(name), "late", is_transient=True)
    dataset = build(damaged, WholeFrames(), bad_files=bad_files, sampling=None)
    with pytest.raises(BadFilesError, match=r"none of 12 files could be read, among them .*a/00\.png"):
        dataset[0, 0, 0]


def test_clips_of_a_slow_camera_repeat_frames_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(video_module, "said", set())
    caplog.set_level(logging.WARNING, logger="vicmae_hf.data.media.video")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_video(tmp_path / "a" / "quick.mp4", numbered_frames(40), 30)
    for name in ("b/slow.mp4", "b/slower.mp4"):
        write_video(tmp_path / name, numbered_frames(12), 1)
    source = open_labelled(tmp_path)
    dataset = ClipDataset(source, ClipSampling(16, 7.5), RandomClip(32), BadFiles(None, 3, 0.0), MediaLoader(), seed=0)
    dataset[0, 0, 0]
    assert not caplog.text
    dataset[0, 1, 1], dataset[0, 2, 2]
    assert caplog.text.count("has a frame every 1 s, so a clip of 7.5 frames per second shows each of them") == 1
