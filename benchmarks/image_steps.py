"""What the steps from an encoded frame to a view cost, and what else was tried for each.

    python benchmarks/image_steps.py --videos FOLDER

Frames of the videos as a frame store has them (short side 256 at most, JPEG), one thread. The ways of a step take
turns; the table shows medians over the rounds, and how far their pixels are from Pillow's.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from decoding import find_videos
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.preparing.store_rows import PackingSettings, encode_frame


VIEW = (224, 224)
SHARE = 0.87  # of height and width: three quarters of the area, the mean of crops in [0.5, 1]
LAST = {"memory_format": torch.channels_last}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos, searched at any depth")
    parser.add_argument("--num_frames", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9, help="the table shows medians")
    return parser.parse_args()


def encoded_frames(folder: Path, num_frames: int) -> list[bytes]:
    paths = list(find_videos(folder, ["pyav"], max_files=20))
    frames = []
    for path in paths:
        with open_video(path) as video:
            indices = np.linspace(0, video.num_frames - 1, num_frames // len(paths)).astype(int)
            frames += [encode_frame(frame, PackingSettings()) for frame in video.get_frames(indices)]
    return frames


def to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


DECODERS = {
    "Pillow": lambda data: to_array(Image.open(io.BytesIO(data))),
    "simplejpeg": simplejpeg.decode_jpeg,
    "simplejpeg, fast DCT": lambda data: simplejpeg.decode_jpeg(data, fastdct=True),
    "simplejpeg, fast upsampling": lambda data: simplejpeg.decode_jpeg(data, fastupsample=True),
    "torchvision decode_jpeg": lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)),
}


def whole_region(frame: torch.Tensor, box: list[int], **memory) -> torch.Tensor:
    top, left, height, width = box
    return frame[None, :, top : top + height, left : left + width].contiguous(**memory)


def pillow_view(frame: torch.Tensor, box: list[int]) -> np.ndarray:
    top, left, height, width = box
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    return to_array(image.crop((left, top, left + width, top + height)).resize(VIEW, Image.Resampling.BICUBIC))


def torch_view(mode: str, **memory) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    return lambda frame, box: interpolate(whole_region(frame, box, **memory), VIEW, mode=mode, antialias=True)[0]


RESIZERS = {
    "Pillow bicubic": pillow_view,
    "torch bicubic, channels last": torch_view("bicubic", **LAST),
    "torch bicubic, contiguous": torch_view("bicubic"),
    "torch bilinear, channels last": torch_view("bilinear", **LAST),
    "torchvision resized_crop": lambda frame, box: F.resized_crop(
        frame, *box, list(VIEW), interpolation=InterpolationMode.BICUBIC, antialias=True
    ),
}


def as_pixels(outcome: np.ndarray | torch.Tensor) -> np.ndarray:
    """(H, W, 3), int."""
    pixels = outcome if isinstance(outcome, np.ndarray) else outcome.permute(1, 2, 0).numpy()
    return pixels.astype(int)


def compare(title: str, ways: dict[str, Callable], inputs: list[tuple], rounds: int) -> None:
    """Prints a table; the first way is the reference."""
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            for entry in inputs:
                way(*entry)
            seconds[name].append((time.perf_counter() - start) / len(inputs))
    reference, *_ = ways.values()
    truth = [as_pixels(reference(*entry)) for entry in inputs]
    print(f"\n| {title} | us per frame | from Pillow: mean, largest |\n|---|---|---|")
    for name, way in ways.items():
        differences = [np.abs(as_pixels(way(*entry)) - true) for entry, true in zip(inputs, truth, strict=True)]
        mean, largest = np.mean([entry.mean() for entry in differences]), max(entry.max() for entry in differences)
        print(f"| {name} | {1e6 * statistics.median(seconds[name]):.0f} | {mean:.2f}, {largest} |")


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    encoded = encoded_frames(arguments.videos, arguments.num_frames)
    frames = [torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1) for data in encoded]
    boxes = [
        [round((1 - SHARE) / 2 * height), round((1 - SHARE) / 2 * width), round(SHARE * height), round(SHARE * width)]
        for _, height, width in (frame.shape for frame in frames)
    ]
    print(f"{len(frames)} frames of {arguments.videos}, median of {arguments.rounds} rounds")
    compare("decoding", DECODERS, [(data,) for data in encoded], arguments.rounds)
    compare(
        f"crop of {SHARE**2:.0%}, resized to 224 x 224",
        RESIZERS,
        list(zip(frames, boxes, strict=True)),
        arguments.rounds,
    )


if __name__ == "__main__":
    main()
