"""Items to tensors. Takes the items of `data/sources`; gives uint8 pairs, clips and test views, cropped and augmented.

Chooses frames by time. Reads them through `data/media`; `data/loading` says which sample comes when.
"""
