import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.media import bad_files
from vicmae_hf.data.media.images import ImageDecodingError
from vicmae_hf.data.media.reading import EncodedItem, MediaLoader, TimeLimitError, call_within
from vicmae_hf.data.media.video import VideoDecodingError
from vicmae_hf.errors import InputError


def test_frames_of_a_video_are_chosen_by_its_times(tmp_path):
    path = str(tmp_path / "a.mp4")
    write_video(path, numbered_frames(20), fps=10)
    seen = {}

    def choose_frames(reader):
        seen.update(times=reader.timestamps, duration=reader.duration, num_frames=reader.num_frames)
        return [7, 3, 7]

    frames = MediaLoader().read_frames(EncodedItem(path, "a", is_video=True), choose_frames)
    assert read_numbers(frames) == [7, 3, 7]
    np.testing.assert_allclose(seen["times"], np.arange(20) / 10)
    assert seen["num_frames"] == 20 and seen["duration"] == pytest.approx(2)


def test_an_image_is_a_video_of_one_frame(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.PNG")
    item = EncodedItem(str(tmp_path / "a.PNG"), "a", is_video=False)
    frames = MediaLoader().read_frames(item, lambda reader: [0] * (reader.num_frames + 2))
    assert frames.dtype == torch.uint8
    np.testing.assert_array_equal(frames.permute(0, 2, 3, 1), np.stack([picture] * 3))


def test_files_that_cannot_be_read(tmp_path):
    for name, is_video, error in [("a.mp4", True, VideoDecodingError), ("a.jpg", False, ImageDecodingError)]:
        (tmp_path / name).touch()
        with pytest.raises(error, match=name):
            MediaLoader().read_frames(EncodedItem(str(tmp_path / name), name, is_video), lambda reader: [0])


def test_a_file_that_hangs_is_given_up(tmp_path):
    # Opening a pipe that nobody writes to blocks for ever, as a stalled network drive does.
    os.mkfifo(tmp_path / "stalled.mp4")
    item = EncodedItem(str(tmp_path / "stalled.mp4"), "stalled.mp4", is_video=True)
    with pytest.raises(TimeLimitError, match=r"stalled\.mp4: not read within 0\.2 s"):
        MediaLoader(seconds_per_file=0.2).read_frames(item, lambda reader: [0])


def test_what_a_call_within_the_limit_returns_and_raises():
    assert call_within(60, lambda: torch.ones(2), "a").tolist() == [1, 1]
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 / 0, "a")
    never = threading.Event()
    with pytest.raises(TimeLimitError, match="a: not read"):
        call_within(0.1, never.wait, "a")


def test_files_are_read_in_one_thread_until_one_hangs():
    def read_thread() -> threading.Thread:
        return call_within(60, threading.current_thread, "a")

    first = read_thread()
    assert first is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 / 0, "a")
    assert read_thread() is first
    ended = threading.Event()
    with pytest.raises(TimeLimitError):
        call_within(0.1, ended.wait, "a")
    second = read_thread()
    assert second is not first
    assert read_thread() is second
    # The one that hung ends as soon as it can.
    ended.set()
    first.join(60)
    assert not first.is_alive()
    # Another thread that reads need not wait, and leaves nothing behind.
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(read_thread).result()
    assert third is not second
    third.join(60)
    assert not third.is_alive()


def test_a_process_that_was_forked_reads_in_a_thread_of_its_own():
    call_within(60, lambda: torch.ones(1), "a")
    worker = multiprocessing.get_context("fork").Process(target=call_within, args=(5, os.getpid, "a"))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0


def test_a_run_goes_on_without_a_file_that_hangs_and_waits_for_it_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_files, "UPDATE_SECONDS", 0)
    for index in range(3):
        write_video(tmp_path / f"{index}.mp4", numbered_frames(8), fps=8)
    os.mkfifo(tmp_path / "stalled.mp4")
    # Long enough for the others on a busy machine.
    settings = {"seconds_per_file": 2.0, "bad_files_path": tmp_path / "bad_files.jsonl"}
    pairs, other = load_frame_pairs(tmp_path, 32, **settings), load_frame_pairs(tmp_path, 32, **settings)
    replaced = pairs[3]["pixel_values"]
    assert list(pairs.bad_files.errors) == [str(tmp_path / "stalled.mp4")]
    started = time.perf_counter()
    torch.testing.assert_close(pairs[3]["pixel_values"], replaced)
    # Another process reads of it in the record.
    torch.testing.assert_close(other[3]["pixel_values"], replaced)
    assert time.perf_counter() - started < 1.9
    assert sum(file.stem != "bad_files" for file in tmp_path.iterdir()) == 4


def test_bad_settings():
    with pytest.raises(InputError, match="seconds_per_file must not be negative, got -1"):
        MediaLoader(seconds_per_file=-1)
    with pytest.raises(InputError, match="Unknown video backend 'ffmpeg'"):
        MediaLoader("ffmpeg")
