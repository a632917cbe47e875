import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data.media.bad_files import BadFilesError
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.preparing import packing
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import DataSourceError, open_source
from vicmae_hf.errors import InputError


def pack(source, output, labelled=False, class_names=None, max_bad_files=0.05, seconds_per_file=600.0, **settings):
    return pack_frames(
        PackingInput.open(source, labelled, class_names),
        output,
        PackingSettings(**settings),
        max_bad_files=max_bad_files,
        seconds_per_file=seconds_per_file,
        command=["python", "pack_frames.py", "--input", str(source)],
    )


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rows_by_name(store):
    """Source name -> (numbers read from the frames, timestamps, duration, frames)."""
    source = open_source(store)
    rows = {}
    for index, name in enumerate(source.list_names()):
        with source[index].open("pyav") as reader:
            frames = reader.get_frames(range(reader.num_frames))
            rows[name] = (read_numbers(frames), reader.timestamps, reader.duration, frames)
    return rows


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Videos of known frames, and images."""
    root = tmp_path_factory.mktemp("media") / "input"
    (root / "deep" / "er").mkdir(parents=True)
    write_video(root / "thirty.mp4", numbered_frames(90, 48, 64, seed=1))
    write_video(root / "deep" / "ntsc.mkv", numbered_frames(61, 64, 48, seed=2), fps=30000 / 1001)
    times = [0, 0.1, 0.15, 0.7, 0.75, 0.8, 1.5]
    write_video(root / "deep" / "er" / "variable.mkv", numbered_frames(7, 48, 64, seed=3), timestamps=times)
    write_video(root / "slow.mp4", numbered_frames(5, 48, 64, seed=4), fps=2)
    write_video(root / "turned.mov", numbered_frames(20, 48, 64, seed=5), rotation=90)
    write_video(root / "one_frame.mp4", numbered_frames(1, 48, 64, seed=6))
    Image.fromarray(numbered_frames(6, 40, 64)[5]).save(root / "five.png")
    Image.fromarray(numbered_frames(10, 40, 64)[9]).save(root / "deep" / "nine.webp", lossless=True)
    return root


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_store_holds_the_right_frames_at_the_right_times(media, tmp_path, format):
    summary = pack(media, tmp_path / "store", format=format)
    rows = rows_by_name(tmp_path / "store")
    assert set(rows) == {
        *["thirty.mp4", "deep/ntsc.mkv", "deep/er/variable.mkv", "slow.mp4", "turned.mov", "one_frame.mp4"],
        *["five.png", "deep/nine.webp"],
    }
    numbers, timestamps, duration, _ = rows["thirty.mp4"]
    assert numbers == list(range(0, 90, 4))
    assert timestamps == pytest.approx(np.arange(23) * 4 / 30)
    assert duration == pytest.approx(3)
    numbers, timestamps, _, _ = rows["deep/ntsc.mkv"]
    assert numbers == list(range(0, 61, 4))
    assert timestamps == pytest.approx(np.arange(16) * 4 * 1001 / 30000, abs=1e-3)
    numbers, timestamps, _, _ = rows["deep/er/variable.mkv"]
    # Nearest to 0, 0.133, 0.267, 0.4, 0.533, 0.667, 0.8, ..., 1.067, 1.2, ...; each frame once.
    assert numbers == [0, 2, 3, 5, 6]
    assert timestamps == pytest.approx([0, 0.15, 0.7, 0.8, 1.5], abs=1e-6)
    numbers, timestamps, duration, _ = rows["slow.mp4"]
    assert numbers == list(range(5))
    assert timestamps == pytest.approx(np.arange(5) / 2)
    assert duration == pytest.approx(2.5)
    # Turned upright (the numbers then run from top to bottom), as the video's own reader gives them.
    with open_video(media / "turned.mov") as video:
        original = video.get_frames(range(0, 20, 4))
    turned = rows["turned.mov"][3]
    assert turned.shape == original.shape == (5, 3, 64, 48)
    assert (turned.float() - original.float()).abs().mean() < 4
    assert rows["five.png"][:3] == ([5], [0], 0)
    assert rows["deep/nine.webp"][:3] == ([9], [0], 0)
    assert rows["one_frame.mp4"][0] == [0]
    num_frames = sum(len(row[0]) for row in rows.values())
    assert (summary.num_rows, summary.num_frames, summary.num_failures) == (8, num_frames, 0)
    assert summary.num_bytes == sum(path.stat().st_size for path in (tmp_path / "store").glob("*.arrow"))
    assert not (tmp_path / "store" / "bad_files.jsonl").exists()
    frames = datasets.load_from_disk(tmp_path / "store")[0]["frames"]
    assert {Image.open(io.BytesIO(frame["bytes"])).format for frame in frames} == {format.upper()}


def test_the_source_rate_is_kept_and_an_image_has_none(media, tmp_path):
    pack(media, tmp_path / "store", num_frames=2)
    table = datasets.load_from_disk(tmp_path / "store")
    rates = dict(zip(table["name"], table["fps"], strict=True))
    assert rates["thirty.mp4"] == pytest.approx(30)
    assert rates["deep/ntsc.mkv"] == pytest.approx(29.97, rel=0.01)
    assert rates["slow.mp4"] == pytest.approx(2)
    assert rates["five.png"] is None


def test_frames_are_made_smaller_but_never_larger(media, tmp_path):
    pack(media, tmp_path / "small", short_side=20, quality=100)
    pack(media, tmp_path / "large", short_side=500, quality=100)
    for name, size in {"thirty.mp4": (20, 27), "turned.mov": (27, 20), "five.png": (20, 32)}.items():
        small, large = rows_by_name(tmp_path / "small")[name][3], rows_by_name(tmp_path / "large")[name][3]
        assert small.shape[-2:] == size
        assert large.shape[-2:] == {"five.png": (40, 64), "turned.mov": (64, 48)}.get(name, (48, 64))
        # Brightness as of Pillow's antialiased bicubic; colours are stored at half the resolution.
        for frame, original in zip(small[:5], large[:5], strict=True):
            picture = Image.fromarray(original.permute(1, 2, 0).contiguous().numpy()).convert("L")
            stored = np.array(Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).convert("L"), dtype=float)
            errors = {
                kind: np.abs(stored - np.array(picture.resize(size[::-1], kind), dtype=float)).mean()
                for kind in (Image.Resampling.BICUBIC, Image.Resampling.BOX, Image.Resampling.NEAREST)
            }
            assert errors[Image.Resampling.BICUBIC] < 1.5
            assert errors[Image.Resampling.BICUBIC] < min(list(errors.values())[1:])


def test_a_long_video_is_decoded_in_parts(media, tmp_path, monkeypatch):
    pack(media, tmp_path / "whole")
    monkeypatch.setattr(packing, "DECODED_BYTES", 3 * 48 * 64 * 3)
    pack(media, tmp_path / "parts")
    whole, parts = content(tmp_path / "whole"), content(tmp_path / "parts")
    assert len([name for name in whole if name.endswith(".arrow")]) == 8
    assert parts == whole


def test_items_lie_in_a_random_order_once_each(tmp_path):
    for index in range(60):
        (tmp_path / "input" / f"class_{index // 20}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(tmp_path / "input" / f"class_{index // 20}" / f"{index}.png")
    names = {}
    for seed in (0, 1):
        pack(tmp_path / "input", tmp_path / f"store_{seed}", seed=seed, videos_per_shard=7)
        names[seed] = open_source(tmp_path / f"store_{seed}").list_names()
        assert len(names[seed]) == len(set(names[seed])) == 60
        shards = sorted((tmp_path / f"store_{seed}").glob("*.arrow"))
        assert [len(datasets.Dataset.from_file(str(shard))) for shard in shards] == [7] * 8 + [4]
        for start in range(0, 60, 20):
            assert len({name.split("/")[0] for name in names[seed][start : start + 20]}) == 3
    assert set(names[0]) == set(names[1])
    assert names[0] != names[1]


def test_labels_survive(tmp_path):
    for class_name, level in {"dark": 20, "grey": 120, "light": 220}.items():
        (tmp_path / "input" / class_name).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (16, 16), level).save(tmp_path / "input" / class_name / f"{index}.png")
    pack(tmp_path / "input", tmp_path / "sorted", labelled=True)
    pack(tmp_path / "input", tmp_path / "listed", labelled=True, class_names=["light", "none", "grey", "dark"])
    for store, levels in {"sorted": [20, 120, 220], "listed": [220, None, 120, 20]}.items():
        source = open_labelled(tmp_path / store)
        assert len(source) == 9
        for index in range(9):
            level = source[index].open("pyav").get_frames([0]).float().mean()
            assert level == pytest.approx(levels[source.labels[index]], abs=2)
    assert open_labelled(tmp_path / "listed").class_names == ["light", "none", "grey", "dark"]
    # Without being told that the folders are classes, there are no labels.
    pack(tmp_path / "input", tmp_path / "plain")
    assert open_source(tmp_path / "plain").labels is None


def png(level):
    buffer = io.BytesIO()
    Image.new("L", (16, 16), level).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_dataset_brings_its_labels_along(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    images = [{"bytes": png(level), "path": None} for level in [10, 240, 20, 250]]
    labels = [0, 1, None, 1]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).save_to_disk(tmp_path / "table")
    pack(tmp_path / "table", tmp_path / "store")
    source = open_source(tmp_path / "store")
    assert source.class_names == ["dark", "light"]
    assert dict(zip(source.list_names(), source.labels.tolist(), strict=True)) == {
        "[0]": 0,
        "[1]": 1,
        "[2]": -1,
        "[3]": 1,
    }


def test_a_store_of_a_store(media, tmp_path):
    pack(media, tmp_path / "all", frames_per_second=0)
    pack(tmp_path / "all", tmp_path / "few", num_frames=3)
    assert rows_by_name(tmp_path / "few")["thirty.mp4"][0] == [0, 30, 60]


@pytest.fixture
def partly_bad(tmp_path):
    """Nine images, and three files that cannot be read: one of them never ends."""
    root = tmp_path / "input"
    root.mkdir()
    for index in range(9):
        Image.new("L", (16, 16), 20 * index).save(root / f"{index}.png")
    (root / "text.mp4").write_text("no video")
    (root / "cut.png").write_bytes((root / "1.png").read_bytes()[:40])
    os.mkfifo(root / "hanging.mp4")
    return root


def test_failures_are_recorded_and_too_many_stop_the_run(partly_bad, tmp_path):
    store = tmp_path / "store"
    with pytest.raises(BadFilesError, match=r"--max_bad_files 0\.1 allows 1"):
        pack(partly_bad, store, videos_per_shard=1, seconds_per_file=0.3, max_bad_files=0.1)
    with pytest.raises(
        DataSourceError, match=r"store is not finished, \d+ of 12 shards are written. Go on with: python"
    ):
        open_source(store)
    with pytest.raises(DataSourceError, match="not finished"):
        open_labelled(store)
    summary = pack(partly_bad, store, videos_per_shard=1, seconds_per_file=0.3, max_bad_files=0.25)
    assert (summary.num_rows, summary.num_failures) == (9, 3)
    assert set(rows_by_name(store)) == {f"{index}.png" for index in range(9)}
    failures = [json.loads(line) for line in (store / "bad_files.jsonl").read_text().splitlines()]
    reasons = {Path(failure["path"]).name: failure["error"] for failure in failures}
    assert set(reasons) == {"text.mp4", "cut.png", "hanging.mp4"}
    assert "not read within 0.3 s" in reasons["hanging.mp4"]
    assert all(str(partly_bad) in reason for reason in reasons.values())
    # Shards without a row are there, but nothing that reads the store sees them.
    assert len(list(store.glob("*.arrow"))) == 12
    assert datasets.load_from_disk(store).to_iterable_dataset(9).num_shards == 9


def test_no_readable_file_at_all(tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.mp4").write_text("no video")
    with pytest.raises(BadFilesError, match=r"1 of 1 files could not be read.*a\.mp4"):
        pack(tmp_path / "input", tmp_path / "store", max_bad_files=1)


def test_other_settings_or_items_are_refused(media, tmp_path):
    store = tmp_path / "store"
    pack(media, store, num_frames=2)
    before = content(store)
    assert pack(media, store, num_frames=2).num_rows == 8
    with pytest.raises(InputError, match="was begun with quality 90, now 80"):
        pack(media, store, num_frames=2, quality=80)
    with pytest.raises(InputError, match=r"frames_per_second None, now 7\.5; num_frames 2, now None"):
        pack(media, store)
    (tmp_path / "fewer").mkdir()
    for name in ["thirty.mp4", "slow.mp4"]:
        (tmp_path / "fewer" / name).symlink_to(media / name)
    with pytest.raises(InputError, match=r"begun with other files, names or labels: 8 items of .*, now 2 of .*fewer"):
        pack(tmp_path / "fewer", store, num_frames=2)
    with pytest.raises(InputError, match="is no frame store, but holds"):
        pack(media, tmp_path / "fewer")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: expected a folder that can be written to"):
        pack(media, tmp_path / "file")
    assert content(store) == before


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"frames_per_second": 5.0, "num_frames": 3}, "choose one"),
        ({"frames_per_second": -1.0}, "--frames_per_second must be at least 0"),
        ({"num_frames": 0}, "--num_frames must be at least 1"),
        ({"short_side": -1}, "--short_side"),
        ({"quality": 101}, "--quality must be between 1 and 100"),
        ({"videos_per_shard": 0}, "--videos_per_shard must be at least 1"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        PackingSettings(**settings)


def batch_lengths(store):
    lengths = []
    for path in sorted(Path(store).glob("*.arrow")):
        with pa.ipc.open_stream(path.read_bytes()) as reader:
            lengths.append([batch.num_rows for batch in reader])
    return lengths


def test_record_batches_are_limited_by_size(media, tmp_path, monkeypatch):
    pack(media, tmp_path / "store", videos_per_shard=8)
    assert batch_lengths(tmp_path / "store") == [[8]]
    monkeypatch.setattr(packing, "BATCH_ROWS", 3)
    pack(media, tmp_path / "rows", videos_per_shard=8)
    assert batch_lengths(tmp_path / "rows") == [[3, 3, 2]]
    monkeypatch.setattr(packing, "BATCH_BYTES", 1)
    pack(media, tmp_path / "bytes", videos_per_shard=8)
    assert batch_lengths(tmp_path / "bytes") == [[1] * 8]
    assert rows_by_name(tmp_path / "bytes").keys() == rows_by_name(tmp_path / "store").keys()


def test_a_row_too_large_for_arrow_is_a_failure(media, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MAX_ROW_BYTES", 20_000)
    pack(media, tmp_path / "store", frames_per_second=0, max_bad_files=0.5)
    failures = [json.loads(line) for line in (tmp_path / "store" / "bad_files.jsonl").read_text().splitlines()]
    assert "thirty.mp4: its 90 encoded frames exceed the 2 GiB of a row" in " ".join(
        entry["error"] for entry in failures
    )
    assert "thirty.mp4" not in rows_by_name(tmp_path / "store")


def test_datasets_opens_streams_and_converts_a_store(media, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    pack(media, tmp_path / "store")
    table = datasets.load_from_disk(tmp_path / "store")
    assert table.features["frames"] == datasets.List(datasets.Image(decode=False))
    assert table.cache_files
    assert not (tmp_path / "datasets_cache").exists()
    streamed = list(table.to_iterable_dataset(4))
    assert [row["name"] for row in streamed] == table["name"]
    assert streamed[3]["frames"] == table[3]["frames"]
    decoded = table.cast_column("frames", datasets.List(datasets.Image()))[0]["frames"][0]
    assert isinstance(decoded, Image.Image)
    # What `push_to_hub` uploads.
    table.to_parquet(tmp_path / "store.parquet")
    original, converted = rows_by_name(tmp_path / "store"), rows_by_name(tmp_path / "store.parquet")
    for name, (numbers, timestamps, duration, frames) in original.items():
        assert converted[name][0] == numbers
        assert converted[name][1].tolist() == timestamps.tolist()
        assert converted[name][2] == duration
        assert converted[name][3].equal(frames)


def test_other_content_under_the_same_names_is_another_input(tmp_path):
    pictures = {}
    for name, value in [("a", 10), ("b", 200)]:
        buffer = io.BytesIO()
        Image.new("RGB", (8 + value, 8), (value, 0, 0)).save(buffer, "PNG")
        rows = {"image": [{"path": None, "bytes": buffer.getvalue()}] * 4}
        features = datasets.Features({"image": datasets.Image()})
        pictures[name] = str(tmp_path / f"{name}.parquet")
        datasets.Dataset.from_dict(rows, features).to_parquet(pictures[name])
    pack(pictures["a"], tmp_path / "store")
    with pytest.raises(InputError, match="was begun with other files, names or labels"):
        pack(pictures["b"], tmp_path / "store")


def test_ranks_must_be_ranks(media, tmp_path):
    with pytest.raises(InputError, match="RANK must be between 0 and WORLD_SIZE - 1 = 1, got 2"):
        pack_frames(
            PackingInput.open(str(media)), tmp_path / "store", PackingSettings(), process_index=2, num_processes=2
        )


def test_a_shard_that_lost_its_record_is_named(media, tmp_path):
    pack(str(media), tmp_path / "store", num_frames=1)
    record = sorted((tmp_path / "store").glob("data-*.json"))[0]
    record.unlink()
    with pytest.raises(InputError, match=rf"{record.name}: cannot be read .*Delete it and {record.stem}\.arrow"):
        pack(str(media), tmp_path / "store", num_frames=1)


def test_a_store_beside_videos_is_not_overlooked(media, tmp_path):
    pack(str(media), tmp_path / "both" / "store", num_frames=1)
    write_video(tmp_path / "both" / "one.mp4", numbered_frames(2, 48, 64))
    with pytest.raises(DataSourceError, match=r"both media files .*one\.mp4.* and a dataset .*store.*; name them"):
        open_source(tmp_path / "both")
