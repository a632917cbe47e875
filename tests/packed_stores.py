"""Packing of stores, and what is in them."""

from pathlib import Path

from video_files import read_numbers

from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.sources.sources import open_source


def pack(source, output, labelled=False, class_names=None, max_bad_files=0.05, seconds_per_file=600.0, **settings):
    return pack_frames(
        PackingInput.open(source, labelled, class_names),
        output,
        PackingSettings(**settings),
        max_bad_files=max_bad_files,
        seconds_per_file=seconds_per_file,
        command=["python", "pack_frames.py", "--input", str(source)],
    )


def store_content(folder):
    """File name -> bytes."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def rows_by_name(store):
    """Source name -> (numbers read from the frames, timestamps, duration, frames)."""
    source = open_source(store)
    rows = {}
    for index, name in enumerate(source.list_names()):
        with source[index].open("pyav") as reader:
            frames = reader.get_frames(range(reader.num_frames))
            rows[name] = (read_numbers(frames), reader.timestamps, reader.duration, frames)
    return rows
