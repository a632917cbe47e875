"""How much memory readers of frame stores take: stores of a thousand to a million rows side by side.

    python benchmarks/store_memory.py --folder /tmp/store_memory

Writes stores of tiny frames there (about 1.3 GB at a million rows; deleted at the end), and opens each in a process of
its own that reads random pairs, alone and then with workers. A line of the table is a store; down a column only the
number of rows changes, so that what grows is what rows cost. RssAnon is the memory that a process has filled. RssFile
is what it has touched of mapped files, the store's and those of libraries: all processes share it, and the kernel
takes it back when it needs memory. Private is what a worker has for itself. Linux only.
"""

import argparse
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.preparing import shards
from vicmae_hf.data.preparing.packing import claim_folder, finish_store
from vicmae_hf.data.preparing.shards import Packer, ShardRecord, ShardWriter
from vicmae_hf.data.preparing.store_rows import PackingInput, PackingSettings


FRAMES_PER_ROW = 2
READS_AT_A_TIME = 50


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the stores are written")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 100_000, 1_000_000], help="of each store")
    parser.add_argument("--reads", type=int, default=20_000, help="random pairs read, and as many by the workers")
    parser.add_argument("--num_workers", type=int, default=4, help="reading processes of the second part")
    parser.add_argument("--rows_per_batch", type=int, default=shards.BATCH_ROWS, help="of the Arrow files")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_store(folder: Path, num_rows: int) -> None:
    """A store as `pack_frames` leaves it, of rows that share a few pictures."""
    names = [f"{index}.mp4" for index in range(num_rows)]
    source = PackingInput(
        name=str(folder),
        # Their number alone counts: no file is read.
        items=names,
        item_names=names,
        item_sizes=[FRAMES_PER_ROW] * num_rows,
        labels=np.arange(num_rows) % 10,
        class_names=[f"class_{index}" for index in range(10)],
    )
    num_shards = min(num_rows, 512)
    settings = PackingSettings(videos_per_shard=-(-num_rows // num_shards))
    packer = Packer(source, folder, settings, 0.0)
    claim_folder(packer, [])
    frames = [{"bytes": encode(level), "path": None} for level in range(0, 256, 16)]
    records = {}
    for shard in range(packer.num_shards):
        items = packer.shard_items(shard).tolist()
        with closing(ShardWriter(packer.shard_path(shard), source.features())) as writer:
            for index in items:
                chosen = [frames[(index + offset) % len(frames)] for offset in range(FRAMES_PER_ROW)]
                row = {"name": names[index], "frames": chosen, "timestamps": [0.0, 0.5], "duration": 1.0, "fps": 30.0}
                writer.add({**row, "label": index % 10})
        records[shard] = ShardRecord(len(items), FRAMES_PER_ROW * len(items), 0, [])
    finish_store(packer, records)


def encode(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def resident_mib() -> dict[str, float]:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    parts = dict(
        line.split(":") for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    )
    kib = {name: int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}
    kib["Private"] = sum(int(parts[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))
    return {name: value / 1024 for name, value in kib.items()}


def read_pairs(dataset: torch.utils.data.Dataset, indices: np.ndarray) -> int:
    return sum(len(dataset[int(index)]["pixel_values"]) for index in indices)


class Reads(torch.utils.data.Dataset):
    """Each item reads some random pairs, and gives the number of frames and the memory of the process after them."""

    def __init__(self, pairs: torch.utils.data.Dataset, num_reads: int):
        self.pairs = pairs
        self.indices = np.random.default_rng(1).integers(
            len(pairs), size=(num_reads // READS_AT_A_TIME, READS_AT_A_TIME)
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[int, int, dict[str, float]]:
        num_frames = read_pairs(self.pairs, self.indices[index])
        return multiprocessing.current_process().pid, num_frames, resident_mib()


def measure(store: Path, num_reads: int, num_workers: int) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    memory = {"before": resident_mib()}
    dataset = load_frame_pairs(store, 16)
    memory["opened"] = resident_mib()
    read_pairs(dataset, np.random.default_rng(0).integers(len(dataset), size=num_reads))
    memory["read"] = resident_mib()
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    loader = torch.utils.data.DataLoader(Reads(dataset, num_reads), batch_size=None, num_workers=num_workers)
    workers = {process: resident for process, _, resident in loader}
    memory["workers"] = {name: max(resident[name] for resident in workers.values()) for name in memory["read"]}
    return memory


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure, arguments.reads, arguments.num_workers)))
        return
    shards.BATCH_ROWS = arguments.rows_per_batch
    print("RssAnon + RssFile in MiB\n")
    print(
        f"| rows | on disk | before | opened | {arguments.reads:,} pairs read | "
        f"as many by {arguments.num_workers} workers: the largest | its private part |"
    )
    print("|---|---|---|---|---|---|---|")
    for num_rows in arguments.rows:
        store = arguments.folder / f"store_{num_rows}"
        write_store(store, num_rows)
        size = sum(path.stat().st_size for path in store.iterdir()) / 2**20
        command = [sys.executable, __file__, "--folder", str(arguments.folder), "--measure", str(store)]
        command += ["--reads", str(arguments.reads), "--num_workers", str(arguments.num_workers)]
        memory = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        cells = [f"{resident['RssAnon']:.0f} + {resident['RssFile']:.0f}" for resident in memory.values()]
        private = memory["workers"]["Private"]
        print(f"| {num_rows:,} | {size:,.0f} MiB | {' | '.join(cells)} | {private:.0f} |", flush=True)
        shutil.rmtree(store)


if __name__ == "__main__":
    main()
