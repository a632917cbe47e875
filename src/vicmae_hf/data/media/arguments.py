"""Settings of scripts that read videos and images."""

from dataclasses import dataclass
from typing import Literal

from ...settings import Settings, setting


@dataclass(kw_only=True)
class DecodingArguments(Settings):
    """What decodes videos."""

    video_backend: Literal["decord", "torchcodec", "pyav"] = setting("pyav", "video decoder tried first")


@dataclass(kw_only=True)
class ReadingArguments(DecodingArguments):
    """How files are read: what a `MediaLoader` takes."""

    seconds_per_file: float = setting(
        60.0, "a file that takes longer to read counts as unreadable; 0: no limit", minimum=0
    )


@dataclass(kw_only=True)
class BadFilesArguments(Settings):
    """How many files may be unreadable: what `BadFiles` takes."""

    max_bad_files: float = setting(
        0.05, "share of unreadable files that stops the run; one is allowed unless 0", minimum=0, maximum=1
    )
