"""
Checks a dataset against its official list, and writes a table of it: `vicmae prepare`.

    python examples/pytorch/prepare_dataset.py \
        --dataset kinetics400 --root /data/k400 --split val --output tables/k400_val
    python examples/pytorch/pack_frames.py --input tables/k400_val --output stores/k400_val

docs/datasets.md explains.
"""

from vicmae_command import run


if __name__ == "__main__":
    run("prepare")
