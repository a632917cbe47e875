"""Demo data: a few hundred small videos and images that are worth learning from, drawn and encoded within a minute.

    python examples/demo_data/demo_data.py --output data/demo

Every clip shows one object in front of backdrops (see `demo_scenes.py`). What it is, an appearance, is the label under
`appearance/` and `images/`; how it moves is the label under `motion/`:

    OUTPUT/demo.json                                         the settings it was written with
    OUTPUT/appearance/{train,eval}/APPEARANCE/NNN.mp4        a few in train are .mkv, .mov, .avi, .webm
    OUTPUT/motion/{train,eval}/MOTION/NNN.mp4
    OUTPUT/images/{train,eval}/APPEARANCE/NNN.{jpg,png}

A mirrored clip moves the other way: train on the motion classes without horizontal flips.
"""

import argparse
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np
from demo_scenes import APPEARANCES, CLIP_SECONDS, MOTIONS, Scene, pick
from PIL import Image


FORMAT_VERSION = 2  # raise it when other files would be written for the same settings
APPEARANCE_VIDEOS, MOTION_VIDEOS, IMAGES = (25, 20), (25, 12), (20, 10)  # files per class, (train, eval)
FRAMES_PER_SECOND = (12, 15, 24, 25, 30)
FRAME_SIZES = ((128, 96), (128, 96), (112, 112), (96, 128), (160, 112))  # (width, height) in pixels


@dataclass(frozen=True)
class DemoFile:
    """One file to write: everything it shows follows from `seed`, the same on every machine."""

    path: str
    seed: tuple[int, ...]
    appearance: str
    motion: str

    def scene(self):
        """The scene that the file shows, and its frames per second."""
        random = np.random.default_rng(self.seed)
        width, height = pick(random, FRAME_SIZES)
        frames_per_second = int(pick(random, FRAMES_PER_SECOND))
        return Scene(random, self.appearance, self.motion, width, height), frames_per_second


def list_files(seed, appearance_videos, motion_videos, images):
    """Every file of the demo data. The counts are per class, as (train, eval); the label that doesn't name the folder
    takes turns, so that it is balanced within each class."""
    kinds = [
        ("appearance", APPEARANCES, appearance_videos),
        ("motion", MOTIONS, motion_videos),
        ("images", APPEARANCES, images),
    ]
    files = []
    for kind_number, (kind, classes, counts) in enumerate(kinds):
        for split_number, (split, count) in enumerate(zip(("train", "eval"), counts, strict=True)):
            for (class_number, label), number in product(enumerate(classes), range(count)):
                other = class_number + number
                files.append(
                    DemoFile(
                        path=f"{kind}/{split}/{label}/{number:03d}{choose_suffix(kind, split, number, other)}",
                        seed=(seed, kind_number, split_number, class_number, number),
                        appearance=list(APPEARANCES)[other % len(APPEARANCES)] if kind == "motion" else label,
                        motion=label if kind == "motion" else list(MOTIONS)[other % len(MOTIONS)],
                    )
                )
    return files


def choose_suffix(kind, split, number, other):
    """The format of a file, by its number within its class; each class begins with another of the rarer containers."""
    if kind == "images":
        return (".jpg", ".jpg", ".png")[number % 3]
    if split == "train" and number % 6 == 5:
        return (".mkv", ".mov", ".avi", ".webm")[other % 4]
    return ".mp4"


def write_video(path, scene, frames_per_second):
    # "bitexact" keeps random identifiers and dates out of the containers; one thread, because every core has a file.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        if path.suffix == ".webm":
            codec, options = "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "36", "b": "0"}
        else:
            # With its macroblock tree x264 writes other bytes from run to run, on processors with AVX-512.
            codec, options = "libx264", {"preset": "veryfast", "crf": "26", "g": "24", "x264-params": "mbtree=0"}
            # AVI has no presentation times, so its frames must be stored in the order they are shown.
            if path.suffix == ".avi":
                options["bf"] = "0"
        stream = container.add_stream(codec, rate=Fraction(frames_per_second), options=options)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(round(CLIP_SECONDS * frames_per_second)):
            frame = av.VideoFrame.from_ndarray(scene.draw(index / frames_per_second), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_file(folder, file):
    path = Path(folder, file.path)
    scene, frames_per_second = file.scene()
    if path.suffix in (".jpg", ".png"):
        Image.fromarray(scene.draw(0.0)).save(path, quality=90)
    else:
        write_video(path, scene, frames_per_second)


def write_demo_data(
    output,
    seed=0,
    appearance_videos=APPEARANCE_VIDEOS,
    motion_videos=MOTION_VIDEOS,
    images=IMAGES,
    num_workers=None,
):
    """Writes the demo data into the folder `output`, unless it is there already with the same settings.

    The folder appears under its name only when it is whole: an interruption leaves nothing there.

    Args:
        appearance_videos, motion_videos, images: files per class, as (train, eval).
        num_workers: processes that draw and encode; default one per core, 1 works in this process.

    Returns:
        bool: whether anything was written.

    Raises:
        ValueError: `output` exists and is something else, or was written with other settings.
    """
    output = Path(output).absolute()
    settings = {
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "appearance_videos": list(appearance_videos),
        "motion_videos": list(motion_videos),
        "images": list(images),
    }
    if output.exists():
        record = output / "demo.json"
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else "no demo.json"
        if found == settings:
            return False
        raise ValueError(
            f"{output} exists, but isn't the demo data asked for: expected {settings}, found {found}. "
            "Delete it, or choose another output folder."
        )
    files = list_files(seed, appearance_videos, motion_videos, images)
    num_workers = num_workers or os.cpu_count()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        unfinished = Path(temporary, output.name)
        for folder in {unfinished / Path(file.path).parent for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
        if num_workers == 1:
            for file in files:
                write_file(unfinished, file)
        else:
            with ProcessPoolExecutor(num_workers) as pool:
                list(pool.map(write_file, [unfinished] * len(files), files, chunksize=4))
        (unfinished / "demo.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(output)
    return True


def main():
    parser = argparse.ArgumentParser(description="Writes the demo videos and images, once.")
    parser.add_argument("--output", default="data/demo", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    counts = {"type": int, "nargs": 2, "help": "files per class: train, eval (default: %(default)s)"}
    parser.add_argument("--appearance_videos", default=APPEARANCE_VIDEOS, **counts)
    parser.add_argument("--motion_videos", default=MOTION_VIDEOS, **counts)
    parser.add_argument("--images", default=IMAGES, **counts)
    arguments = parser.parse_args()
    try:
        written = write_demo_data(
            arguments.output, arguments.seed, arguments.appearance_videos, arguments.motion_videos, arguments.images
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{'Wrote the demo data to' if written else 'The demo data is already in'} {arguments.output}")


if __name__ == "__main__":
    main()
