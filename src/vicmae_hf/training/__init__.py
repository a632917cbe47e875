"""Shared by every training. Takes batches and a function that computes their losses; gives a trained model on disk.

Holds settings, loop, optimizer, schedule, checkpoints and log. Uses `data/loading` and `data/media`, and no model.
"""
