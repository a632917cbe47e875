"""Writes the shards of a frame store: parts of its items, each written by one process, whole or not at all."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from ...errors import InputError, MediaDecodingError
from ...files import partial_file, read_json, write_json
from ..media.reading import MediaItem, call_within
from .store_rows import PackingInput, PackingSettings, pack_item, stored_label


# Limits of a record batch. Every process that opens a store keeps a few KiB for each of its batches, so they are few;
# a process that packs holds one (docs/performance.md).
BATCH_BYTES, BATCH_ROWS = 128 * 2**20, 4096


@dataclass(frozen=True)
class ShardRecord:
    """
    The record of a shard, so that later runs need not read the shard itself.

    Args:
        num_rows, num_frames, num_bytes: figures of its Arrow file.
        failures: `{"path", "error"}` of each item that could not be read.
    """

    num_rows: int
    num_frames: int
    num_bytes: int
    failures: list[dict[str, str]]


@dataclass(frozen=True)
class Packer:
    """
    Writes the shards of a store. A shard has `videos_per_shard` items, consecutive in an order drawn from the seed. In
    the order of folders a shard would hold videos of one class, which make poor batches when they are streamed.

    Args:
        source: the videos and images to pack.
        output: the store's folder.
        settings: settings that decide its content; `videos_per_shard` is set.
        seconds_per_file: an item that takes longer counts as unreadable; 0 sets no limit.
    """

    source: PackingInput
    output: Path
    settings: PackingSettings
    seconds_per_file: float

    @property
    def num_shards(self) -> int:
        return -(-len(self.source.items) // self.settings.videos_per_shard)

    @cached_property
    def order(self) -> np.ndarray:
        return np.random.default_rng(self.settings.seed).permutation(len(self.source.items))

    def shard_items(self, shard: int) -> np.ndarray:
        """Returns the indices of the items of a shard."""
        start = shard * self.settings.videos_per_shard
        return self.order[start : start + self.settings.videos_per_shard]

    def shard_path(self, shard: int) -> Path:
        return self.output / f"data-{shard:05d}-of-{self.num_shards:05d}.arrow"

    def is_whole(self, shard: int) -> bool:
        return self.shard_path(shard).exists()

    def read_record(self, shard: int) -> ShardRecord:
        path = self.shard_path(shard)
        try:
            return ShardRecord(**read_json(path.with_suffix(".json")))
        except (TypeError, InputError) as error:
            raise InputError(
                f"{path.with_suffix('.json')}: cannot be read ({error}). Delete it and {path.name}, and run again."
            ) from error

    def read_records(self) -> dict[int, ShardRecord]:
        """Reads the records of the shards that are there."""
        return {shard: self.read_record(shard) for shard in range(self.num_shards) if self.is_whole(shard)}

    def pack_shard(self, shard: int) -> ShardRecord:
        """
        Writes a shard and its record, both under other names first, so that a shard that is there is whole.

        Raises:
            InputError: if the folder cannot be written to.
        """
        path = self.shard_path(shard)
        num_frames, failures = [], []
        with partial_file(path) as partial:
            with closing(ShardWriter(partial, self.source.features())) as writer:
                for row in self._rows(shard, failures):
                    writer.add(row)
                    num_frames.append(len(row["frames"]))
            record = ShardRecord(len(num_frames), sum(num_frames), partial.stat().st_size, failures)
            # Inside the block: the record is there before the shard gets its name.
            write_json(path.with_suffix(".json"), asdict(record))
        return self.read_record(shard)

    def _rows(self, shard: int, failures: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for index in self.shard_items(shard).tolist():
            item = self.source.items[index]
            try:
                row = self._pack_item(item)
            except MediaDecodingError as error:
                # A decoder that was given bytes does not know the name.
                message = str(error) if item.name in str(error) else f"{item.name}: {error}"
                failures.append({"path": item.name, "error": message})
                continue
            row["name"] = self.source.item_names[index]
            if self.source.labels is not None:
                row["label"] = stored_label(self.source.labels[index])
            yield row

    def _pack_item(self, item: MediaItem) -> dict[str, Any]:
        return call_within(self.seconds_per_file, lambda: pack_item(item, self.settings), item.name)


class ShardWriter:
    """Writes rows to an Arrow file (IPC stream, as `datasets` has it) in record batches of limited size."""

    def __init__(self, path: Path, features: datasets.Features):
        self.schema = features.arrow_schema
        self.file = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)
        self.rows = []
        self.num_bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        row_bytes = sum(len(frame["bytes"]) for frame in row["frames"])
        if self.rows and (self.num_bytes + row_bytes > BATCH_BYTES or len(self.rows) == BATCH_ROWS):
            self._flush()
        self.rows.append(row)
        self.num_bytes += row_bytes

    def close(self) -> None:
        if self.rows:
            self._flush()
        self.stream.close()
        self.file.close()

    def _flush(self) -> None:
        columns = [pa.array([row[field.name] for row in self.rows], field.type) for field in self.schema]
        self.stream.write_batch(pa.record_batch(columns, schema=self.schema))
        self.rows = []
        self.num_bytes = 0


def packed_shards(packer: Packer, shards: Sequence[int], num_proc: int) -> Iterator[tuple[int, ShardRecord]]:
    """Packs shards in `num_proc` processes, and yields each when it is written."""
    if num_proc == 1 or len(shards) < 2:
        torch.set_num_threads(1)  # as in a worker: --num_proc decides how many cores are used
        for shard in shards:
            yield shard, packer.pack_shard(shard)
        return
    # Spawned, because forks of a process with threads may hang in their libraries.
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _start_worker, (packer,))
    with pool:
        futures = {pool.submit(_pack_shard, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"{packer.output}: a worker was killed, because memory ran out or a decoder crashed. "
                "Run again with a smaller --num_proc to continue. With --num_proc 1 the progress bar stops at the "
                "shard whose file crashes the decoder; remove that file from the input."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_packer: Packer | None = None  # sent once to each worker, and not with every shard


def _start_worker(packer: Packer) -> None:
    global _worker_packer
    _worker_packer = packer
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes. Workers end without a word, because one traceback is enough.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A worker whose parent was killed would go on for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])  # returns when the parent is gone
    os._exit(1)


def _pack_shard(shard: int) -> ShardRecord:
    return _worker_packer.pack_shard(shard)
