"""
Decodes videos and images once and stores their frames, encoded, so that training waits for no video decoder.

Examples:

    vicmae pack my_videos -o stores/mine --num_proc 8
    vicmae pack my_videos -o stores/small --short_side 128 --format webp

If it was interrupted, run it again: it continues. Other commands take a store in place of a folder of videos.
docs/frame_store.md explains.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..command_line import this_command
from ..data.media.bad_files import BadFilesArguments
from ..data.preparing.packing import PackingInput, PackingSettings, PackingSummary, pack_frames
from ..data.sources.labelled import read_class_names
from ..data.sources.selection import refuse_dataset_in_data
from ..data.sources.sources import STORE_FILE, SourceSettings
from ..files import check_writable
from ..settings import REQUIRED, setting
from ..training.session.calling import start


@dataclass(kw_only=True)
class PackingArguments(PackingSettings, BadFilesArguments, SourceSettings):
    input: str = setting(REQUIRED, "folder of videos and images, list, Parquet file or dataset name")
    output: str = setting(REQUIRED, "folder to write the store to")
    labelled: bool = setting(False, "require a label for every item; folders ROOT/CLASS_NAME/FILE are classes")
    label_names: str | None = setting(None, "file of class names in index order, one per line; default: sorted")
    num_proc: int = setting(1, "processes, each writing one shard at a time", minimum=1, per_core=32)
    seconds_per_file: float = setting(600.0, "a file that takes longer counts as unreadable; 0: no limit", minimum=0)


def run(arguments: PackingArguments) -> dict[str, Any]:
    refuse_dataset_in_data(arguments.output, arguments.input)
    check_writable(Path(arguments.output) / STORE_FILE)
    class_names = None if arguments.label_names is None else read_class_names(arguments.label_names)
    rank = int(os.environ.get("RANK", 0))
    summary = pack_frames(
        PackingInput.open(arguments.input, arguments.labelled, class_names, arguments),
        arguments.output,
        arguments,
        num_proc=arguments.num_proc,
        seconds_per_file=arguments.seconds_per_file,
        max_bad_files=arguments.max_bad_files,
        # Of torchrun and accelerate launch. Ranks share nothing but the folder, so they need no process group.
        process_index=rank,
        num_processes=int(os.environ.get("WORLD_SIZE", 1)),
        command=this_command(),
    )
    if rank == 0 or summary.is_finished:
        print_summary(arguments.output, summary)
    return asdict(summary)


def print_summary(output: str, summary: PackingSummary) -> None:
    state = "finished" if summary.is_finished else f"{summary.num_missing} of them not written yet"
    failures = f"{summary.num_failures:>15,}" + (f"   {output}/bad_files.jsonl" if summary.num_failures else "")
    print(
        f"{output}: {summary.num_shards} shards, {state}\n"
        f"  videos and images {summary.num_rows:>15,}\n"
        f"  frames            {summary.num_frames:>15,}\n"
        f"  bytes             {summary.num_bytes:>15,}\n"
        f"  failures          {failures}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    start(PackingArguments, run, argv)
