"""Selects what is read among the files of a folder, says what is left out, and how much there is."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets

from ..media.frame_folders import group_frames, hint_at_frames
from ..media.video import warn_once
from .frame_store import FrameStoreSource
from .sources import (
    IMAGE_EXTENSIONS,
    STORE_FILE,
    STORED_TIMES,
    VIDEO_EXTENSIONS,
    DataSourceError,
    MediaSource,
    SourceSettings,
    is_saved_dataset,
)


logger = logging.getLogger(__name__)

# Folders that systems make: what was lost or deleted, thumbnails, what a Mac adds to an archive. No data of the user.
SYSTEM_FOLDERS = frozenset({"lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "__MACOSX"})
# What runs write beside arguments.json. Killed ones leave only some of it.
RUN_FILES = frozenset(
    {
        *("metrics.jsonl", "predictions.csv", "all_results.json", "config.json"),
        *("neighbours.png", "attention.png", "features.webp"),
    }
)

_counted = set()  # names of sources


def list_media(name: str, folder: Path, frame_folders: bool = False) -> tuple[list[str], list[str]]:
    """
    Lists the paths of the media files and the Parquet files below a folder; one of the two lists is empty. Raises a
    DataSourceError if there are neither, or media files beside a dataset.
    """
    files = list_files(folder)
    media = select_media(name, files, frame_folders)
    # Beside media, a metadata file describes them.
    parquet = [
        file for file in files if file.endswith(".parquet") and not (media and file.endswith("metadata.parquet"))
    ]
    marks = [file for file in files if os.path.basename(file) in (STORE_FILE, "state.json", "dataset_dict.json")]
    stored = [file for file in marks if is_saved_dataset(Path(file).parent)]
    for other in (parquet, stored):
        if media and other:
            raise DataSourceError(
                f"{name}: holds both media files ({media[0]}) and a dataset ({other[0]}); name them separately."
            )
    if not media and not parquet:
        raise DataSourceError(
            f"{name}: no videos ({' '.join(sorted(VIDEO_EXTENSIONS))}), images ({' '.join(sorted(IMAGE_EXTENSIONS))}) "
            f"or Parquet files found among its {len(files)} files."
        )
    return media, parquet


def select_media(name: str, files: list[str], frame_folders: bool) -> list[str]:
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
    if media and others:
        listed = ", ".join(f"{suffix or 'without extension'} {count:,}" for suffix, count in others.most_common())
        message = "%s: %s files were not read: %s"
        # By this module's logger, which is heard once on each machine (`SAID_IN_ALL` of session.py).
        warn_once(f"left out of {name}", message, name, f"{others.total():,}", listed, say=logger.warning)
    if frame_folders:
        return group_frames(media)
    hint_at_frames(name, media)
    return media


def tell_found(source: MediaSource | FrameStoreSource) -> None:
    """Says once for each source how many videos and images are in it."""
    if source.name in _counted:
        return
    _counted.add(source.name)
    if not isinstance(source, MediaSource):
        logger.info("%s: %s stored videos and images.", source.name, f"{len(source):,}")
        return
    count = len(source)
    if source.is_video is None:
        images = sum(os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS for path in source.table[source.column][:])
    else:
        images = 0 if source.is_video else count
    logger.info("%s: %s videos, %s images.", source.name, f"{count - images:,}", f"{images:,}")


def finish_source(source: MediaSource | FrameStoreSource, settings: SourceSettings) -> MediaSource | FrameStoreSource:
    """Applies the settings that concern items. Raises a DataSourceError if the source has none to divide."""
    source.image_options = settings.image_options()  # (a frame store, whose images are all of one kind, ignores them)
    tell_found(source)
    if settings.nominal_frames_per_second is not None and not isinstance(source, MediaSource):
        raise DataSourceError(f"{source.name}: {STORED_TIMES}")
    if settings.segment_seconds is None:
        return source
    from .segments import divide  # imported here, because few have long recordings

    if not isinstance(source, MediaSource):
        raise DataSourceError(f"{source.name}: a frame store cannot be divided; pack it with --segment_seconds.")
    return divide(source, settings.segment_seconds, getattr(settings, "seconds_per_file", 60.0))


def table_of_paths(name: str, paths: list[str]) -> datasets.Dataset:
    """Makes a table with the column `path`. Raises a DataSourceError if a path is no valid UTF-8."""
    try:
        return datasets.Dataset.from_dict(
            {"path": paths}, features=datasets.Features({"path": datasets.Value("string")})
        )
    except UnicodeEncodeError as error:
        raise DataSourceError(f"{name}: rename {error.object!r}: file names must be valid UTF-8.") from error


def list_files(folder: Path) -> list[str]:
    # Strings, because a million Path objects would take a minute to make and sort.
    files = []
    seen = {os.path.realpath(folder)}

    def is_new(path: str) -> bool:
        # A link may lead back to a folder that it is in, and the walk would never end.
        return (target := os.path.realpath(path)) not in seen and not seen.add(target)

    def fail(error: OSError) -> None:
        raise DataSourceError(f"{error.filename}: cannot be listed ({error.strerror}).") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        if is_output_folder(names):
            # Its pictures would be trained on, and a run that goes on would find other data than before.
            if root == os.fspath(folder):
                raise DataSourceError(f"{folder}: is the output folder of a run; name a folder of videos or images.")
            logger.warning("%s: left out, because it is the output folder of a run.", root)
            folders.clear()
            continue
        folders[:] = sorted(  # in place: os.walk goes down into what is left
            entry
            for entry in folders
            if not entry.startswith(".") and entry not in SYSTEM_FOLDERS and is_new(os.path.join(root, entry))
        )
        files += [os.path.join(root, entry) for entry in sorted(names) if not entry.startswith(".")]
    return files


def is_output_folder(names: Iterable[str]) -> bool:
    """Whether a folder of these files is one that a training, an evaluation, a probe or `vicmae pictures` writes."""
    return "arguments.json" in names and not RUN_FILES.isdisjoint(names)


def refuse_dataset_in_data(output: str | os.PathLike, data: str) -> None:
    """Raises a DataSourceError if a dataset written at `output` would be found in `data` (see `list_files`) later."""
    folder = Path(data).expanduser().resolve()
    place = Path(output).expanduser().resolve()
    if not folder.is_dir() or folder not in place.parents:
        return
    while place != folder:
        is_hidden = place.name.startswith(".") or place.name in SYSTEM_FOLDERS
        if is_hidden or (place.is_dir() and is_output_folder(os.listdir(place))):
            return
        place = place.parent
    raise DataSourceError(
        f"--output {output} lies in the data, {data}, which would then hold media files and a dataset. Choose a place "
        "outside."
    )
