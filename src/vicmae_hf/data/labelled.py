"""Labelled folders, and the frames of a file that an evaluation looks at."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .images import read_image
from .sources import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from .video import open_video


@dataclass(frozen=True)
class LabelledFiles:
    """Files with the indices of their classes; `class_names[labels[i]]` is the class of `paths[i]`."""

    paths: list[str]
    labels: list[int]
    class_names: list[str]


def list_labelled_files(folder: str | os.PathLike, class_names: Sequence[str] | None = None) -> LabelledFiles:
    """
    Videos and images of `folder/CLASS_NAME/FILE`. Class indices follow sorted names, or `class_names` if given (those
    of the training data, for an evaluation folder).

    Raises:
        InputError: if the folder does not exist, holds no such files, or has a class that `class_names` lacks.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; expected FOLDER/CLASS_NAME/FILE.")
    extensions = VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
    found = {
        path.name: sorted(
            str(file) for file in path.iterdir() if file.suffix.lower() in extensions and not file.name.startswith(".")
        )
        for path in sorted(root.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    found = {name: files for name, files in found.items() if files}
    if not found:
        raise InputError(f"{folder}: no videos or images found; expected FOLDER/CLASS_NAME/FILE.")
    names = list(found) if class_names is None else list(class_names)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise InputError(f"{folder}: classes that the training data lacks: {', '.join(unknown)}.")
    pairs = [(path, names.index(name)) for name, files in found.items() for path in files]
    return LabelledFiles([path for path, _ in pairs], [label for _, label in pairs], names)


def read_frames(path: str, num_frames: int, video_backend: str = "decord") -> torch.Tensor:
    """
    The middle frames of `num_frames` equal parts of a video, uint8 `(num_frames, 3, H, W)`; an image is one frame.

    Raises:
        VideoDecodingError, ImageDecodingError: if the file cannot be read.
    """
    if Path(path).suffix.lower() in IMAGE_EXTENSIONS:
        return read_image(path).unsqueeze(0)
    with open_video(path, video_backend) as video:
        middles = (np.arange(num_frames) + 0.5) / num_frames
        return video.get_frames((middles * video.num_frames).astype(int))
