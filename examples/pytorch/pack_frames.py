"""
Decodes videos and images once, and stores their frames encoded: `vicmae pack`.

    python examples/pytorch/pack_frames.py --input data/videos --output data/store --num_proc 8
    torchrun --nproc_per_node 8 examples/pytorch/pack_frames.py --input data/videos --output data/store

docs/frame_store.md explains.
"""

from vicmae_command import run


if __name__ == "__main__":
    run("pack")
