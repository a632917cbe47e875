"""The order of samples over a run, and batches from worker processes. Takes a dataset of samples; gives batches.

Uses no other folder.
"""
