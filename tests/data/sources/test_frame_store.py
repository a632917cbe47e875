import gc
import io
import pickle
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import DataSourceError, open_source
from vicmae_hf.errors import MediaDecodingError


def random_picture(seed, size=(24, 40)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encode(picture, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format, **options)
    return buffer.getvalue()


def store_row(frames, name="clip.mp4", label=0):
    return {
        "name": name,
        "frames": [{"bytes": frame, "path": None} for frame in frames],
        "timestamps": [index / 5 for index in range(len(frames))],
        "duration": len(frames) / 5,
        "label": label,
    }


FEATURES = datasets.Features(
    {
        "name": datasets.Value("string"),
        "frames": datasets.List(datasets.Image(decode=False)),
        "timestamps": datasets.List(datasets.Value("float64")),
        "duration": datasets.Value("float64"),
        "label": datasets.ClassLabel(names=["zebra", "ant"]),
    }
)


def save_store(path, *rows, features=FEATURES):
    table = datasets.Dataset.from_list([{column: row.get(column) for column in features} for row in rows], features)
    table.save_to_disk(path, num_shards=min(len(rows), 3))
    return table


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Seven rows in three shards; row r has r + 1 frames, frame f is `random_picture(100 * r + f)`."""
    path = tmp_path_factory.mktemp("stores") / "store"
    rows = [[encode(random_picture(100 * row + frame)) for frame in range(row + 1)] for row in range(7)]
    save_store(path, *(store_row(frames, f"clip_{row}.mp4", row % 2) for row, frames in enumerate(rows)))
    return path


def pictures_of(frames):
    return list(frames.permute(0, 2, 3, 1).numpy())


def assert_holds_the_rows(source):
    assert len(source) == 7
    for row in [6, 0, 3]:
        with source[row].open("pyav") as reader:
            assert reader.num_frames == row + 1
            assert reader.timestamps == pytest.approx(np.arange(row + 1) / 5)
            assert reader.duration == pytest.approx((row + 1) / 5)
            indices = [row, 0, row, row // 2]
            frames = reader.get_frames(indices)
        assert frames.dtype == torch.uint8
        for picture, index in zip(pictures_of(frames), indices, strict=True):
            assert np.array_equal(picture, random_picture(100 * row + index))


def test_rows_of_frames_in_any_order_and_with_repetitions(store):
    assert_holds_the_rows(open_source(store))


def test_a_parquet_file_of_frames_reads_the_same(store, tmp_path):
    datasets.load_from_disk(store).to_parquet(tmp_path / "store.parquet", batch_size=2)
    source = open_source(tmp_path / "store.parquet")
    assert_holds_the_rows(source)
    assert source.class_names == ["zebra", "ant"]


@pytest.mark.parametrize("format, tolerance", [("JPEG", 2), ("WEBP", 0)])
def test_frames_are_what_pillow_decodes(tmp_path, format, tolerance):
    smooth = np.array(Image.fromarray(random_picture(1, (6, 9))).resize((90, 61), Image.Resampling.BICUBIC))
    data = encode(smooth, format, quality=90)
    save_store(tmp_path / "store", store_row([data, data]))
    decoded = pictures_of(open_source(tmp_path / "store")[0].open("pyav").get_frames([1]))[0].astype(int)
    expected = np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert decoded.shape == expected.shape
    assert np.abs(decoded - expected).max() <= tolerance


def test_channels_are_last_in_memory(store):
    # As from a video: views are cut fastest from that.
    frames = open_source(store)[5].open("pyav").get_frames([0, 4])
    assert frames.shape == (2, 3, 24, 40)
    assert frames.permute(0, 2, 3, 1).is_contiguous()


def test_an_index_outside_the_row_is_refused(store):
    source = open_source(store)
    for indices in [[], [-1], [0, 4]]:
        with pytest.raises(ValueError, match="has frames 0 to 3"):
            source[3].open("pyav").get_frames(indices)
    for index in [-1, 7]:
        with pytest.raises(IndexError, match="rows 0 to 6"):
            source[index]


def test_other_frames_of_a_row_are_not_decoded_and_damage_is_named(tmp_path):
    good = encode(random_picture(0), "JPEG")
    frames = [b"\xff\xd8\xff" + bytes(500), good, b"no image", good[: len(good) // 2], good, b""]
    row = store_row(frames)
    row["frames"][5] = None
    save_store(tmp_path / "store", row)
    with open_source(tmp_path / "store")[0].open("pyav") as reader:
        assert reader.get_frames([4, 1]).shape == (2, 3, 24, 40)
        for index in [0, 2, 3, 5]:
            with pytest.raises(MediaDecodingError, match=rf"store\[0\] \(clip.mp4\), frame {index}: "):
                reader.get_frames([1, index])


def mapped_kib(path):
    """How much of a memory-mapped file this process has touched."""
    smaps = Path("/proc/self/smaps").read_text()
    parts = re.findall(rf"^[0-9a-f]+-.*{re.escape(str(path))}\n(?:\w.*\n)*?Rss: +(\d+) kB", smaps, re.MULTILINE)
    return sum(map(int, parts))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_other_frames_of_a_row_are_not_even_read(tmp_path):
    # Noise does not compress: 64 frames of 0.7 MB.
    frames = [encode(random_picture(seed, (480, 500)), compress_level=0) for seed in range(64)]
    save_store(tmp_path / "store", store_row(frames))
    file = next((tmp_path / "store").glob("*.arrow"))
    size = file.stat().st_size // 1024
    source = open_source(tmp_path / "store")
    before = mapped_kib(file)
    # The kernel may map what it has in its cache around a touched page.
    source[0].open("pyav").get_frames([3, 40])
    touched = mapped_kib(file) - before
    assert 1000 < touched < size / 4
    source[0].open("pyav").get_frames(range(64))
    assert mapped_kib(file) > 0.9 * size


def test_a_source_travels_to_workers_without_its_frames(tmp_path):
    frames = [encode(random_picture(seed, (200, 200)), compress_level=0) for seed in range(8)]
    save_store(tmp_path / "store", *[store_row(frames)] * 5)
    source = open_source(tmp_path / "store")
    sent = pickle.dumps(source)
    assert len(sent) < 10_000 < (tmp_path / "store" / "data-00000-of-00003.arrow").stat().st_size
    expected = source[4].open("pyav").get_frames([7, 2])
    del source
    gc.collect()
    received = pickle.loads(sent)
    assert received.labels.tolist() == [0] * 5
    assert torch.equal(received[4].open("pyav").get_frames([7, 2]), expected)


def test_labels(store):
    source = open_source(store)
    assert source.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert source.class_names == ["zebra", "ant"]
    labelled = open_labelled(store, ["ant", "bee", "zebra"])
    assert labelled.labels.tolist() == [2, 0, 2, 0, 2, 0, 2]
    assert labelled.select([5, 2])[0].name == f"{store}[5] (clip_5.mp4)"


def test_frames_kept_as_files(tmp_path):
    files = []
    for index in range(2):
        files.append(tmp_path / f"{index}.png")
        files[-1].write_bytes(encode(random_picture(index)))
    row = store_row([b"", b""])
    row["frames"] = [{"bytes": None, "path": str(file)} for file in files]
    table = datasets.Dataset.from_list([row], FEATURES)
    table.to_parquet(tmp_path / "paths.parquet")
    frames = open_source(tmp_path / "paths.parquet")[0].open("pyav").get_frames([1, 0])
    assert np.array_equal(pictures_of(frames)[0], random_picture(1))


@pytest.mark.parametrize("missing", ["timestamps", "duration"])
def test_frames_without_times_are_refused(tmp_path, missing):
    features = datasets.Features({name: feature for name, feature in FEATURES.items() if name != missing})
    save_store(tmp_path / "store", store_row([encode(random_picture(0))]), features=features)
    with pytest.raises(DataSourceError, match=f"it lacks the column {missing}"):
        open_source(tmp_path / "store")


def test_bad_rows_are_bad_files(tmp_path):
    good = [encode(random_picture(frame), "JPEG") for frame in range(6)]
    bad = {
        "damaged": store_row([frame[:200] for frame in good], "damaged"),
        "no_frames": {**store_row([], "no_frames"), "duration": 1.0},
        "null": {**store_row(good, "null"), "frames": None},
        "uneven": {**store_row(good, "uneven"), "timestamps": [0.0, 0.1]},
        "sizes": store_row([encode(random_picture(frame, (24 + frame, 40))) for frame in range(6)], "sizes"),
    }
    save_store(tmp_path / "store", *bad.values(), *(store_row(good, f"good_{index}") for index in range(3)))
    dataset = load_frame_pairs(tmp_path / "store", image_size=16, max_bad_files=0.9)
    pairs = [dataset[(epoch, index, index)]["pixel_values"] for epoch in range(3) for index in range(8)]
    assert {tuple(pair.shape) for pair in pairs} == {(2, 3, 16, 16)}
    named = {re.search(r"\((\w+)\)", name)[1] for name in dataset.bad_files.errors}
    assert named == set(bad)


def test_pairs_are_drawn_by_the_times_of_the_rows(tmp_path):
    # One grey level per frame; frames are one second apart but for a long pause after the third.
    levels = range(10, 250, 24)
    frames = [encode(np.full((24, 40, 3), level, dtype=np.uint8)) for level in levels]
    times = [0.0, 1.0, 2.0, *(60.0 + index for index in range(7))]
    save_store(tmp_path / "store", {**store_row(frames), "timestamps": times, "duration": 67.0})
    dataset = load_frame_pairs(tmp_path / "store", image_size=16, frame_sampling="max_gap", gap_seconds=1.0)
    seen = set()
    for position in range(60):
        pair = dataset[(0, position, 0)]["pixel_values"].float().mean(dim=(1, 2, 3))
        seen.add(tuple(((pair - 10) / 24).round().int().tolist()))
    assert seen == {(index, index + 1) for index in range(9)} - {(2, 3)}
