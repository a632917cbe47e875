"""Finds the files and folders that lists name."""

import logging
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ..media.bad_files import BadFilesArguments, BadFilesError, check_bad_files
from .sources import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, SourceSettings


logger = logging.getLogger(__name__)

SEPARATOR = re.compile(r"[\s,;]+")
MAX_DEPTH = 100  # of folders that are listed one after the other
NUMBERS_AT_END = re.compile(r"([\s,;]+-?\d+)+$")


def find_files(
    path: Path,
    root: Path,
    numbers: Sequence[int],
    written: list[Any],
    settings: SourceSettings,
    fate: str = "count as unreadable",
) -> list[str]:
    """
    Finds the files of a list, with `--frame_folders` also folders. A warning counts those that are missing, and
    says their fate.

    Args:
        path: of the list; root: folder that the paths begin in.
        numbers: line numbers; written: what is in each line as a path.

    Raises:
        InputError: if more are missing than may be unreadable (`--max_bad_files`), or some are no videos or images.
    """
    folders = Folders()
    found, missing, others = [], [], []
    has_folder = False
    for number, entry in zip(numbers, written, strict=True):
        if not isinstance(entry, str) or not entry:
            raise InputError(f"{path}, line {number}: expected a path, got {entry!r}.")
        file = folders.find(os.path.join(root, entry))
        if file is None:
            missing.append(f"{entry if len(entry) < 500 else entry[:500] + '...'} (line {number})")
        elif not (
            os.path.splitext(file)[1].lower() in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
            or (settings.frame_folders and os.path.isdir(file))
        ):
            others.append(f"{entry} (line {number})")
            has_folder |= os.path.isdir(file)
        found.append(file or os.path.join(root, entry))
    if missing:
        message = f"{path}: {len(missing):,} of {len(written):,} files are missing, the first: {missing[0]}."
        # Scripts that train and pack have the setting. The others go by the same share.
        share = getattr(settings, "max_bad_files", BadFilesArguments.max_bad_files)
        remedy = f"Paths are relative to {root}; name another folder with --data_root."
        try:
            check_bad_files(missing, len(written), share, remedy)
        except BadFilesError as error:
            raise InputError(f"{message} --max_bad_files {share} allows fewer. {remedy}") from error
        logger.warning("%s They %s. %s", message, fate, remedy)
    if others:
        hint = " If folders hold the frames of videos, give --frame_folders." if has_folder else ""
        raise InputError(
            f"{path}: {len(others):,} of {len(written):,} files are not videos or images, first: {others[0]}.{hint}"
        )
    return found


def take_frame_counts(
    path: Path, root: Path, numbers: Sequence[int], written: Sequence[str], labels: Sequence[str]
) -> tuple[list[str], list[str]]:
    """
    Divides the lines of a list of frame folders into paths and labels anew (empty where nothing follows): only the
    folders that are there tell where a path ends, and lists of mmaction2 have the number of frames between the two.
    Frames are counted in the folder; the number is passed over, and a warning says so.

    Raises:
        InputError: if that number is 0: there are lists with the number of the first frame in its place.
    """
    folders = Folders()
    paths, rests, counts = [], [], []
    for media, label in zip(written, labels, strict=True):
        line = f"{media} {label}"
        ends = [*(match.start() for match in SEPARATOR.finditer(line)), len(line)]
        end = next((end for end in reversed(ends) if folders.find(os.path.join(root, line[:end]))), None)
        if end is None:  # a folder that is missing
            end = match.start() if (match := NUMBERS_AT_END.search(line)) else len(media)
        paths.append(line[:end])
        rests.append(SEPARATOR.sub("", line[end:], count=1))
        if os.path.splitext(line[:end])[1].lower() not in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS:
            counts.append(re.match(r"\d+[\s,;]+-?\d", rests[-1]))
    if not counts or not all(counts):
        return paths, rests
    for row, (number, rest) in enumerate(zip(numbers, rests, strict=True)):
        count, *label = SEPARATOR.split(rest, maxsplit=1)
        if count == "0" and label != ["-1"]:
            raise InputError(f"{path}, line {number}: expected `folder frames label`, got 0 frames in {rest!r}.")
        rests[row] = label[0] if label else count  # a video has no number of frames
    logger.warning("%s: the first number of a line is taken as the number of frames, and is not used.", path)
    return paths, rests


class Folders:
    """
    The names in folders, each listed once: a list has a million files, and to ask a network drive for each takes
    minutes. Names match in both forms that Unicode has for letters with marks.
    """

    def __init__(self):
        # A folder -> its path as the disk has it, and its names in the composed form -> as they are.
        self.listings: dict[str, tuple[str, dict[str, str]]] = {}

    def find(self, path: str) -> str | None:
        """Returns the path of a file or folder as the disk has it; None if there is none."""
        if path.count(os.sep) > MAX_DEPTH:
            return path if os.path.exists(path) else None
        folder, name = os.path.split(path)
        if folder not in self.listings:
            self.listings[folder] = self.list(folder)
        actual, names = self.listings[folder]
        found = names.get(unicodedata.normalize("NFC", name))
        if found is not None and found != name and not os.path.exists(path):  # both forms may be there, as two files
            return os.path.join(actual, found)
        # Some file systems know a name by others, for example in small letters.
        return path if found is not None or os.path.exists(path) else None

    def list(self, folder: str) -> tuple[str, dict[str, str]]:
        actual = folder or "."
        if not os.path.isdir(actual):  # its parents may have it in the other form
            actual = self.find(folder) if os.path.dirname(folder) != folder else None
        if actual is None or not os.path.isdir(actual):
            return folder, {}
        try:
            names = os.listdir(actual)
        except OSError:  # a folder that may be entered but not listed
            names = []
        return actual, {unicodedata.normalize("NFC", name): name for name in names}
