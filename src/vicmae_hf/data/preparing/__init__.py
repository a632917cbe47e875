"""Done once, before any training. Takes a dataset as it was downloaded; gives a checked table or a frame store.

Uses `data/media`, `data/sources` and, to choose frames, `data/samples`.
"""
