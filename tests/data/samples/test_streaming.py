import io
import re
from itertools import chain, islice, pairwise

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.media.bad_files import BadFilesError
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.samples.streaming import open_stream
from vicmae_hf.errors import InputError


# Of several workers on a machine of two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")

NUM_ROWS = 23
BAD_NUMBERS = {0, 1, 2, 5, 6, 11}


def numbered_picture(number):
    """Its number is in the blue channel; the others differ from place to place, so that crops do."""
    picture = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = np.array(Image.fromarray(picture).resize((48, 36), Image.Resampling.BICUBIC))
    picture[..., 2] = 10 + 10 * number
    return picture


def numbers_of(samples):
    views = torch.stack([sample["pixel_values"] for sample in samples])
    return ((views[:, :, 2].float().mean(dim=(1, 2, 3)) - 10) / 10).round().int().tolist()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eight shards of three rows, the last one of two."""
    folder = tmp_path_factory.mktemp("streaming")
    (folder / "input").mkdir()
    for number in range(NUM_ROWS):
        Image.fromarray(numbered_picture(number)).save(folder / "input" / f"{number}.png")
    settings = PackingSettings(format="webp", quality=100, videos_per_shard=3)
    pack_frames(PackingInput.open(folder / "input"), folder / "store", settings)
    return folder / "store"


@pytest.fixture(scope="module")
def parquet(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parquet")
    table = datasets.load_from_disk(store)
    for shard in range(6):
        table.shard(6, shard).to_parquet(folder / f"train-0000{shard}-of-00006.parquet", batch_size=2)
    return folder


def load(source, **options):
    return load_frame_pairs(source, 16, streaming=True, **options)


def equal(first, second):
    assert len(first) == len(second)
    return all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["store", "parquet"])
@pytest.mark.parametrize("num_workers", [1, 4, 6])
def test_workers_share_all_rows_without_overlap_in_every_round(kind, num_workers, request):
    stream = load(request.getfixturevalue(kind))
    assert stream.num_files == NUM_ROWS
    rounds = []
    for worker in range(num_workers):
        shards = range(worker, stream.stream.num_shards, num_workers)
        size = sum(map(stream.stream.count_rows, shards))
        read = numbers_of(islice(stream.samples(worker, num_workers, 0), 3 * size))
        rounds.append([read[:size], read[size : 2 * size], read[2 * size :]])
    for epoch in range(3):
        assert sorted(chain.from_iterable(rows[epoch] for rows in rounds)) == list(range(NUM_ROWS))
    if num_workers == 1:
        # Rows of a shard stay together, the shards change places.
        assert len({tuple(order) for order in rounds[0]}) == 3
        neighbours = [set(pairwise(order)) for order in rounds[0]]
        assert len(neighbours[0] & neighbours[1]) >= NUM_ROWS - stream.stream.num_shards


@pytest.mark.parametrize("kind", ["store", "parquet"])
def test_a_later_start_gives_what_an_uninterrupted_stream_gives(kind, request):
    stream = load(request.getfixturevalue(kind))
    whole = list(islice(stream.samples(1, 3, 0), 40))
    for start in [1, 2, 5, 7, 8, 16, 25]:
        assert equal(list(islice(stream.samples(1, 3, start), 40 - start)), whole[start:])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_a_loader_goes_on_after_any_batch(store, num_workers):
    stream = load(store)
    settings = {"batch_size": 2, "num_workers": num_workers, "pin_memory": False, "num_processes": 2}
    whole = list(islice(stream.dataloader(process_index=1, **settings), 14))
    for start in [1, 4, 9]:
        rest = stream.dataloader(process_index=1, start_batch=start, **settings)
        assert equal(list(islice(rest, 14 - start)), whole[start:])
    # Batches come from the workers in turn.
    workers = max(num_workers, 1)
    expected = islice(stream.samples(workers + 1 % workers, 2 * workers, 0), 2)
    assert torch.equal(whole[1 % workers]["pixel_values"][:2], torch.stack([row["pixel_values"] for row in expected]))


def test_workers_read_parquet_after_the_main_process_has(parquet):
    # Threads of pyarrow and of fsspec don't survive a fork.
    stream = load(parquet)
    next(iter(stream))
    loader = stream.dataloader(batch_size=4, num_workers=2, pin_memory=False, start_batch=3)
    assert equal(
        list(islice(loader, 4)),
        list(islice(stream.dataloader(4, num_workers=2, pin_memory=False), 3, 7)),
    )


def test_parquet_is_streamed_without_a_copy_and_counted_without_frames(parquet, tmp_path):
    stream = open_stream(parquet)
    assert list(stream.counted.features) == ["duration"]
    assert stream.count_all_rows() == NUM_ROWS
    assert [stream.count_rows(shard) for shard in range(6)] == [4, 4, 4, 4, 4, 3]
    list(islice(load(parquet).samples(0, 1, 0), 30))
    assert not list((tmp_path / "datasets_cache").glob("**/*.arrow"))


def test_the_seed_decides_shards_and_views(store):
    first, again, other = (list(islice(load(store, seed=seed), 20)) for seed in (0, 0, 1))
    assert equal(first, again)
    assert numbers_of(first) != numbers_of(other)
    views = torch.stack([sample["pixel_values"] for sample in first])
    assert not torch.equal(views[:, 0], views[:, 1])


def encode(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def damaged(tmp_path):
    """Twelve rows in four shards. `BAD_NUMBERS` cannot be decoded: a whole shard, and one row of each other."""
    rows = {
        "name": [f"{number}.png" for number in range(12)],
        "frames": [
            [{"bytes": encode(numbered_picture(number))[: 60 if number in BAD_NUMBERS else None], "path": None}]
            for number in range(12)
        ],
        "timestamps": [[0.0]] * 12,
        "duration": [0.0] * 12,
    }
    features = datasets.Features(
        {
            "name": datasets.Value("string"),
            "frames": datasets.List(datasets.Image(decode=False)),
            "timestamps": datasets.List(datasets.Value("float64")),
            "duration": datasets.Value("float64"),
        }
    )
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "damaged", num_shards=4)
    return tmp_path / "damaged"


def order_of(stream, count):
    """Numbers of the first rows, from their names."""
    rows = islice(stream.rows(0, range(stream.stream.num_shards), 0), count)
    return [int(re.search(r"(\d+)\.png", item.name)[1]) for _, _, item in rows]


def test_the_next_row_stands_in_for_a_bad_one(damaged):
    stream = load(damaged, max_bad_files=0.9)
    order = order_of(stream, 40)
    read = list(islice(stream, 30))
    expected = [next(number for number in order[place:] if number not in BAD_NUMBERS) for place in range(30)]
    assert numbers_of(read) == expected
    places = [re.search(r"damaged, shard (\d), row (\d) \((\d+)\.png\)$", name) for name in stream.bad_files.errors]
    assert {tuple(map(int, place.groups())) for place in places} == {(bad // 3, bad % 3, bad) for bad in BAD_NUMBERS}
    for start in range(1, 20):
        assert equal(list(islice(stream.samples(0, 1, start), 30 - start)), read[start:])


def test_rows_left_out_are_not_decoded(damaged):
    # Shard 2 comes last, whose first row is bad.
    seed = next(seed for seed in range(100) if order_of(load(damaged, seed=seed), 12)[-3:] == [6, 7, 8])
    stream = load(damaged, seed=seed)
    assert numbers_of(list(islice(stream.samples(0, 1, 10), 2))) == [7, 8]
    assert len(stream.bad_files) == 0


def test_too_many_bad_rows_stop_the_stream(damaged):
    with pytest.raises(BadFilesError, match=r"--max_bad_files 0\.2 allows 2"):
        list(islice(load(damaged, max_bad_files=0.2), 30))
    # The first of four workers has bad rows only, which the share allows.
    with pytest.raises(BadFilesError, match="the shards of worker 0 have no readable row"):
        next(load(damaged, max_bad_files=1.0).samples(0, 4, 0))


def test_too_few_shards_are_refused(store):
    stream = load(store)
    message = r"has 8 shards, too few for 3 processes with 3 workers each\..* at least 9 shards"
    with pytest.raises(InputError, match=message):
        stream.dataloader(2, num_workers=3, pin_memory=False, num_processes=3)
    stream.dataloader(2, num_workers=2, pin_memory=False, num_processes=4)


def test_what_cannot_be_streamed_is_refused(store, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    with pytest.raises(InputError, match="images: only frame stores are streamed"):
        load(tmp_path / "images")
    datasets.Dataset.from_dict({"duration": [1.0]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="only frame stores are streamed"):
        load(tmp_path / "other.parquet")
    features = open_stream(store).rows.features
    datasets.Dataset.from_dict({name: [] for name in features}, features=features).to_parquet(
        tmp_path / "none.parquet"
    )
    with pytest.raises(InputError, match=r"none\.parquet: has no rows"):
        load(tmp_path / "none.parquet")
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "missing")
    with pytest.raises(InputError, match="one data source"):
        load([store, store])
    with pytest.raises(InputError, match="needs --samples_per_file 1"):
        load(store, samples_per_file=2)
