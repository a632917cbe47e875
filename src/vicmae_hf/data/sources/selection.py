"""Selects what is read among the files of a folder, and says what is left out."""

import logging
import os
from collections import Counter

from ..media.frame_folders import group_frames, hint_at_frames
from .sources import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


logger = logging.getLogger(__name__)

_told = set()  # names of sources


def select_media(name: str, files: list[str], frame_folders: bool = False) -> list[str]:
    """
    Returns the videos and images among `files`, with `frame_folders` the folders in the place of images. Says once for
    each source how many files are left out.
    """
    extensions = VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
    media, others = [], Counter()
    for file in files:
        suffix = os.path.splitext(file)[1].lower()
        if suffix in extensions:
            media.append(file)
        elif not os.path.basename(file).startswith("metadata."):  # such a file describes the media beside it
            others[suffix] += 1
    if media and others and name not in _told:
        _told.add(name)
        listed = ", ".join(f"{suffix or 'without extension'} {count:,}" for suffix, count in others.most_common())
        logger.warning("%s: %s files were not read: %s", name, f"{others.total():,}", listed)
    if frame_folders:
        return group_frames(media)
    hint_at_frames(name, media)
    return media
