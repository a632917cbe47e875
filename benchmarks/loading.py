"""How fast pairs of views and clips arrive: from our frame store, from ffcv, and from videos, on the same frames.

    python benchmarks/loading.py --videos FOLDER --ffcv_python .venv-ffcv/bin/python

Packs the videos of a folder (frames of 256 pixels' short side, none enlarged, as JPEG), then takes turns: batches of
pairs, cropped to [0.5, 1] of the area, resized to 224 x 224 and flipped at random, uint8, in one process and with two
workers, and how many cores feed one GPU. A second table has clips of 16 frames (see clip_loading.py), with torchcodec
where it is installed; a third how long the bytes of two frames take from rows in Arrow and in Parquet files.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import decord
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from clip_loading import OURS, Clips, clip_readers, fetch_clips
from decoding import NAIVE, find_videos
from peers import CONFIGS
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from vicmae_hf.data.loading.loader import EpochBatchSampler, build_dataloader
from vicmae_hf.data.media.images import read_image
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.samples.augmentation import RandomView
from vicmae_hf.data.samples.frame_sampling import FrameSampling
from vicmae_hf.data.samples.pairs import load_frame_pairs
from vicmae_hf.pretraining.flops import update_flops
from vicmae_hf.training.devices.peaks import PEAK_FLOPS


IMAGE_SIZE, CROP_SCALE, BATCH_SIZE = 224, (0.5, 1.0), 32
STORE = "frame store"
FRAMES_PER_VIDEO, SHORT_SIDE, QUALITY = 32, 256, 90
PAIRS_PER_VIDEO = 16  # drawn beforehand for ffcv and decord; our store draws its own
UTILISATION, UPDATE_PAIRS = 0.35, 128  # of the GPU that is to be fed (MFU); the pairs of its updates
PREFETCHED_BATCHES = 8  # waiting in the queues of two workers when a turn begins
TABLE_ROWS, FORMAT_READS = 256, 400  # in the comparison of formats


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos, searched at any depth")
    parser.add_argument("--max_files", type=int, default=20, help="take this many files at most")
    parser.add_argument("--ffcv_python", type=Path, help="interpreter of an environment with ffcv (make .venv-ffcv)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; the table shows medians")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn of our store")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def link_videos(source: Path, folder: Path, max_files: int) -> Path:
    """A folder of links to the videos that all contestants can read; those smaller than a view only without others."""
    videos = find_videos(source, [NAIVE, "pyav"], max_files)
    large = [path for path in videos if frame_side(path) >= IMAGE_SIZE]
    print(f"{len(large)} of {len(videos)} videos are at least {IMAGE_SIZE} pixels high and wide")
    folder.mkdir()
    for index, path in enumerate(large or videos):
        (folder / f"{index:06d}{Path(path).suffix}").symlink_to(Path(path).resolve())
    return folder


def frame_side(path: str) -> int:
    with open_video(path) as video:
        return min(video.get_frames([0]).shape[-2:])


class StoredPairs:
    """Pairs of frames drawn from the rows of a store as training draws them: encoded, and as indices of the video."""

    def __init__(self, store: Path, folder: Path, seed: int):
        generator = np.random.default_rng(seed)
        self.encoded, self.sources = [], []
        self.rows = datasets.load_from_disk(str(store))
        for row in self.rows:
            path, times = str(folder / row["name"]), np.array(row["timestamps"])
            with open_video(path) as video:
                indices = np.abs(video.timestamps[:, None] - times).argmin(axis=0).tolist()
            for _ in range(PAIRS_PER_VIDEO):
                pair = FrameSampling().sample(times, row["duration"], generator)
                self.encoded.append([row["frames"][index]["bytes"] for index in pair])
                self.sources.append((path, [indices[index] for index in pair]))

    def __len__(self) -> int:
        return len(self.sources)


class NaiveDecord(Dataset):
    """What most loaders do: open with decord, `get_batch`; then the crop that we make of stored frames."""

    def __init__(self, pairs: StoredPairs):
        self.sources = pairs.sources
        self.view = RandomView(IMAGE_SIZE, CROP_SCALE)

    def __len__(self) -> int:
        return len(self.sources)

    def read(self, index: int) -> torch.Tensor:
        path, indices = self.sources[index]
        frames = decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.view(self.read(index), seed=index)}


def check_frames(pairs: StoredPairs) -> None:
    """Prints how far decord's frames are from the stored ones: other frames would show."""
    differences = []
    for index in range(0, len(pairs), PAIRS_PER_VIDEO):
        for encoded, frame in zip(pairs.encoded[index], NaiveDecord(pairs).read(index), strict=True):
            stored = read_image(encoded)
            frame = F.resize(frame, list(stored.shape[-2:]), antialias=True)
            differences.append((stored.float() - frame.float()).abs().mean().item())
    print(f"mean difference between stored and decord's frames: at most {max(differences):.1f} of 255")


class Turn(NamedTuple):
    """Pairs (or clips), and the seconds and CPU seconds that they took."""

    pairs: int
    seconds: float
    cpu_seconds: float


Contestants = dict[tuple[str, int], Callable[[], Turn]]  # by name and number of workers


def timed(fetch: Callable[[], int]) -> Turn:
    """Times a function that returns a number of pairs; CPU seconds are those of this process and its workers."""

    def cpu_seconds() -> float:
        # This process, its children that have ended, and those that run.
        running = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())
        return sum(os.times()[:4]) + running

    start, cpu_start = time.perf_counter(), cpu_seconds()
    return Turn(fetch(), time.perf_counter() - start, cpu_seconds() - cpu_start)


def store_turns(store: Path, num_workers: int, seconds: float) -> Callable[[], Turn]:
    dataset = load_frame_pairs(store, IMAGE_SIZE, crop_scale=CROP_SCALE, samples_per_file=100)
    order = EpochBatchSampler([dataset.num_files], len(dataset), BATCH_SIZE, num_epochs=10**6)
    batches = iter(build_dataloader(dataset, order, num_workers, pin_memory=False))

    def fetch() -> int:
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            count += len(next(batches)["pixel_values"])
        return count

    def take_turn() -> Turn:
        for _ in range(PREFETCHED_BATCHES):
            next(batches)
        return timed(fetch)

    return take_turn


def decord_turns(pairs: StoredPairs, num_workers: int, seed: int) -> Callable[[], Turn]:
    """A turn is one pass over all pairs, for their costs differ much."""
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()

    def take_turn() -> Turn:
        # Batches of one pair: as few as there are, larger ones would leave a worker without work at the end.
        batches = iter(DataLoader(NaiveDecord(pairs), sampler=order, num_workers=num_workers))
        return timed(lambda: sum(len(batch["pixel_values"]) for batch in batches))

    return take_turn


def what_ffcv_lacks(python: Path | None) -> str:
    """Why this interpreter cannot measure ffcv, in one line; empty if it can."""
    if python is None or not python.exists():
        return f"no interpreter at --ffcv_python {python}"
    outcome = subprocess.run([python, "-c", "import ffcv"], stderr=subprocess.PIPE, text=True)
    return f"{python}: {outcome.stderr.splitlines()[-1]}" if outcome.returncode else ""


@contextlib.contextmanager
def ffcv_turns(pairs: StoredPairs, python: Path, folder: Path) -> Iterator[Contestants]:
    """The turns of a process of ffcv, which ends with the block."""
    folder.mkdir()
    for index, encoded in enumerate(pairs.encoded):
        for view, data in enumerate(encoded):
            picture = Image.fromarray(read_image(data).permute(1, 2, 0).numpy())
            picture.save(folder / f"{index:06d}_{view}.png", compress_level=1)
    script = Path(__file__).with_name("ffcv_pairs.py")
    numbers = map(str, (IMAGE_SIZE, *CROP_SCALE, BATCH_SIZE, QUALITY))
    command = [python, script, folder, *numbers]

    def take_turn(num_workers: int) -> Turn:
        print(num_workers, file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith("turn"):
                count, seconds, cpu_seconds = line.split()[1:]
                return Turn(int(count), float(seconds), float(cpu_seconds))
        raise SystemExit(f"{script} ended with status {process.wait()}")

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            # ffcv works in threads: one of them is what one process is to the others.
            yield {("ffcv", 0): lambda: take_turn(1), ("ffcv", 2): lambda: take_turn(2)}
        finally:
            # Not by the end of its standard input, which loaders' workers may hold open, too.
            process.kill()


def measure(contestants: Contestants, rounds: int) -> dict[tuple[str, int], list[Turn]]:
    turns = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            turns[name].append(contestants[name]())
    return turns


def medians(turns: dict[tuple[str, int], list[Turn]]) -> tuple[dict, dict]:
    """Samples a second, and CPU seconds of a sample, of each contestant."""
    rates = {name: statistics.median(turn.pairs / turn.seconds for turn in taken) for name, taken in turns.items()}
    costs = {name: statistics.median(turn.cpu_seconds / turn.pairs for turn in taken) for name, taken in turns.items()}
    return rates, costs


def print_rates(turns: dict[tuple[str, int], list[Turn]]) -> None:
    rates, costs = medians(turns)
    print("\n| loader | workers | pairs/s | store is faster | CPU time of a pair | store takes less |")
    print("|---|---|---|---|---|---|")
    for (name, num_workers), rate in rates.items():
        cost, store = costs[name, num_workers], (STORE, num_workers)
        print(
            f"| {name} | {num_workers} | {rate:.0f} | {rates[store] / rate:.2f}x | {1e6 * cost:.0f} us | "
            f"{cost / costs[store]:.2f}x |"
        )
    flops_per_pair = update_flops(CONFIGS["large"](), UPDATE_PAIRS) / UPDATE_PAIRS
    pairs_per_second = UTILISATION * PEAK_FLOPS["NVIDIA H100"] / flops_per_pair
    cores = {name: pairs_per_second * cost for (name, num_workers), cost in costs.items() if num_workers}
    print(
        f"\nOne H100 at {UTILISATION:.0%} of its FLOPs takes {pairs_per_second:.0f} pairs a second (L/16). Cores like "
        f"these that feed it: {', '.join(f'{name} {count:.1f}' for name, count in cores.items())}."
    )


def print_clips(turns: dict[tuple[str, int], list[Turn]]) -> None:
    rates, costs = medians(turns)
    print("\n| clips | workers | clips/s | against the better other | CPU time of a clip | against the better other |")
    print("|---|---|---|---|---|---|")
    for (name, num_workers), rate in rates.items():
        others = [key for key in rates if key[0] not in OURS and key[1] == num_workers]
        best_rate, best_cost = max(rates[key] for key in others), min(costs[key] for key in others)
        cost = costs[name, num_workers]
        print(
            f"| {name} | {num_workers} | {rate:.1f} | {rate / best_rate:.2f}x | {1e3 * cost:.1f} ms | "
            f"{best_cost / cost:.2f}x |"
        )


def measure_formats(rows: datasets.Dataset, folder: Path, generator: np.random.Generator) -> dict[str, float]:
    """Median seconds for the bytes of two frames of a random row, files in the page cache."""
    table = rows.select(np.resize(np.arange(len(rows)), TABLE_ROWS)).flatten_indices().data.table.select(["frames"])
    path = folder / "rows.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=TABLE_ROWS // 16)
    column = pa.ipc.open_stream(pa.memory_map(str(path))).read_all().column("frames")
    readers = {"Arrow": column.__getitem__}
    for group_size in (1, 16, 128):
        path = folder / f"rows-{group_size}.parquet"
        pq.write_table(table, path, row_group_size=group_size, compression="none", use_dictionary=False)
        readers[f"Parquet, {group_size} rows in a group"] = parquet_reader(path, group_size)
    times = {name: [] for name in readers}
    for row in generator.integers(TABLE_ROWS, size=FORMAT_READS):
        chosen = generator.integers(len(column[row]), size=2)
        for name, read_row in readers.items():
            start = time.perf_counter()
            frames = read_row(row).values
            for frame in chosen:
                frames[frame].as_py()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def parquet_reader(path: Path, group_size: int) -> Callable[[int], pa.ListScalar]:
    file = pq.ParquetFile(path, memory_map=True)
    return lambda row: file.read_row_group(row // group_size).column("frames")[row % group_size]


def print_formats(times: dict[str, float]) -> None:
    print("\n| format | bytes of 2 frames of a row | against Arrow |")
    print("|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {1e6 * seconds:.0f} us | {seconds / times['Arrow']:.1f}x |")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        videos = link_videos(arguments.videos, folder / "videos", arguments.max_files)
        settings = PackingSettings(num_frames=FRAMES_PER_VIDEO, short_side=SHORT_SIDE, quality=QUALITY)
        pack_frames(PackingInput.open(str(videos)), folder / "store", settings)
        pairs = StoredPairs(folder / "store", videos, arguments.seed)
        check_frames(pairs)
        contestants = {}
        for num_workers in (0, 2):
            contestants[STORE, num_workers] = store_turns(folder / "store", num_workers, arguments.seconds)
            contestants[NAIVE, num_workers] = decord_turns(pairs, num_workers, arguments.seed)
        with contextlib.ExitStack() as stack:
            if obstacle := what_ffcv_lacks(arguments.ffcv_python):
                print(f"ffcv is left out: {obstacle}")
            else:
                contestants |= stack.enter_context(ffcv_turns(pairs, arguments.ffcv_python, folder / "ffcv"))
            print_rates(measure(contestants, arguments.rounds))
        readers = clip_readers(Clips(videos, folder / "clips", SHORT_SIDE, QUALITY, arguments.seed))
        ways = {(name, workers): fetch_clips(clips, workers) for workers in (0, 2) for name, clips in readers.items()}
        print_clips(measure({key: partial(timed, fetch) for key, fetch in ways.items()}, arguments.rounds))
        print_formats(measure_formats(pairs.rows, folder, np.random.default_rng(arguments.seed)))


if __name__ == "__main__":
    main()
