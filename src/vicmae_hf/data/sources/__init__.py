"""Names to items. Takes what a user names (folder, table, frame store, dataset); gives a table of videos and images.

An item is not read yet: `open` reads it, with the decoders of `data/media`.
"""
