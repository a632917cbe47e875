import json

import datasets
import numpy as np
import pytest
from packed_stores import pack, rows_by_name, store_content
from PIL import Image

from vicmae_hf.data.preparing import store_rows
from vicmae_hf.data.preparing.store_rows import PackingSettings
from vicmae_hf.errors import InputError


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
    monkeypatch.setattr(store_rows, "DECODED_BYTES", 3 * 48 * 64 * 3)
    pack(media, tmp_path / "parts")
    whole, parts = store_content(tmp_path / "whole"), store_content(tmp_path / "parts")
    assert len([name for name in whole if name.endswith(".arrow")]) == 8
    assert parts == whole


def test_a_row_too_large_for_arrow_is_a_failure(media, tmp_path, monkeypatch):
    monkeypatch.setattr(store_rows, "MAX_ROW_BYTES", 20_000)
    pack(media, tmp_path / "store", frames_per_second=0, max_bad_files=0.5)
    failures = [json.loads(line) for line in (tmp_path / "store" / "bad_files.jsonl").read_text().splitlines()]
    assert "thirty.mp4: its 90 encoded frames exceed the 2 GiB of a row" in " ".join(
        entry["error"] for entry in failures
    )
    assert "thirty.mp4" not in rows_by_name(tmp_path / "store")


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
