"""Makes pairs of views from rows that arrive in a stream: shard by shard, and in each shard row by row."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch

from ...errors import InputError
from ..loading.loader import loader_settings
from ..media.bad_files import BadFiles, BadFilesError
from ..sources.frame_store import ROW_COLUMNS, FrameStoreSource, StoredItem, has_frames
from ..sources.selection import list_media
from ..sources.sources import STORED_TIMES, DataSourceError, SourceSettings, is_saved_dataset, open_source
from ..sources.tables import as_source_error, hub_options, load_hub_dataset
from .augmentation import RandomView
from .frame_sampling import FrameSampling
from .pairs import make_sample


READ_ROWS = 32  # taken from a stream at a time; few, because their frames stay in memory


@dataclass(frozen=True)
class RowStream:
    """
    The rows of a frame store as a stream.

    Args:
        name: as the user gave it.
        rows: the dataset.
        counted: the same rows with as few columns as possible, because counting needs no frames.
        sizes: number of rows of each shard, where it is known.
    """

    name: str
    rows: datasets.IterableDataset
    counted: datasets.IterableDataset
    sizes: Sequence[int] | None = None

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def count_rows(self, shard: int) -> int:
        if self.sizes is not None:
            return self.sizes[shard]
        return sum(table.num_rows for table in self._tables(self.counted, shard))

    def count_all_rows(self) -> int:
        """Takes the number from the dataset's description, or else counts."""
        split = (self.rows.info.splits or {}).get(str(self.rows.split))
        if split is not None and split.num_examples:
            return split.num_examples
        return sum(self.count_rows(shard) for shard in range(self.num_shards))

    def read(self, shard: int, start: int) -> Iterator[StoredItem]:
        """Yields the rows of a shard from row `start` on. Rows before are not decoded."""
        first = 0
        for table in self._tables(self.rows, shard):
            for row in range(max(start - first, 0), table.num_rows):
                row_name = table.column("name")[row].as_py() if "name" in table.column_names else None
                name = f"{self.name}, shard {shard}, row {first + row}" + (f" ({row_name})" if row_name else "")
                yield StoredItem(name, *(table.column(column)[row] for column in ROW_COLUMNS))
            first += table.num_rows

    def _tables(self, dataset: datasets.IterableDataset, shard: int) -> Iterator:
        with as_source_error(self.name, f"shard {shard} could not be read"):
            # `iter`, because a plain loop would divide the shard once more among the workers of a PyTorch loader.
            yield from dataset.shard(self.num_shards, shard).with_format("arrow").iter(READ_ROWS)


def open_stream(name: str | os.PathLike, settings: SourceSettings | None = None) -> RowStream:
    """
    Opens a frame store, a Parquet file or a folder of them (also by a URL), or a dataset on the Hub as a stream.
    Parquet is read where it is, without the copy that `open_source` makes.

    Raises:
        DataSourceError: if it does not exist, or has no column `frames` of encoded frames.
    """
    name = os.fspath(name)
    settings = SourceSettings() if settings is None else settings
    if settings.nominal_frames_per_second is not None:
        raise DataSourceError(f"{name}: {STORED_TIMES}")
    path = Path(name).expanduser()
    parquet = [str(path)] if path.suffix == ".parquet" else []
    if path.is_dir() and not is_saved_dataset(path):
        _, parquet = list_media(name, path)
    sizes = None
    if "://" in name:
        from ..sources.object_storage import find_files  # imported here, because few have their data there

        found = find_files(name)
        rows = found.load(streaming=True)
        counted = rows if found.format == "arrow" else found.load(streaming=True, columns=["duration"])
        sizes = found.num_rows
    elif not path.exists():
        # Only Parquet can give one column without the others. `duration` is the smallest one that every store has.
        load = partial(load_hub_dataset, name, streaming=True, **hub_options(settings))
        rows = load()
        counted = load(columns=["duration"]) if rows.info.builder_name == "parquet" else rows
    elif parquet:
        files = {"train": parquet}
        with as_source_error(name, "the Parquet files could not be read"):
            rows, counted = (
                datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, columns=columns)
                for columns in (None, ["duration"])
            )
    else:
        source = open_source(name, settings)
        # Mapped into memory, so counting touches no frames.
        is_store = isinstance(source, FrameStoreSource)
        rows = counted = source.table.to_iterable_dataset(len(source.table.cache_files)) if is_store else None
    columns = rows.features if rows is not None and rows.features is not None else {}
    if not has_frames(columns) or not set(ROW_COLUMNS) <= set(columns):
        raise DataSourceError(
            f"{name}: only frame stores are streamed, with the columns {', '.join(ROW_COLUMNS)}. Make one with "
            "pack_frames.py, or leave out --streaming."
        )
    return RowStream(name, rows, counted, sizes)


@dataclass(frozen=True)
class FramePairStream(torch.utils.data.IterableDataset):
    """
    Endless `{"pixel_values": uint8 (2, 3, H, W)}` from a stream of rows, for its `dataloader`.

    Each shard belongs to one worker of one process. A worker goes round its shards for ever. In each round, here
    called an epoch, it takes the shards in another order, and the rows of a shard as they lie. Random numbers depend
    on (seed, epoch, worker, position in the epoch) alone. So a stream that begins later gives the same samples.

    A row that cannot be read is recorded in `bad_files`, and the next one that can be read takes its place.

    Args:
        stream: the rows.
        num_files: their number.
        view, frame_sampling, bad_files, seed, num_patches: see `FramePairDataset`.
        process_index, num_processes: which share of the shards is read.
        batch_size: samples that the loader takes from one worker before it goes to the next.
        start_batch: batches of this process to leave out. Their shards are not read, and their rows not decoded.
    """

    stream: RowStream
    num_files: int
    view: RandomView
    frame_sampling: FrameSampling
    bad_files: BadFiles
    seed: int = 0
    num_patches: int | None = None
    process_index: int = 0
    num_processes: int = 1
    batch_size: int = 1
    start_batch: int = 0

    @property
    def lengths(self) -> list[int]:
        return [self.num_files]

    @property
    def num_samples(self) -> int:
        return self.num_files

    def examples(self, count: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the first samples, at most `count`."""
        return itertools.islice(self, min(count, self.num_samples))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker_info = torch.utils.data.get_worker_info()
        num_workers, worker_id = (worker_info.num_workers, worker_info.id) if worker_info else (1, 0)
        # A loader takes batches from its workers in turn, and always begins with worker 0. When start_batch batches
        # are left out, worker 0 has to do the work of the worker whose turn it would be, and so on.
        place = (worker_id + self.start_batch) % num_workers
        batches_before = len(range(place, self.start_batch, num_workers))
        worker = self.process_index * num_workers + place
        return self.samples(worker, self.num_processes * num_workers, batches_before * self.batch_size)

    def samples(self, worker: int, num_workers: int, start: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the samples of worker `worker` of all `num_workers`, without its first `start` samples."""
        rows = self.rows(worker, range(worker, self.stream.num_shards, num_workers), start)
        ahead = deque()  # rows read, whose turn is still to come
        while True:
            yield self.bad_files.read_first(self.stream.name, self.candidates(worker, rows, ahead))
            # Whether it could be read or not: a row that stood in for another one has its own turn, too.
            ahead.popleft()

    def candidates(
        self, worker: int, rows: Iterator[tuple[int, int, StoredItem]], ahead: deque
    ) -> Iterator[tuple[str, Callable[[], dict[str, torch.Tensor]]]]:
        """Yields the row whose turn it is, then the rows that follow in the stream and may replace it."""
        for attempt in itertools.count():
            if attempt == len(ahead):
                ahead.append(next(rows))
            epoch, position, _ = ahead[0]
            item_epoch, _, item = ahead[attempt]
            if item_epoch > epoch + 1:  # a whole round and more was tried
                raise BadFilesError(f"{self.stream.name}: the shards of worker {worker} have no readable row.")
            # 1 + attempt as in `draw_items`, where numpy fills short seeds up with zeros.
            generator = np.random.default_rng([self.seed, epoch, worker, position, 1 + attempt])
            yield item.name, partial(self.read_pair, item, generator)

    def rows(self, worker: int, shards: Sequence[int], start: int) -> Iterator[tuple[int, int, StoredItem]]:
        """Yields rows of shards, round after round, from the row `start` on: epoch, place in the epoch, row."""
        # Counting takes time, and only a resumed run needs it.
        sizes = {shard: self.stream.count_rows(shard) for shard in shards} if start else {}
        first_epoch, skip = divmod(start, sum(sizes.values())) if start else (0, 0)
        for epoch in itertools.count(first_epoch):
            position = 0
            for shard in np.random.default_rng([self.seed, epoch, worker]).permutation(shards).tolist():
                if skip and skip >= sizes[shard]:  # this shard was consumed: it is not even opened
                    position += sizes[shard]
                    skip -= sizes[shard]
                    continue
                position += skip
                for item in self.stream.read(shard, skip):
                    yield epoch, position, item
                    position += 1
                skip = 0
            if position == 0:  # else the loop would turn for ever without a row
                raise InputError(f"{self.stream.name}: shards {', '.join(map(str, shards))} have no rows.")

    def read_pair(self, item: StoredItem, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """Makes two views of a row: `{"pixel_values": uint8 (2, 3, H, W)}`."""
        with item.open("") as reader:  # no decoder, so no name of one
            frames = reader.get_frames(self.frame_sampling.sample(reader.timestamps, reader.duration, generator))
        return make_sample(item.name, frames, self.view, self.num_patches, generator)

    def list_names(self) -> list[str]:
        """Names the stream and the number of its rows: their own names would have to be fetched."""
        return [self.stream.name, str(self.num_files)]

    def dataloader(
        self,
        batch_size: int,
        num_workers: int,
        pin_memory: bool,
        process_index: int = 0,
        num_processes: int = 1,
        start_batch: int = 0,
    ) -> torch.utils.data.DataLoader:
        """
        Makes an endless loader of `{"pixel_values": uint8 (B, 2, 3, H, W)}` for one of several processes. The shards
        are already divided between the processes: Accelerate must not divide them again.

        Args:
            start_batch: batches to leave out, counted from the beginning of the run, as when it is resumed.

        Raises:
            InputError: if there are fewer shards than workers of all processes.
        """
        # A worker without a shard would have no rows, so there must be a shard for each.
        num_shards, num_readers = self.stream.num_shards, num_processes * max(num_workers, 1)
        if num_shards < num_readers:
            raise InputError(
                f"{self.stream.name} has {num_shards} shards, too few for {num_processes} processes with "
                f"{max(num_workers, 1)} workers each. Use fewer of them, or a store of at least {num_readers} shards "
                "(--videos_per_shard of pack_frames.py; for a dataset on the Hub, num_shards of push_to_hub)."
            )
        share = replace(
            self,
            process_index=process_index,
            num_processes=num_processes,
            batch_size=batch_size,
            start_batch=start_batch,
        )
        return torch.utils.data.DataLoader(share, batch_size=batch_size, **loader_settings(num_workers, pin_memory))


def open_pair_stream(
    name: str | os.PathLike,
    settings: SourceSettings,
    view: RandomView,
    frame_sampling: FrameSampling,
    bad_files_path: str | os.PathLike | None,
    max_bad_files: float,
    seed: int,
    num_patches: int | None,
) -> FramePairStream:
    """Opens one frame store as a stream of pairs (see `load_frame_pairs`)."""
    stream = open_stream(name, settings)
    num_files = stream.count_all_rows()
    if num_files == 0:
        raise DataSourceError(f"{stream.name}: has no rows.")
    return FramePairStream(
        stream, num_files, view, frame_sampling, BadFiles(bad_files_path, num_files, max_bad_files), seed, num_patches
    )
