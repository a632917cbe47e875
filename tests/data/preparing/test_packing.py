import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from packed_stores import pack, rows_by_name, store_content
from PIL import Image
from video_files import numbered_frames, write_video

from vicmae_hf.data.media.bad_files import BadFilesError
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import DataSourceError, SourceSettings, open_source
from vicmae_hf.errors import InputError


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
        pack(partly_bad, store, videos_per_shard=1, seconds_per_file=1.0, max_bad_files=0.1)
    with pytest.raises(
        DataSourceError, match=r"store is not finished, \d+ of 12 shards are written. Resume with: python"
    ):
        open_source(store)
    with pytest.raises(DataSourceError, match="not finished"):
        open_labelled(store)
    summary = pack(partly_bad, store, videos_per_shard=1, seconds_per_file=1.0, max_bad_files=0.25)
    assert (summary.num_rows, summary.num_failures) == (9, 3)
    assert set(rows_by_name(store)) == {f"{index}.png" for index in range(9)}
    failures = [json.loads(line) for line in (store / "bad_files.jsonl").read_text().splitlines()]
    reasons = {Path(failure["path"]).name: failure["error"] for failure in failures}
    assert set(reasons) == {"text.mp4", "cut.png", "hanging.mp4"}
    assert "not read within 1 s" in reasons["hanging.mp4"]
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
    before = store_content(store)
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
    with pytest.raises(InputError, match="is not a frame store, but holds"):
        pack(media, tmp_path / "fewer")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: expected a folder that can be written to"):
        pack(media, tmp_path / "file")
    assert store_content(store) == before


def test_datasets_opens_streams_and_converts_a_store(media, tmp_path):
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


def test_a_store_beside_videos_is_not_overlooked(media, tmp_path):
    pack(str(media), tmp_path / "both" / "store", num_frames=1)
    write_video(tmp_path / "both" / "one.mp4", numbered_frames(2, 48, 64))
    with pytest.raises(DataSourceError, match=r"both media files .*one\.mp4.* and a dataset .*store.*; name them"):
        open_source(tmp_path / "both")


def test_a_store_does_not_go_on_with_another_range_of_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(folder / "a.png")

    def pack(image_range):
        source = PackingInput.open(folder, settings=SourceSettings(image_range=image_range))
        pack_frames(source, tmp_path / "store", PackingSettings(format="webp", quality=100))

    pack("0,4095")
    frame = open_source(tmp_path / "store")[0].open("").get_frames([0])[0, 0].numpy()
    assert np.abs(frame - np.arange(64 * 64).reshape(64, 64) / 4095 * 255).max() < 6
    pack("0,4095")
    with pytest.raises(InputError, match="was begun with other files, names or labels"):
        pack("file")


def test_the_range_of_a_store_is_told_where_another_is_used(tmp_path, caplog):
    (tmp_path / "input").mkdir()
    Image.fromarray(np.full((16, 16), 4000, dtype=np.uint16)).save(tmp_path / "input" / "a.png")
    settings = SourceSettings(image_range="0,4095")
    pack_frames(PackingInput.open(tmp_path / "input", settings=settings), tmp_path / "store", PackingSettings())
    open_source(tmp_path / "store", settings)
    assert "was packed with" not in caplog.text
    open_source(tmp_path / "store")
    assert "was packed with --image_range 0,4095, but other images are read with type, here" in caplog.text
