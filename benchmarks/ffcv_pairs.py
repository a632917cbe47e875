"""The ffcv part of benchmarks/loading.py, which runs it with the interpreter that has ffcv.

    python benchmarks/ffcv_pairs.py FOLDER IMAGE_SIZE CROP_SCALE_MIN CROP_SCALE_MAX BATCH_SIZE QUALITY

FOLDER holds the frames of each pair, `NNNNNN_0.png` and `NNNNNN_1.png`. Writes FOLDER/pairs.beton, then answers each
line of the standard input, a number of workers, with the pairs, seconds and CPU seconds of an epoch.
"""

import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image


try:
    from ffcv.fields import RGBImageField
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
except ImportError as error:
    raise SystemExit(f"{sys.executable} has no ffcv ({error}): `make bench-ffcv` builds one that has.") from None


FIELDS = ("first", "second")
PAIRS_PER_EPOCH = 2048


class Pairs:
    """The frames of each pair as arrays (H, W, 3), uint8."""

    def __init__(self, folder: Path):
        self.paths = [sorted(folder.glob(f"*_{view}.png")) for view in (0, 1)]

    def __len__(self) -> int:
        return len(self.paths[0])

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.asarray(Image.open(paths[index])) for paths in self.paths)


def build_loader(
    file: str, num_pairs: int, num_workers: int, image_size: int, crop_scale: tuple[float, float], batch_size: int
) -> Loader:
    pipelines = {
        field: [
            RandomResizedCropRGBImageDecoder((image_size, image_size), scale=crop_scale),
            RandomHorizontalFlip(),
            ToTensor(),
            ToTorchImage(),
        ]
        for field in FIELDS
    }
    indices = np.resize(np.arange(num_pairs), PAIRS_PER_EPOCH)
    return Loader(
        file, batch_size, num_workers, os_cache=True, order=OrderOption.RANDOM, indices=indices, pipelines=pipelines
    )


def main() -> None:
    folder, image_size = Path(sys.argv[1]), int(sys.argv[2])
    crop_scale = float(sys.argv[3]), float(sys.argv[4])
    batch_size, quality = int(sys.argv[5]), int(sys.argv[6])
    pairs, file = Pairs(folder), str(folder / "pairs.beton")
    fields = {field: RGBImageField("jpg", jpeg_quality=quality) for field in FIELDS}
    DatasetWriter(file, fields, num_workers=1).from_indexed_dataset(pairs)
    loaders = {}
    for line in sys.stdin:
        num_workers = int(line)
        if num_workers not in loaders:
            loaders[num_workers] = build_loader(file, len(pairs), num_workers, image_size, crop_scale, batch_size)
            for _ in loaders[num_workers]:  # compiles
                pass
        start, cpu_start = time.perf_counter(), time.process_time()
        count = sum(len(first) for first, _ in loaders[num_workers])
        print(f"turn {count} {time.perf_counter() - start} {time.process_time() - cpu_start}", flush=True)


if __name__ == "__main__":
    main()
