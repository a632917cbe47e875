"""
Run by `test_hub.py` in a process of its own: reads a frame store on the Hub, first as a stream, then as a whole.

    python tests/hub_store_worker.py NAME FOLDER

FOLDER gets `pairs.safetensors`, `frames.safetensors` and `rows.json`.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.samples.streaming import open_stream
from vicmae_hf.data.sources.sources import open_source


def stream_pairs(name) -> torch.Tensor:
    """Pairs (10, 2, 3, 16, 16) of two workers, as a run reads them that goes on after its first batch."""
    stream = load_frame_pairs(name, 16, streaming=True)
    loader = stream.dataloader(batch_size=2, num_workers=2, pin_memory=False, start_batch=1)
    return torch.cat([batch["pixel_values"] for batch in islice(loader, 5)])


def stream_rows(name) -> list[dict]:
    """All rows, shard by shard, as JSON can hold them."""
    stream = open_stream(name)
    rows = (row for shard in range(stream.num_shards) for row in stream.read(shard, 0))
    return [
        {
            "frames": [frame["bytes"].hex() for frame in row.frames.as_py()],
            "timestamps": row.timestamps.as_py(),
            "duration": row.duration.as_py(),
        }
        for row in rows
    ]


def measure_cache() -> int:
    """Bytes that the Hub's libraries have put on the disk."""
    return sum(path.lstat().st_size for path in Path(constants.HF_HOME).rglob("*") if path.is_file())


def main(name: str, folder: Path) -> None:
    found = {}
    save_file({"pairs": stream_pairs(name)}, folder / "pairs.safetensors")
    found["streamed"] = stream_rows(name)
    found["bytes cached by streaming"] = measure_cache()

    source = open_source(name)
    found["names"] = source.list_names()
    found["labels"] = [source.class_names[label] for label in source.labels]
    frames = {}
    for index, row_name in enumerate(found["names"]):
        with source[index].open("pyav") as reader:
            frames[row_name] = reader.get_frames(range(reader.num_frames)).contiguous()
    save_file(frames, folder / "frames.safetensors")
    found["bytes cached by opening"] = measure_cache()
    (folder / "rows.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
