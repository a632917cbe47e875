"""Bytes to frames. Takes video and image files, or bytes; gives uint8 frames and the times at which they are shown.

Also keeps the time limit of a file and the record of unreadable files. Uses no other folder.
"""
