"""
python read_videos.py FOLDER NUM_WORKERS LOG

Reads every video of a folder once, in its own process (0 workers) or through the loader of pretraining. LOG gets a
line `{"step": videos so far}` after each batch.
"""

import json
import sys
from pathlib import Path

from vicmae_hf.data.loading.loader import EpochBatchSampler, build_dataloader
from vicmae_hf.data.samples.pairs import load_frame_pairs


BATCH_SIZE = 10


def main(folder: str, num_workers: int, log: Path) -> None:
    dataset = load_frame_pairs(folder, 32, bad_files_path=log.with_name("bad_files.jsonl"))
    sampler = EpochBatchSampler(dataset.lengths, dataset.num_samples, BATCH_SIZE, num_epochs=1)
    for number, _ in enumerate(build_dataloader(dataset, sampler, num_workers, pin_memory=False), start=1):
        with log.open("a") as file:
            file.write(json.dumps({"step": number * BATCH_SIZE}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
