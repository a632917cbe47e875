"""Writing of frame stores: every video is decoded once, and its frames are kept encoded."""

import hashlib
import io
import json
import multiprocessing
import os
import shlex
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm.auto import tqdm

from ...errors import InputError, MediaDecodingError
from ...files import partial_file, write_json, write_json_lines
from ...settings import setting
from ..media.bad_files import BadFilesError
from ..media.reading import DecodingArguments, MediaItem, call_within
from ..media.video import check_backend
from ..samples.frame_choice import choose_stored_frames
from ..sources.frame_store import STORE_FILE
from ..sources.labelled import open_labelled
from ..sources.sources import open_source


FORMAT_VERSION = 2  # raise it when other shards would be written for the same settings
# The paper stores every 4th frame of videos that mostly have 30 frames/s.
DEFAULT_FRAMES_PER_SECOND = 7.5
# Unless told otherwise: few enough shards to open, many enough for some processes with some workers to share.
MIN_SHARDS, MAX_SHARDS, MIN_ITEMS_PER_SHARD = 16, 512, 8
# A record batch ends where it exceeds either: small enough to stream, large enough not to matter in number.
BATCH_BYTES, BATCH_ROWS = 8 * 2**20, 4096
# Of decoded frames held at a time. A longer video is decoded in parts, each from the keyframe before it.
DECODED_BYTES = 256 * 2**20
# Arrow's `list` and `binary` count bytes in 32 bits.
MAX_ROW_BYTES = 2**31 - 2**24


@dataclass(kw_only=True)
class PackingSettings(DecodingArguments):
    """What decides the content of a store, together with the list of items."""

    frames_per_second: float | None = setting(
        None,
        "frames kept of a second of video, where it has as many; 0 keeps all; default: 7.5, every 4th of 30",
        minimum=0,
    )
    num_frames: int | None = setting(
        None, "frames kept of a video, evenly spread; in place of frames_per_second", minimum=1
    )
    short_side: int = setting(
        256, "pixels to which frames are made smaller; never enlarges; 0 keeps their size", minimum=0
    )
    format: Literal["jpeg", "webp"] = setting("jpeg", "how frames are encoded")
    quality: int = setting(90, "of the encoder, 1 to 100", minimum=1, maximum=100)
    videos_per_shard: int | None = setting(
        None, "videos and images of a shard; default: 16 to 512 shards in all", minimum=1
    )
    seed: int = setting(0, "of the order in which items are stored", minimum=0)

    def __post_init__(self):
        if self.frames_per_second is not None and self.num_frames is not None:
            raise InputError("--frames_per_second and --num_frames were both given: choose one.")
        if self.frames_per_second is None and self.num_frames is None:
            self.frames_per_second = DEFAULT_FRAMES_PER_SECOND
        super().__post_init__()
        check_backend(self.video_backend)


@dataclass(frozen=True)
class PackingInput:
    """
    The videos and images to pack.

    Args:
        name: as the user gave it.
        items: anything that `open_source` returns.
        item_names: path of each within the input.
        item_sizes: bytes of each (frames, of a store's rows), which tell other files of the same names.
        labels: class indices, int64, -1 for none; or None.
        class_names: of the labels; or None.
    """

    name: str
    items: Sequence[MediaItem]
    item_names: list[str]
    item_sizes: list[int]
    labels: np.ndarray | None
    class_names: list[str] | None

    @classmethod
    def open(
        cls, name: str | os.PathLike, labelled: bool = False, class_names: Sequence[str] | None = None
    ) -> "PackingInput":
        """
        Opens a source; if `labelled`, as a folder ROOT/CLASS_NAME/FILE whose classes have the order of `class_names`
        (see `open_labelled`). A dataset with a column of labels brings them along in any case.
        """
        name = os.fspath(name)
        if labelled:
            source = open_labelled(name, class_names)
            items = source.items
            return cls(name, items, items.list_names(), items.list_sizes(), source.labels, source.class_names)
        source = open_source(name)
        return cls(name, source, source.list_names(), source.list_sizes(), source.labels, source.class_names)

    def digest(self) -> str:
        """SHA-256 of names, sizes, labels and classes in their order."""
        labels = None if self.labels is None else self.labels.tolist()
        content = [self.item_names, self.item_sizes, labels, self.class_names]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def features(self) -> datasets.Features:
        """The columns of a store; `fps` is the source's own rate, an image has none."""
        columns = {
            "name": datasets.Value("string"),
            "frames": datasets.List(datasets.Image(decode=False)),
            "timestamps": datasets.List(datasets.Value("float64")),
            "duration": datasets.Value("float64"),
            "fps": datasets.Value("float64"),
        }
        if self.class_names is not None:
            columns["label"] = datasets.ClassLabel(names=self.class_names)
        return datasets.Features(columns)


def encode_frame(frame: torch.Tensor, settings: PackingSettings) -> bytes:
    """
    A frame, uint8 `(3, H, W)`, made smaller (bicubic, antialiased) and encoded by Pillow.

    Raises:
        MediaDecodingError: if the format cannot hold it: WebP ends at 16,383 pixels, JPEG at 65,535.
    """
    height, width = frame.shape[-2:]
    if 0 < settings.short_side < min(height, width):
        scale = settings.short_side / min(height, width)
        size = [round(height * scale), round(width * scale)]
        frame = F.resize(frame, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    output = io.BytesIO()
    try:
        picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        picture.save(output, settings.format.upper(), quality=settings.quality)
    except (OSError, ValueError) as error:
        raise MediaDecodingError(f"a frame of {width}x{height} pixels cannot be encoded: {error}") from error
    return output.getvalue()


def pack_item(item: MediaItem, settings: PackingSettings) -> dict[str, Any]:
    """The columns `frames`, `timestamps`, `duration` and `fps` of an item."""
    with item.open(settings.video_backend) as reader:
        indices = choose_stored_frames(
            reader.timestamps, reader.duration, settings.frames_per_second, settings.num_frames
        )
        first = reader.get_frames(indices[:1])
        frames = [encode_frame(first[0], settings)]
        step = max(DECODED_BYTES // first.numel(), 1)
        for start in range(1, len(indices), step):
            decoded = reader.get_frames(indices[start : start + step])
            frames += [encode_frame(frame, settings) for frame in decoded]
    if sum(map(len, frames)) > MAX_ROW_BYTES:
        raise MediaDecodingError(
            f"its {len(frames)} encoded frames exceed the 2 GiB of a row; store fewer or smaller ones, or cut it"
        )
    return {
        "frames": [{"bytes": frame, "path": None} for frame in frames],
        "timestamps": reader.timestamps[indices],
        "duration": reader.duration,
        "fps": reader.num_frames / reader.duration if reader.duration > 0 else None,
    }


@dataclass(frozen=True)
class ShardRecord:
    """
    What became of a shard's items.

    Args:
        num_rows, num_frames, num_bytes: of its Arrow file.
        failures: `{"path", "error"}` of each item that could not be read.
    """

    num_rows: int
    num_frames: int
    num_bytes: int
    failures: list[dict[str, str]]


@dataclass(frozen=True)
class Packer:
    """
    Writes the shards of a store. A shard has `videos_per_shard` items, consecutive in an order drawn from the seed:
    shards of videos of one class would make poor batches when they are streamed.

    Args:
        source: what is packed.
        output: the store's folder.
        settings: what decides its content; `videos_per_shard` is set.
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
        """Indices of the items of a shard."""
        start = shard * self.settings.videos_per_shard
        return self.order[start : start + self.settings.videos_per_shard]

    def shard_path(self, shard: int) -> Path:
        return self.output / f"data-{shard:05d}-of-{self.num_shards:05d}.arrow"

    def is_whole(self, shard: int) -> bool:
        return self.shard_path(shard).exists()

    def read_record(self, shard: int) -> ShardRecord:
        path = self.shard_path(shard)
        try:
            return ShardRecord(**json.loads(path.with_suffix(".json").read_text()))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path.with_suffix('.json')}: cannot be read ({error}). Delete it and {path.name}, and run again."
            ) from error

    def pack_shard(self, shard: int) -> ShardRecord:
        """
        Writes a shard and its record, both under other names first: a shard that is there is whole.

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
            write_json(path.with_suffix(".json"), asdict(record))
        return self.read_record(shard)

    def _rows(self, shard: int, failures: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for index in self.shard_items(shard).tolist():
            item = self.source.items[index]
            try:
                row = self._pack_item(item)
            except MediaDecodingError as error:
                # What is read from bytes does not know its name.
                message = str(error) if item.name in str(error) else f"{item.name}: {error}"
                failures.append({"path": item.name, "error": message})
                continue
            row["name"] = self.source.item_names[index]
            if self.source.labels is not None:
                label = int(self.source.labels[index])
                row["label"] = label if label >= 0 else None
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


@dataclass(frozen=True)
class PackingSummary:
    """
    What is in a store.

    Args:
        is_finished: whether all shards are there, and the store can be opened.
        num_shards: of the store; num_missing: those not there yet.
        num_rows, num_frames, num_bytes, num_failures: of those that are there.
    """

    is_finished: bool
    num_shards: int
    num_missing: int
    num_rows: int
    num_frames: int
    num_bytes: int
    num_failures: int


def pack_frames(
    source: PackingInput,
    output: str | os.PathLike,
    settings: PackingSettings,
    *,
    num_proc: int = 1,
    seconds_per_file: float = 600.0,
    max_bad_files: float = 0.05,
    process_index: int = 0,
    num_processes: int = 1,
    command: Sequence[str] = (),
) -> PackingSummary:
    """
    Packs a source into a store, or goes on with one that an earlier run left unfinished. Its shards are the same
    whatever the number of processes and interruptions.

    Args:
        source: what to pack.
        output: the store's folder.
        settings: what decides its content.
        num_proc: shards written at a time, each by a process of its own.
        seconds_per_file: an item that takes longer counts as unreadable; 0 sets no limit.
        max_bad_files: share of items that may be unreadable before a `BadFilesError`; one is allowed unless it is 0.
        process_index, num_processes: this run writes the shards `process_index`, `process_index + num_processes`, ...
            The run that finds all shards written finishes the store.
        command: what goes on with the store, for messages.

    Raises:
        InputError: if the folder holds something else, or a store of other items or settings, or cannot be written to.
        BadFilesError: if too many items cannot be read. What is written stays; allowing more goes on with it.
    """
    if not 0 <= process_index < num_processes:
        raise InputError(f"RANK must be between 0 and WORLD_SIZE - 1 = {num_processes - 1}, got {process_index}.")
    output = Path(output).expanduser()
    if settings.videos_per_shard is None:
        settings = PackingSettings(**{**content_settings(settings), "videos_per_shard": items_per_shard(source)})
    packer = Packer(source, output, settings, seconds_per_file)
    claim_folder(packer, command)
    whole = [shard for shard in range(packer.num_shards) if packer.is_whole(shard)]
    own = [shard for shard in range(process_index, packer.num_shards, num_processes) if not packer.is_whole(shard)]
    records = {shard: packer.read_record(shard) for shard in whole}
    num_items = sum(len(packer.shard_items(shard)) for shard in own)
    with tqdm(total=num_items, desc="Packing", unit="file", dynamic_ncols=True, disable=process_index > 0) as progress:
        for shard, record in packed_shards(packer, own, num_proc):
            records[shard] = record
            progress.update(record.num_rows + len(record.failures))
            check_failures(packer, records, max_bad_files)
    records |= {shard: packer.read_record(shard) for shard in range(packer.num_shards) if packer.is_whole(shard)}
    check_failures(packer, records, max_bad_files)
    is_finished = len(records) == packer.num_shards
    if is_finished:
        finish_store(packer, records)
    elif failures := all_failures(records):
        write_failures(packer, failures)
    return PackingSummary(
        is_finished,
        packer.num_shards,
        packer.num_shards - len(records),
        sum(record.num_rows for record in records.values()),
        sum(record.num_frames for record in records.values()),
        sum(record.num_bytes for record in records.values()),
        sum(len(record.failures) for record in records.values()),
    )


def content_settings(settings: PackingSettings) -> dict[str, Any]:
    # Without the fields that subclasses add.
    return {entry.name: getattr(settings, entry.name) for entry in fields(PackingSettings)}


def items_per_shard(source: PackingInput) -> int:
    num_items = len(source.items)
    num_shards = min(max(num_items // MIN_ITEMS_PER_SHARD, MIN_SHARDS), MAX_SHARDS)
    return -(-num_items // num_shards)


def claim_folder(packer: Packer, command: Sequence[str]) -> None:
    """
    Writes down what the store is made of, or compares it with what is written there.

    Raises:
        InputError: if the folder holds something else, or a store of other items or settings.
    """
    output, path = packer.output, packer.output / STORE_FILE
    wanted = {
        "format_version": FORMAT_VERSION,
        "settings": content_settings(packer.settings),
        "num_items": len(packer.source.items),
        "items_sha256": packer.source.digest(),
        "num_shards": packer.num_shards,
        "input": packer.source.name,
        "command": shlex.join(command),
    }
    if not path.exists():
        try:
            output.mkdir(parents=True, exist_ok=True)
            others = [entry.name for entry in output.iterdir() if not entry.name.startswith(".partial-")]
        except OSError as error:
            raise InputError(f"{output}: expected a folder that can be written to ({error}).") from error
        if others and not path.exists():
            raise InputError(f"{output}: is no frame store, but holds {others[0]}; expected an empty or new folder.")
        write_json(path, wanted)
    found = json.loads(path.read_text())
    if found["items_sha256"] != wanted["items_sha256"]:
        raise InputError(
            f"{output}: was begun with other files, names or labels: {found['num_items']} items of {found['input']}, "
            f"now {wanted['num_items']} of {wanted['input']}. Choose another --output, or delete this one."
        )
    pairs = [(name, found["settings"].get(name), value) for name, value in wanted["settings"].items()]
    pairs.append(("format_version", found["format_version"], FORMAT_VERSION))
    differences = [f"{name} {before}, now {now}" for name, before, now in pairs if before != now]
    if differences:
        raise InputError(
            f"{output}: was begun with {'; '.join(differences)}. Go on with the same settings, choose another "
            "--output, or delete this one."
        )


def packed_shards(packer: Packer, shards: Sequence[int], num_proc: int) -> Iterator[tuple[int, ShardRecord]]:
    """Packs shards in `num_proc` processes, and yields each when it is written."""
    if num_proc == 1 or len(shards) < 2:
        torch.set_num_threads(1)
        for shard in shards:
            yield shard, packer.pack_shard(shard)
        return
    # Spawned: forks of a process with threads may hang in their libraries.
    pool = ProcessPoolExecutor(num_proc, multiprocessing.get_context("spawn"), _start_worker, (packer,))
    with pool:
        futures = {pool.submit(_pack_shard, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise InputError(
                f"{packer.output}: a worker was killed, by the system for want of memory or by a crashing decoder. "
                "Run again to go on, with a smaller --num_proc; with --num_proc 1 the progress bar stops at the shard "
                "whose file crashes the decoder. Remove that file from the input then."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker_packer: Packer | None = None


def _start_worker(packer: Packer) -> None:
    global _worker_packer
    _worker_packer = packer
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes; one traceback is enough.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A worker whose parent was killed would go on for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _pack_shard(shard: int) -> ShardRecord:
    return _worker_packer.pack_shard(shard)


def all_failures(records: dict[int, ShardRecord]) -> list[dict[str, str]]:
    return [failure for _, record in sorted(records.items()) for failure in record.failures]


def check_failures(packer: Packer, records: dict[int, ShardRecord], max_share: float) -> None:
    """Raises a BadFilesError that names the first failures if there are more than allowed, or nothing else."""
    failures = all_failures(records)
    num_items = len(packer.source.items)
    max_files = max(1, int(max_share * num_items)) if max_share > 0 else 0
    if len(failures) > max_files or len(failures) == num_items:
        write_failures(packer, failures)
        first = "; ".join(failure["error"] for failure in failures[:3])
        if len(failures) == num_items:
            limit = "none is left. Repair them and pack into a new folder."
        else:
            limit = (
                f"--max_bad_files {max_share} allows {max_files}. Allow more to go on, or repair them and pack into a "
                "new folder."
            )
        raise BadFilesError(
            f"{len(failures)} of {num_items} files could not be read; {limit} {packer.output}/bad_files.jsonl lists "
            f"them. The first: {first}"
        )


def write_failures(packer: Packer, failures: Iterable[dict[str, str]]) -> None:
    write_json_lines(packer.output / "bad_files.jsonl", failures)


def finish_store(packer: Packer, records: dict[int, ShardRecord]) -> None:
    """Writes what `datasets.load_from_disk` reads. Several runs may do so, with the same content."""
    failures = all_failures(records)
    if failures:
        write_failures(packer, failures)
    info = {"features": packer.source.features().to_dict()}
    write_json(packer.output / "dataset_info.json", info)
    identity = [FORMAT_VERSION, content_settings(packer.settings), packer.source.digest()]
    state = {
        # An empty table has nothing to stream.
        "_data_files": [
            {"filename": packer.shard_path(shard).name} for shard, record in sorted(records.items()) if record.num_rows
        ],
        "_fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_json(packer.output / "state.json", state)
    # What killed runs left behind.
    for leftover in packer.output.glob(".partial-*"):
        leftover.unlink(missing_ok=True)
