import gc
import io
import json
import logging
import multiprocessing
import pickle
import random
from itertools import pairwise

import av
import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from video_files import numbered_frames, write_video

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.loading.loader import EpochBatchSampler, build_dataloader
from vicmae_hf.data.media.bad_files import BadFiles, BadFilesError
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.samples.frame_sampling import FrameSampling
from vicmae_hf.data.samples.pairs import FramePairDataset
from vicmae_hf.data.sources.sources import DataSourceError, open_source
from vicmae_hf.errors import InputError


# Of three workers on a machine of two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")

# Frame i of the gray videos has the level 30 + 5 * i; encoding changes it by 2 at most.
NUM_FRAMES, FRAMES_PER_SECOND = 40, 10


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="vicmae_hf.data")


def write_gray_video(path, height=48, width=64, **options):
    levels = 30 + 5 * np.arange(NUM_FRAMES, dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (NUM_FRAMES, height, width, 3))
    write_video(path, np.ascontiguousarray(frames), fps=FRAMES_PER_SECOND, **options)


def frame_indices(pair):
    """Which frames of a gray video the views of a pair show."""
    levels = pair["pixel_values"].float().mean(dim=(1, 2, 3))
    assert pair["pixel_values"].float().std(dim=(1, 2, 3)).max() < 2
    return ((levels - 30) / 5).round().int().tolist()


def write_texture(path, size=(48, 64), mode="RGB", seed=0, **options):
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode=mode).save(path, **options)


def write_partly_damaged_video(path, num_good_frames):
    """A video whose index is whole, but of whose frames only the first ones can be decoded."""
    write_gray_video(path, options={"g": "1"})
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[num_good_frames:]:
        content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(content)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Videos and images, nested, of many kinds: all readable."""
    root = tmp_path_factory.mktemp("mixed")
    (root / "videos" / "deep" / "er").mkdir(parents=True)
    (root / "images").mkdir()
    write_video(root / "videos" / "landscape.mp4", numbered_frames(20, 48, 64, seed=1))
    write_video(root / "videos" / "deep" / "portrait.mkv", numbered_frames(20, 70, 46, seed=2))
    write_video(root / "videos" / "deep" / "er" / "turned.mov", numbered_frames(20, 48, 64, seed=3), rotation=90)
    write_video(root / "videos" / "one_frame.mp4", numbered_frames(1, 48, 64, seed=4))
    write_texture(root / "images" / "rgb.jpg", (33, 71), seed=5)
    write_texture(root / "images" / "gray.png", (64, 51), mode="L", seed=6)
    write_texture(root / "images" / "alpha.png", mode="RGBA", seed=7)
    write_texture(root / "images" / "cmyk.jpg", mode="CMYK", seed=8)
    Image.open(root / "images" / "rgb.jpg").quantize(16).save(root / "images" / "palette.png")
    return root


@pytest.fixture(scope="module")
def partly_bad(tmp_path_factory):
    """Seven readable files, and five that are not, or not wholly."""
    root = tmp_path_factory.mktemp("partly_bad")
    for index in range(4):
        write_texture(root / f"image_{index}.jpg", seed=index)
    for index in range(3):
        write_video(root / f"video_{index}.mp4", numbered_frames(20, 48, 64, seed=index))
    content = (root / "video_0.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(content[: len(content) // 2])
    write_partly_damaged_video(root / "partly_damaged.mp4", num_good_frames=1)
    (root / "text.mp4").write_text("not a video")
    (root / "cut.jpg").write_bytes((root / "image_0.jpg").read_bytes()[:2000])
    (root / "empty.png").touch()
    return root


BAD_NAMES = {"cut.mp4", "partly_damaged.mp4", "text.mp4", "cut.jpg", "empty.png"}


def read_record(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_pairs(dataset, num_workers, num_epochs=2, seed=0):
    lengths = [len(source) for source in dataset.sources]
    sampler = EpochBatchSampler(lengths, len(dataset), 2, num_epochs, seed=seed)
    batches = build_dataloader(dataset, sampler, num_workers, pin_memory=False)
    return torch.cat([batch["pixel_values"] for batch in batches])


def test_every_kind_of_file_gives_a_pair(mixed):
    dataset = load_frame_pairs(str(mixed), image_size=(32, 48))
    assert len(dataset) == 9
    for index in range(9):
        pair = dataset[index]
        assert list(pair) == ["pixel_values"]
        assert pair["pixel_values"].shape == (2, 3, 32, 48)
        assert pair["pixel_values"].dtype == torch.uint8
        assert not torch.equal(*pair["pixel_values"])
    with pytest.raises(IndexError):
        dataset[9]
    assert torch.equal(dataset[-1]["pixel_values"], dataset[8]["pixel_values"])
    assert torch.equal(dataset[np.int64(3)]["pixel_values"], dataset[3]["pixel_values"])


def test_several_sources_are_one_dataset(mixed):
    dataset = load_frame_pairs([mixed / "images", str(mixed / "videos")], image_size=16)
    assert [len(source) for source in dataset.sources] == [5, 4]
    names = [dataset.item(index).name.removeprefix(f"{mixed}/") for index in range(9)]
    assert [name.split("/")[0] for name in names] == ["images"] * 5 + ["videos"] * 4
    assert len({*names}) == 9
    assert dataset[8]["pixel_values"].shape == (2, 3, 16, 16)


def differences(pairs):
    return {second - first for first, second in pairs}


def test_views_show_the_frames_that_the_strategy_asks_for(tmp_path):
    write_gray_video(tmp_path / "a.mp4")

    def pairs(**options):
        dataset = load_frame_pairs(tmp_path, image_size=16, samples_per_file=24, **options)
        return [frame_indices(dataset[index]) for index in range(24)]

    halves = pairs(window_seconds=0)
    assert all(first < 20 <= second for first, second in halves)
    assert len({first for first, _ in halves}) > 10
    assert len({second for _, second in halves}) > 10
    # 2.133 s at 10 frames per second.
    assert differences(pairs()) <= {*range(1, 23)}
    assert len(differences(pairs())) > 5
    assert all(first // 10 < second // 10 for first, second in pairs(window_seconds=0, num_segments=4))
    assert differences(pairs(frame_sampling="fixed_gap", gap_seconds=0.7)) == {7}
    assert differences(pairs(frame_sampling="max_gap", gap_seconds=0.3)) == {1, 2, 3}
    assert differences(pairs(frame_sampling="adjacent")) == {1}
    assert differences(pairs(frame_sampling="same")) == {0}
    assert len({first for first, _ in pairs(frame_sampling="same")}) > 10


def test_sampled_times_are_those_of_a_variable_frame_rate(tmp_path):
    # The first 20 frames last 0.05 s each, the others 0.2 s: a gap of 1 s is 20 frames, or 5.
    timestamps = [*(0.05 * np.arange(20)), *(1 + 0.2 * np.arange(20))]
    write_gray_video(tmp_path / "a.mkv", timestamps=timestamps)
    dataset = load_frame_pairs(tmp_path, 16, samples_per_file=60, frame_sampling="fixed_gap", gap_seconds=1.0)
    pairs = [frame_indices(dataset[index]) for index in range(60)]
    assert {second - first for first, second in pairs if first >= 20} == {5}
    for first, second in pairs:
        errors = [abs(time - timestamps[first] - 1.0) for time in timestamps]
        assert errors[second] <= min(errors) + 0.002


def test_images_are_upright(tmp_path):
    # Stored lying on its side: the scene has a white upper half.
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((60, 60, 3), dtype=np.uint8)
    stored[:, :30] = 255
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    views = load_frame_pairs(tmp_path, 32, crop_scale=(0.9, 1.0))[0]["pixel_values"].float()
    assert views[:, :, :8].min() > 250
    assert views[:, :, -8:].max() < 5


def test_views_of_a_pair_are_cut_independently(tmp_path):
    # A ramp: the mean level of a view tells where it was cut.
    ramp = np.broadcast_to(np.arange(0, 250, dtype=np.uint8)[None, :, None], (250, 250, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.png")
    dataset = load_frame_pairs(tmp_path, 16, samples_per_file=200, horizontal_flip=False)
    means = torch.stack([dataset[index]["pixel_values"].float().mean(dim=(1, 2, 3)) for index in range(200)])
    assert means.std(dim=0).min() > 5
    assert abs(torch.corrcoef(means.T)[0, 1]) < 4.5 / 200**0.5


def test_parquet_and_saved_datasets_give_the_pairs_of_their_files(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    tables = {}
    for kind, feature in [("images", datasets.Image()), ("videos", datasets.Video())]:
        files = [item.media for item in map(open_source(mixed / kind).__getitem__, range(4))]
        rows = {"media": [{"path": None, "bytes": open(file, "rb").read()} for file in files]}  # noqa: SIM115
        tables[kind] = datasets.Dataset.from_dict(rows, features=datasets.Features({"media": feature}))
    tables["images"].to_parquet(tmp_path / "images.parquet")
    tables["images"].save_to_disk(tmp_path / "images")
    tables["videos"].save_to_disk(tmp_path / "videos")
    for kind, stored in [("images", "images.parquet"), ("images", "images"), ("videos", "videos")]:
        from_files = load_frame_pairs(mixed / kind, 16)
        from_table = load_frame_pairs(tmp_path / stored, 16)
        assert len(from_table) == 4
        for index in range(4):
            assert torch.equal(from_table[index]["pixel_values"], from_files[index]["pixel_values"])


def test_pairs_do_not_depend_on_the_number_of_workers(mixed):
    expected = all_pairs(load_frame_pairs(mixed, 16), num_workers=0)
    for num_workers in [1, 3]:
        assert torch.equal(all_pairs(load_frame_pairs(mixed, 16), num_workers), expected)


def test_replacements_do_not_depend_on_the_number_of_workers(partly_bad, tmp_path):
    def pairs(num_workers):
        path = tmp_path / f"bad_files_{num_workers}.jsonl"
        dataset = load_frame_pairs(partly_bad, 16, samples_per_file=3, max_bad_files=0.5, bad_files_path=path)
        result = all_pairs(dataset, num_workers)
        dataset.bad_files.merge()
        entries = read_record(path)
        assert sorted(entry["path"] for entry in entries) == sorted(str(partly_bad / name) for name in BAD_NAMES)
        assert all(entry["path"] in entry["error"] and entry["path"] != entry["error"] for entry in entries)
        return result

    expected = pairs(0)
    assert len(expected) == 2 * 36
    assert torch.equal(pairs(1), expected)
    assert torch.equal(pairs(3), expected)
    # A run that goes on, with the record of what it found before, gives the same pairs.
    assert torch.equal(pairs(0), expected)


def test_the_seed_and_the_epoch_decide(mixed):
    dataset, other = (load_frame_pairs(mixed, 16, seed=seed) for seed in [0, 1])
    for index in range(9):
        first, second, third = dataset[0, 7, index], dataset[1, 7, index], dataset[0, 8, index]
        assert torch.equal(first["pixel_values"], dataset[0, 7, index]["pixel_values"])
        for different in [second, third, other[0, 7, index]]:
            assert not torch.equal(first["pixel_values"], different["pixel_values"])


class SeedView:
    """Instead of a view, the seed that it would be cut with."""

    def __call__(self, frames, seed):
        return torch.tensor(seed)


def test_no_two_samples_share_random_numbers(partly_bad):
    dataset = FramePairDataset(
        [open_source(partly_bad)],
        SeedView(),
        FrameSampling(),
        BadFiles(None, 12, 0.5),
        MediaLoader(),
        samples_per_file=4,
    )
    seeds = all_pairs_of_seeds(dataset, 2).tolist()
    assert len(seeds) == 5 * 48
    assert len({*seeds}) == len(seeds)
    assert all_pairs_of_seeds(dataset, 0).tolist() == seeds


def all_pairs_of_seeds(dataset, num_workers):
    sampler = EpochBatchSampler([12], len(dataset), 4, num_epochs=5)
    batches = build_dataloader(dataset, sampler, num_workers, pin_memory=False)
    return torch.cat([batch["pixel_values"] for batch in batches])


def test_global_random_states_are_left_alone(partly_bad):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    dataset = load_frame_pairs(partly_bad, 16, max_bad_files=0.5)
    all_pairs(dataset, num_workers=0, num_epochs=1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


def test_a_dataset_travels_to_spawned_processes(mixed):
    dataset = load_frame_pairs(mixed, 16)
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(torch.equal(copy[index]["pixel_values"], dataset[index]["pixel_values"]) for index in range(9))


def run_process(folder, path, rank, results):
    dataset = load_frame_pairs(folder, 16, samples_per_file=2, max_bad_files=0.5, bad_files_path=path)
    sampler = EpochBatchSampler([12], len(dataset), 2, num_epochs=2, batch_multiple=2)
    batches = build_dataloader(dataset, BatchSamplerShard(sampler, 2, rank), num_workers=2, pin_memory=False)
    # As numpy arrays: tensors would be shared through file descriptors of a process that is gone.
    results.put((rank, [batch["pixel_values"].numpy() for batch in batches]))


def test_several_processes_with_workers_record_each_bad_file_once(partly_bad, tmp_path):
    path = tmp_path / "bad_files.jsonl"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=run_process, args=(partly_bad, path, rank, results)) for rank in range(2)]
    for process in processes:
        process.start()
    shards = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    dataset = load_frame_pairs(partly_bad, 16, samples_per_file=2, max_bad_files=0.5, bad_files_path=path)
    assert len(dataset.bad_files) == len(BAD_NAMES)
    dataset.bad_files.merge()
    assert sorted(entry["path"] for entry in read_record(path)) == sorted(str(partly_bad / name) for name in BAD_NAMES)
    together = [batch for batches in zip(shards[0], shards[1], strict=True) for batch in batches]
    assert (np.concatenate(together) == all_pairs(dataset, num_workers=0).numpy()).all()


def test_a_partly_damaged_video_still_gives_its_good_frames(tmp_path):
    write_partly_damaged_video(tmp_path / "damaged.mp4", num_good_frames=NUM_FRAMES // 2)
    write_gray_video(tmp_path / "good.mp4")
    dataset = load_frame_pairs(tmp_path, 16, samples_per_file=40, frame_sampling="adjacent", max_bad_files=0.5)
    damaged = [index for index in range(2) if dataset.item(index).name.endswith("damaged.mp4")]
    pairs = [frame_indices(dataset[0, position, damaged[0]]) for position in range(80)]
    # From the damaged file come pairs of its first half. One in 16 met damage at four places; the good file stood in.
    assert list(dataset.bad_files.errors) == [str(tmp_path / "damaged.mp4")]
    assert 0 < sum(second >= NUM_FRAMES // 2 for _, second in pairs) < 12


def test_a_video_with_one_damaged_place_is_not_bad(tmp_path, caplog):
    write_partly_damaged_video(tmp_path / "damaged.mp4", num_good_frames=NUM_FRAMES - 4)
    caplog.set_level(logging.WARNING, logger="vicmae_hf.data.media.video")
    dataset = load_frame_pairs(tmp_path, 16, frame_sampling="adjacent")
    pairs = [frame_indices(dataset[0, position, 0]) for position in range(60)]
    assert max(second for _, second in pairs) < NUM_FRAMES - 4
    assert len(dataset.bad_files) == 0
    assert caplog.text.count("damaged.mp4 is damaged in places, and its other frames are used (cannot decode") == 1


def test_replacements_come_from_all_files(tmp_path):
    for index in range(6):
        Image.new("L", (8, 8), 40 * index).save(tmp_path / f"{index}.png")
    (tmp_path / "bad.png").touch()
    dataset = load_frame_pairs(tmp_path, 8)
    bad = next(index for index in range(7) if dataset.item(index).name.endswith("bad.png"))
    levels = [dataset[0, position, bad]["pixel_values"][0, 0, 0, 0].item() for position in range(120)]
    counts = np.unique(levels, return_counts=True)
    assert counts[0].tolist() == [0, 40, 80, 120, 160, 200]
    assert np.abs(counts[1] - 20).max() < 4.5 * np.sqrt(120 / 6 * 5 / 6)
    # Neighbours in the order don't follow each other in step.
    assert len({second - first for first, second in pairwise(levels)}) > 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_files_stop_the_run(partly_bad, tmp_path, num_workers, monkeypatch):
    path = tmp_path / "bad_files.jsonl"
    dataset = load_frame_pairs(partly_bad, 16, samples_per_file=3, max_bad_files=0.2, bad_files_path=path)
    # After an error PyTorch waits so many seconds for each of the workers.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(BadFilesError):
        all_pairs(dataset, num_workers)
    gc.collect()
    # In one line, without the traceback of a worker, and with names.
    dataset.bad_files.update()
    with pytest.raises(
        BadFilesError, match=r"of 12 files could not be read, and --max_bad_files 0\.2 allows 2"
    ) as raised:
        dataset.bad_files.check()
    assert "\n" not in str(raised.value)
    assert sum(str(partly_bad / name) in str(raised.value) for name in BAD_NAMES) == 3


def test_one_bad_file_is_allowed_unless_none_is(tmp_path):
    write_texture(tmp_path / "good.png")
    (tmp_path / "bad.png").touch()
    dataset = load_frame_pairs(tmp_path, 16, max_bad_files=0.01)
    assert torch.equal(dataset[0]["pixel_values"], dataset[0]["pixel_values"])
    strict = load_frame_pairs(tmp_path, 16, max_bad_files=0)
    with pytest.raises(BadFilesError, match=r"1 of 2 files .* allows 0.*bad\.png"):
        [strict[index] for index in range(2)]


@pytest.mark.parametrize("max_bad_files", [0, 0.05, 1])
def test_a_folder_of_bad_files_only(tmp_path, max_bad_files):
    for name in ["a.mp4", "b.jpg"]:
        (tmp_path / name).write_text("neither video nor image")
    dataset = load_frame_pairs(tmp_path, 16, max_bad_files=max_bad_files)
    with pytest.raises(BadFilesError, match="of 2 files could not be read") as raised:
        dataset[0]
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_files_that_have_all_timed_out_end_the_run_and_are_tried_again_by_the_next(tmp_path):
    record, names = tmp_path / "bad_files.jsonl", [str(tmp_path / f"{index}.png") for index in range(3)]
    for name in names:
        write_texture(name)
    dataset = load_frame_pairs(tmp_path, 16, max_bad_files=1, bad_files_path=record)
    dataset.bad_files.num_files = 100  # else the third one would end it here
    for name in names:
        dataset.bad_files.add(name, "late", is_transient=True)
    with pytest.raises(BadFilesError, match=r"none of 3 files could be read, among them .*0\.png"):
        dataset[0]
    # The stalled disk is back.
    again = load_frame_pairs(tmp_path, 16, max_bad_files=0, bad_files_path=record)
    assert again[0]["pixel_values"].shape == (2, 3, 16, 16)


def test_a_bad_row_is_named_by_its_place(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    rows = {"image": [{"path": None, "bytes": buffer.getvalue()}] * 3 + [{"path": "cat.png", "bytes": b"broken"}]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    table.save_to_disk(tmp_path / "saved")
    dataset = load_frame_pairs(tmp_path / "saved", 16, bad_files_path=tmp_path / "bad_files.jsonl")
    assert dataset[3]["pixel_values"].max() == 0
    (entry,) = read_record(tmp_path / "bad_files.jsonl")
    assert entry["path"] == f"{tmp_path}/saved[3] (cat.png)"
    assert entry["error"].startswith(f"{tmp_path}/saved[3] (cat.png): 6 bytes: in no image format")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_file": 0}, "samples_per_file must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between 0 and 4294967295, got -1"),
        ({"max_bad_files": 2}, "max_bad_files must be between 0 and 1, got 2"),
        ({"image_size": 0}, "image_size must be"),
        ({"frame_sampling": "far"}, "frame_sampling must be one of"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be"),
        ({"frames_per_second": 10, "source_frames_per_second": 30}, "another name for .*: give one"),
    ],
)
def test_bad_options(mixed, options, message):
    with pytest.raises(InputError, match=message):
        load_frame_pairs(mixed, **options)


def test_no_sources():
    with pytest.raises(DataSourceError, match="No data source was given"):
        load_frame_pairs([])
