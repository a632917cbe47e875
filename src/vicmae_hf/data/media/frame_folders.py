"""Folders of numbered frames (VIDEO/000001.jpg, VIDEO/img_00001.png) as videos."""

import itertools
import logging
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ...errors import InputError
from .images import IMAGE_EXTENSIONS, ImageDecodingError, ImageOptions, MediaReader, check_indices, read_image
from .video import warn_once


logger = logging.getLogger(__name__)

NUMBERED = re.compile(r"(.*?)(\d+)\.[^.]+", re.DOTALL)  # what comes before the number, and the number


class FrameFolderReader(MediaReader):
    """
    The images of a folder as the frames of a video (see `MediaReader`), in the order of their numbers: frame_2 comes
    before frame_10. They follow each other at `frames_per_second`, also where numbers are left out. Only frames that
    are asked for are read.
    """

    def __init__(self, folder: str, options: ImageOptions):
        self.folder = folder
        self.options = options
        try:
            self.names = sort_frames(folder, list_images(folder))
        except (OSError, InputError) as error:
            raise ImageDecodingError(f"{folder}: {error}") from error
        if not self.names:
            raise ImageDecodingError(f"{folder}: has no frames")
        self.num_frames = len(self.names)
        self.timestamps = np.arange(self.num_frames) / options.frames_per_second
        self.duration = self.num_frames / options.frames_per_second

    def close(self) -> None:
        """Nothing stays open."""

    def get_frames(self, indices: Iterable[int]) -> torch.Tensor:
        """
        Frames at `indices` (see `MediaReader`). Raises an ImageDecodingError if one cannot be read, or if they differ
        in size.
        """
        indices = check_indices(indices, self.num_frames, self.folder)
        paths = {index: os.path.join(self.folder, self.names[index]) for index in indices}
        frames = {index: read_image(path, self.options).permute(1, 2, 0) for index, path in paths.items()}
        first = frames[indices[0]]
        for index, frame in frames.items():
            if frame.shape != first.shape:
                height, width, _ = frame.shape
                raise ImageDecodingError(
                    f"{paths[index]}: {width}x{height} pixels, other frames of its folder have "
                    f"{first.shape[1]}x{first.shape[0]}"
                )
        return torch.stack([frames[index] for index in indices]).permute(0, 3, 1, 2)  # channels last in memory


def group_frames(media: Sequence[str]) -> list[str]:
    """
    Puts the folder in the place of the images that are in it. Videos stay. Takes paths in order, and keeps it.

    Raises:
        InputError: if an image has no number, or its number twice in a folder, or if frames of one folder have several
            names.
    """
    folders = {}
    for path in filter(is_image, media):
        folders.setdefault(os.path.dirname(path), []).append(os.path.basename(path))
    for folder, names in folders.items():
        sort_frames(folder, names)
    return list(dict.fromkeys(os.path.dirname(path) if is_image(path) else path for path in media))


def hint_at_frames(name: str, media: Sequence[str]) -> None:
    """Says once for a source if the first folder of images in it looks as if it held the frames of a video."""
    if not media:
        return
    folder = os.path.dirname(media[0])
    # Files of a folder follow each other. (To look at all of a million would take seconds.)
    together = itertools.takewhile(lambda path: os.path.dirname(path) == folder, media)
    names = [os.path.basename(path) for path in together if is_image(path)]
    numbers = [int(match[2]) for match in map(NUMBERED.fullmatch, names) if match]
    if len(names) >= 8 and len(numbers) == len(names) == max(numbers) - min(numbers) + 1:
        warn_once(
            f"frames in {name}",
            "%s: each image counts as an item. If folders like %s hold the frames of a video, give --frame_folders.",
            *(name, folder),
            say=logger.info,  # most folders of numbered images are just that
        )


def is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS


def list_images(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if is_image(name) and not name.startswith(".")]


def sort_frames(folder: str, names: Sequence[str]) -> list[str]:
    """Sorts file names by the numbers at their ends. Raises an InputError as `group_frames`."""
    numbers, prefixes = {}, {}
    for name in sorted(names):
        match = NUMBERED.fullmatch(name)
        if match is None:
            raise InputError(
                f"{os.path.join(folder, name)}: has no number before its extension. With --frame_folders every image "
                "is a frame of its folder's video: move other images elsewhere."
            )
        prefixes.setdefault(match[1], name)
        if len(prefixes) > 1:
            first, second = prefixes.values()
            raise InputError(f"{folder}: has frames of several names, {first} and {second}. Move one kind elsewhere.")
        other = numbers.setdefault(int(match[2]), name)
        if other != name:
            raise InputError(f"{folder}: has two frames of one number, {other} and {name}. Move one elsewhere.")
    return [numbers[number] for number in sorted(numbers)]


def folder_size(folder: str) -> int:
    """Counts the bytes of the frames in a folder."""
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if is_image(entry.name))
