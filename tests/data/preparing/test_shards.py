from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from packed_stores import pack, rows_by_name
from PIL import Image

from vicmae_hf.data.preparing import shards
from vicmae_hf.data.sources.sources import open_source
from vicmae_hf.errors import InputError


def test_items_lie_in_a_random_order_once_each(tmp_path):
    for index in range(60):
        (tmp_path / "input" / f"class_{index // 20}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(tmp_path / "input" / f"class_{index // 20}" / f"{index}.png")
    names = {}
    for seed in (0, 1):
        pack(tmp_path / "input", tmp_path / f"store_{seed}", seed=seed, videos_per_shard=7)
        names[seed] = open_source(tmp_path / f"store_{seed}").list_names()
        assert len(names[seed]) == len(set(names[seed])) == 60
        files = sorted((tmp_path / f"store_{seed}").glob("*.arrow"))
        assert [len(datasets.Dataset.from_file(str(shard))) for shard in files] == [7] * 8 + [4]
        for start in range(0, 60, 20):
            assert len({name.split("/")[0] for name in names[seed][start : start + 20]}) == 3
    assert set(names[0]) == set(names[1])
    assert names[0] != names[1]


def batch_lengths(store):
    lengths = []
    for path in sorted(Path(store).glob("*.arrow")):
        with pa.ipc.open_stream(path.read_bytes()) as reader:
            lengths.append([batch.num_rows for batch in reader])
    return lengths


def test_record_batches_are_limited_by_size(media, tmp_path, monkeypatch):
    pack(media, tmp_path / "store", videos_per_shard=8)
    assert batch_lengths(tmp_path / "store") == [[8]]
    monkeypatch.setattr(shards, "BATCH_ROWS", 3)
    pack(media, tmp_path / "rows", videos_per_shard=8)
    assert batch_lengths(tmp_path / "rows") == [[3, 3, 2]]
    monkeypatch.setattr(shards, "BATCH_BYTES", 1)
    pack(media, tmp_path / "bytes", videos_per_shard=8)
    assert batch_lengths(tmp_path / "bytes") == [[1] * 8]
    assert rows_by_name(tmp_path / "bytes").keys() == rows_by_name(tmp_path / "store").keys()


def test_a_shard_that_lost_its_record_is_named(media, tmp_path):
    pack(str(media), tmp_path / "store", num_frames=1)
    record = sorted((tmp_path / "store").glob("data-*.json"))[0]
    record.unlink()
    with pytest.raises(InputError, match=rf"{record.name}: cannot be read .*Delete it and {record.stem}\.arrow"):
        pack(str(media), tmp_path / "store", num_frames=1)
