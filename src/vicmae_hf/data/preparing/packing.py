"""
Writes frame stores: every video is decoded once, and its frames are kept encoded.

Packing takes hours, may be interrupted, and may be shared by several machines. So a store is written shard
by shard, each whole or not at all, and any run can continue with what is there.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from ...errors import InputError
from ...files import read_json, write_json, write_json_lines
from ...settings import part_of
from ..media.bad_files import BadFilesError, check_bad_files
from ..sources.sources import STORE_FILE
from .shards import Packer, ShardRecord, packed_shards
from .store_rows import PackingInput, PackingSettings


# The default: few enough shards to open, many enough for some processes with some workers to share.
MIN_SHARDS, MAX_SHARDS, MIN_ITEMS_PER_SHARD = 16, 512, 8


@dataclass(frozen=True)
class PackingSummary:
    """
    The content of a store.

    Args:
        is_finished: whether all shards are there, and the store can be opened.
        num_shards: shards of the store; num_missing: shards that are not there yet.
        num_rows, num_frames, num_bytes, num_failures: sums over the shards that are there.
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
    for any number of processes and interruptions.

    Args:
        source: the videos and images to pack.
        output: the store's folder.
        settings: settings that decide its content.
        num_proc: shards written at a time, each by a process of its own.
        seconds_per_file: an item that takes longer counts as unreadable; 0 sets no limit.
        max_bad_files: share of items that may be unreadable before a `BadFilesError`; one is allowed unless it is 0.
        process_index, num_processes: this run writes the shards `process_index`, `process_index + num_processes`, ...
            The run that finds all shards written finishes the store.
        command: the command that goes on with the store, for messages.

    Raises:
        InputError: if the folder holds something else, or a store of other items or settings, or cannot be written to.
        BadFilesError: if too many items cannot be read. Written shards stay; allow more to go on with them.
    """
    if not 0 <= process_index < num_processes:
        raise InputError(f"RANK must be between 0 and WORLD_SIZE - 1 = {num_processes - 1}, got {process_index}.")
    settings = part_of(settings, PackingSettings)  # a copy: videos_per_shard is filled in
    if settings.videos_per_shard is None:
        settings.videos_per_shard = items_per_shard(source)
    packer = Packer(source, Path(output).expanduser(), settings, seconds_per_file)
    claim_folder(packer, command)
    # Runs share nothing but the folder, so each knows by its number alone which shards are its own.
    own = range(process_index, packer.num_shards, num_processes)
    pack_missing_shards(packer, own, num_proc, max_bad_files, show_progress=process_index == 0)
    records = packer.read_records()
    check_failures(packer, records, max_bad_files)
    failures = all_failures(records)
    if failures:
        write_bad_files(packer, failures)
    summary = summarize(packer, records)
    if summary.is_finished:
        finish_store(packer, records)
    return summary


def pack_missing_shards(
    packer: Packer, own: Sequence[int], num_proc: int, max_bad_files: float, show_progress: bool
) -> None:
    """Packs those of a run's `own` shards that are not there. Raises a BadFilesError once too many items are bad."""
    records = packer.read_records()
    missing = [shard for shard in own if shard not in records]
    num_items = sum(len(packer.shard_items(shard)) for shard in missing)
    with tqdm(total=num_items, desc="Packing", unit="file", dynamic_ncols=True, disable=not show_progress) as progress:
        for shard, record in packed_shards(packer, missing, num_proc):
            records[shard] = record
            progress.update(record.num_rows + len(record.failures))
            check_failures(packer, records, max_bad_files)


def summarize(packer: Packer, records: dict[int, ShardRecord]) -> PackingSummary:
    return PackingSummary(
        is_finished=len(records) == packer.num_shards,
        num_shards=packer.num_shards,
        num_missing=packer.num_shards - len(records),
        num_rows=sum(record.num_rows for record in records.values()),
        num_frames=sum(record.num_frames for record in records.values()),
        num_bytes=sum(record.num_bytes for record in records.values()),
        num_failures=len(all_failures(records)),
    )


def items_per_shard(source: PackingInput) -> int:
    num_items = len(source.items)
    num_shards = min(max(num_items // MIN_ITEMS_PER_SHARD, MIN_SHARDS), MAX_SHARDS)
    return -(-num_items // num_shards)  # rounded up


def format_version(settings: PackingSettings) -> int:
    """What is raised when other shards would be written for the same settings."""
    # Since 2, --num_frames spreads frames by time, not by number.
    return 1 if settings.num_frames is None else 2


def claim_folder(packer: Packer, command: Sequence[str]) -> None:
    """
    Writes down of what the store is made, or compares it with the record that is there.

    Raises:
        InputError: if the folder holds something else, or a store of other items or settings.
    """
    output, path = packer.output, packer.output / STORE_FILE
    wanted = {
        "format_version": format_version(packer.settings),
        "settings": asdict(packer.settings),
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
        if others and not path.exists():  # asked again: another run may have begun the same store just now
            raise InputError(
                f"{output}: is not a frame store, but holds {others[0]}; expected an empty or new folder."
            )
        # For those who read it: images of the same kind have to be read in the same way later on.
        write_json(path, wanted | {"image_range": packer.source.image_range})
    # Also after writing: of several runs that begin at once, one record stays, and all compare with it.
    found = read_json(path)
    if not wanted.keys() <= found.keys():
        raise InputError(f"{path}: is not a record of a frame store. Choose another --output, or delete this one.")
    if found["items_sha256"] != wanted["items_sha256"]:
        raise InputError(
            f"{output}: was begun with other files, names or labels: {found['num_items']} items of {found['input']}, "
            f"now {wanted['num_items']} of {wanted['input']}. Choose another --output, or delete this one."
        )
    pairs = [(name, found["settings"].get(name), value) for name, value in wanted["settings"].items()]
    pairs.append(("format_version", found["format_version"], wanted["format_version"]))
    differences = [f"{name} {before}, now {now}" for name, before, now in pairs if before != now]
    if differences:
        raise InputError(
            f"{output}: was begun with {'; '.join(differences)}. Continue with the same settings, choose another "
            "--output, or delete this one."
        )


def all_failures(records: dict[int, ShardRecord]) -> list[dict[str, str]]:
    return [failure for _, record in sorted(records.items()) for failure in record.failures]


def check_failures(packer: Packer, records: dict[int, ShardRecord], max_share: float) -> None:
    """Raises a BadFilesError if more items failed than allowed, or all. Then bad_files.jsonl lists them."""
    failures = all_failures(records)
    errors = [failure["error"] for failure in failures]
    remedy = (
        f"Allow more to go on, or repair them and pack into a new folder. {packer.output}/bad_files.jsonl lists them."
    )
    try:
        check_bad_files(errors, len(packer.source.items), max_share, remedy)
    except BadFilesError:
        write_bad_files(packer, failures)
        raise


def write_bad_files(packer: Packer, failures: Iterable[dict[str, str]]) -> None:
    write_json_lines(packer.output / "bad_files.jsonl", failures)


def finish_store(packer: Packer, records: dict[int, ShardRecord]) -> None:
    """Writes the files that `datasets.load_from_disk` reads. Several runs may do so, with the same content."""
    info = {"features": packer.source.features().to_dict()}
    write_json(packer.output / "dataset_info.json", info)
    identity = [format_version(packer.settings), asdict(packer.settings), packer.source.digest()]
    state = {
        # Without empty shards: an empty table has nothing to stream.
        "_data_files": [
            {"filename": packer.shard_path(shard).name} for shard, record in sorted(records.items()) if record.num_rows
        ],
        # `datasets` caches by it, so it has to follow from the content.
        "_fingerprint": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_json(packer.output / "state.json", state)
    # Killed runs left these behind.
    for leftover in packer.output.glob(".partial-*"):
        leftover.unlink(missing_ok=True)
