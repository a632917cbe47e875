"""Takes videos, images and datasets on disk; gives batches of views.

A frame passes `sources` (which files), `media` (decoding), `samples` (views) and `loading` (batches), in this order.
"""

from .samples.pairs import load_frame_pairs


__all__ = ["load_frame_pairs"]
