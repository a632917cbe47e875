"""From videos, images and datasets on disk to batches of views."""

from .samples.pairs import load_frame_pairs


__all__ = ["load_frame_pairs"]
