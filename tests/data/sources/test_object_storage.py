"""Frame stores and Parquet on an S3 server of this machine, and on a local stand-in of the Hub."""

import os
import sys
import urllib.request
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from launching import run_here
from local_hub import hub_of_this_process, run_local_hub
from PIL import Image
from s3_server import run_s3_server
from safetensors.torch import load_file

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.samples.streaming import open_stream
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import DataSourceError, open_source


NUM_ROWS = 23
URLS = ("s3://bucket/store", "s3://bucket/parquet [all]", "s3://bucket/parquet [all]/part 0.parquet")
TRAINING = """
config_overrides:
  hidden_size: 16
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 32
  decoder_hidden_size: 16
  decoder_num_hidden_layers: 1
  decoder_num_attention_heads: 2
  decoder_intermediate_size: 32
train_data: ["s3://bucket/store"]
image_size: [32]
per_device_train_batch_size: 3
max_train_steps: 7
checkpointing_steps: 3
dataloader_num_workers: 2
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eight shards of three rows, the last one of two."""
    folder = tmp_path_factory.mktemp("object_storage")
    for number in range(NUM_ROWS):
        picture = np.random.default_rng(number).integers(0, 256, (36, 48, 3), dtype=np.uint8)
        path = folder / "input" / ("odd" if number % 2 else "even") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    pack_frames(
        PackingInput.open(folder / "input", labelled=True), folder / "store", PackingSettings(videos_per_shard=3)
    )
    return folder / "store"


@pytest.fixture(scope="module")
def bucket(store, tmp_path_factory):
    with run_s3_server() as file_system:
        folder = tmp_path_factory.mktemp("parquet")
        table = datasets.load_from_disk(store)
        for shard in range(4):
            table.shard(4, shard).to_parquet(folder / f"part {shard}.parquet", batch_size=2)
        table.save_to_disk(folder.parent / "saved", num_shards=4)
        file_system.put(f"{store}/", "bucket/store/", recursive=True)
        file_system.put(f"{folder}/", "bucket/parquet [all]/", recursive=True)
        file_system.put(f"{folder.parent / 'saved'}/", "bucket/saved/", recursive=True)
        yield file_system


def read_rows(source):
    """Name -> (encoded frames, label)."""
    labels = [source.class_names[label] for label in source.labels]
    return {
        name: (source[index].frames.as_py(), label)
        for index, (name, label) in enumerate(zip(source.list_names(), labels, strict=True))
    }


def stream_rows(stream):
    return [[row.frames.as_py() for row in stream.read(shard, 0)] for shard in range(stream.num_shards)]


def pairs(url, start, count, num_workers=0):
    """`count` batches of two pairs, from batch `start` on."""
    loader = load_frame_pairs(url, 16, streaming=True).dataloader(2, num_workers, pin_memory=False, start_batch=start)
    return torch.cat([batch["pixel_values"] for batch in islice(loader, count)])


def test_tables_are_opened_with_their_labels(bucket, store):
    expected = read_rows(open_source(store))
    assert len(expected) == NUM_ROWS
    for url in (*URLS[:2], "s3://bucket/saved"):
        assert read_rows(open_source(url)) == expected
    part = read_rows(open_source(URLS[2]))
    assert len(part) == 6 and part.items() <= expected.items()
    assert open_labelled(URLS[0]).class_names == ["even", "odd"]


def test_a_stream_has_the_rows_of_the_local_store_in_its_shards(bucket, store):
    local, remote = open_stream(store), open_stream(URLS[0])
    assert stream_rows(remote) == stream_rows(local)
    assert [remote.count_rows(shard) for shard in range(8)] == [3] * 7 + [2]
    # In workers, too: threads of fsspec do not survive a fork.
    assert torch.equal(pairs(URLS[0], 3, 11, num_workers=2), pairs(store, 3, 11, num_workers=2))


def test_rows_are_counted_from_records_and_columns_and_not_from_frames(bucket, monkeypatch):
    stream = open_stream(URLS[0])
    monkeypatch.setattr(type(stream), "_tables", None)
    assert stream.count_all_rows() == NUM_ROWS
    monkeypatch.undo()
    assert list(open_stream(URLS[1]).counted.features) == ["duration"]
    for url in (URLS[1], "s3://bucket/saved"):
        assert [open_stream(url).count_rows(shard) for shard in range(4)] == [6, 6, 6, 5]


@pytest.mark.parametrize("url", URLS[:2])
def test_a_later_start_gives_what_an_uninterrupted_stream_gives(bucket, url):
    whole = pairs(url, 0, 14)
    for start in (1, 7, 12):
        assert torch.equal(pairs(url, start, 14 - start), whole[2 * start :])


def test_pretraining_goes_on_in_the_stream_where_a_checkpoint_is(bucket, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(TRAINING)
    training = ["run_pretraining.py", settings, "--streaming", "--output_dir"]
    process = run_here(*training, tmp_path / "whole")
    assert process.returncode == 0, process.stderr
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = run_here(*training, tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    assert resumed.returncode == 0 and "Resuming from step 3" in resumed.stderr, resumed.stderr
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    # An address in a bucket is no dataset on the Hub.
    assert ModelCard.load(tmp_path / "whole" / "README.md").data.datasets is None


def test_nothing_is_copied_by_streaming(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    for url in URLS[:2]:
        pairs(url, 0, 4)
    assert not list(tmp_path.rglob("*.arrow")) and not (tmp_path / "downloads").exists()


def test_what_is_no_table_is_refused_in_a_line(bucket, store):
    bucket.pipe("bucket/videos/a.mp4", b"video")
    bucket.pipe("bucket/unfinished/store.json", b"{}")
    bucket.pipe("bucket/splits/dataset_dict.json", b"{}")
    bucket.pipe("bucket/part/state.json", (store / "state.json").read_bytes())
    bucket.pipe("bucket/damaged/data.parquet", b"no Parquet")
    for url, message in {
        "s3://elsewhere/store": r"The specified bucket does not exist.*Check the URL.*AWS_ENDPOINT_URL",
        "s3://bucket/nothing": "no frame store and no Parquet files found among 0 files",
        "s3://bucket/videos": "among 1 files.*pack_frames.py",
        "s3://bucket/unfinished": "not finished",
        "s3://bucket/splits": "name the folder of one",
        "s3://bucket/part": r"8 of 8 shards are missing, the first: /data-00000-of-00008.arrow",
        "s3://bucket/damaged": "cannot be read",
        "sss://bucket/x": r"cannot be read \(Protocol not known: sss\). Check the URL.$",
    }.items():
        for opened in (open_source, open_stream):
            with pytest.raises(DataSourceError, match=message) as caught:
                opened(url)
            assert str(caught.value).startswith(f"{url}: ") and "\n" not in str(caught.value)


def test_missing_and_wrong_credentials_are_told_with_the_variables(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    type(bucket).clear_instance_cache()
    with pytest.raises(DataSourceError, match=r"^s3://bucket/store: .*locate credentials.*AWS_ACCESS_KEY_ID"):
        open_source(URLS[0])
    monkeypatch.undo()
    type(bucket).clear_instance_cache()
    server = os.environ["AWS_ENDPOINT_URL"]
    check_credentials_after(server, b"0")
    try:
        with pytest.raises(DataSourceError, match=r"^s3://bucket/store: .*Access Key Id.*AWS_ACCESS_KEY_ID"):
            open_source(URLS[0])
    finally:
        check_credentials_after(server, b"inf")


def check_credentials_after(server, num_requests):
    """Makes the server answer so many requests of anybody, and then only those of users that it knows."""
    headers = {"Content-Type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset-auth", num_requests, headers))


def test_what_the_hub_s_offline_mode_forbids_is_told(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataSourceError, match=r"^s3://bucket/store: cannot be copied.*HF_HUB_OFFLINE.*--streaming"):
        open_source(URLS[0])
    assert len(stream_rows(open_stream(URLS[0]))) == 8


def test_a_missing_library_is_named_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataSourceError, match=r'gs://bucket/x: gs:// needs pip install "vicmae-hf\[gcs\]"'):
        open_source("gs://bucket/x")


def test_an_object_that_vanishes_ends_the_stream_with_its_url(bucket):
    bucket.copy("bucket/store", "bucket/vanishing", recursive=True)
    stream = open_stream("s3://bucket/vanishing")
    bucket.rm("bucket/vanishing/data-00003-of-00008.arrow")
    with pytest.raises(DataSourceError, match=r"^s3://bucket/vanishing: shard 3 could not be read"):
        stream_rows(stream)


def test_parquet_on_the_hub_is_read_by_its_url(store):
    with run_local_hub() as hub, hub_of_this_process(hub.url):
        datasets.load_from_disk(store).push_to_hub("someone/store", num_shards=4)
        url = "hf://datasets/someone/store/data"
        assert read_rows(open_source(url)) == read_rows(open_source(store))
        stream = open_stream(url)
        assert [len(rows) for rows in stream_rows(stream)] == [6, 6, 6, 5]
        assert [stream.count_rows(shard) for shard in range(4)] == [6, 6, 6, 5]
