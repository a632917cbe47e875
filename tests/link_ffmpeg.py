"""
Makes the FFmpeg libraries in PyAV's wheel findable for torchcodec, which brings none: a folder of links with the names
that FFmpeg gives them. So `make test` runs torchcodec without an installed FFmpeg.

    python tests/link_ffmpeg.py FOLDER
    LD_LIBRARY_PATH=FOLDER pytest

The names in the wheel have a hash, "libavcodec-5e6b81c2.so.62.28.102". Wheels for other systems than Linux have other
names; the folder then stays empty.
"""

import importlib.util
import re
import sys
from pathlib import Path


def link_libraries(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in (Path(importlib.util.find_spec("av").origin).parents[1] / "av.libs").glob("lib*.so*"):
        # FFmpeg's by the names that torchcodec asks for, and all by their own, by which they ask for each other.
        name = re.sub(r"^(lib(?:av|sw)\w+)-[0-9a-f]+(\.so\.\d+).*", r"\1\2", path.name)
        for link in {folder / name, folder / path.name}:
            link.unlink(missing_ok=True)
            link.symlink_to(path)


if __name__ == "__main__":
    link_libraries(Path(sys.argv[1]))
