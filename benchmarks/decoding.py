"""How long the backends of `open_video` take, side by side with decord used naively.

    python benchmarks/decoding.py --videos FOLDER
    python benchmarks/decoding.py --videos FOLDER --opens 10000

Every backend decodes the same frames of the same files, in one process and one thread, taking turns. Files that one of
them cannot read are left out for all, and named. With --opens, one backend opens files so many times, reads two frames
of each, and the table shows the resident memory on the way.
"""

import argparse
import itertools
import logging
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path

import psutil
import torch

from vicmae_hf.data.media.other_decoders import BACKENDS, check_backend
from vicmae_hf.data.media.reading import EncodedItem, MediaLoader
from vicmae_hf.data.media.video import VideoDecodingError, open_video
from vicmae_hf.errors import InputError


NAIVE = "naive decord"
SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--videos", type=Path, required=True, help="folder of videos, searched at any depth")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the table shows medians")
    parser.add_argument("--max_files", type=int, default=20, help="take this many files at most")
    parser.add_argument("--opens", type=int, default=0, help="show memory over so many opens, and no times")
    parser.add_argument("--backend", choices=BACKENDS, default=MediaLoader.video_backend, help="of --opens")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of frames")
    return parser.parse_args()


def read_naively(path: str, indices: list[int] | None) -> int:
    """What most loaders do: open with decord, `get_batch`. Returns the number of frames read."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return len(reader.get_batch(range(len(reader)) if indices is None else indices).asnumpy())


def read(path: str, indices: list[int] | None, backend: str) -> int:
    if backend == NAIVE:
        return read_naively(path, indices)
    with open_video(path, backend) as video:
        return len(video.get_frames(range(video.num_frames) if indices is None else indices))


def usable_backends() -> list[str]:
    backends = [NAIVE]
    for name in BACKENDS:
        try:
            check_backend(name)
        except InputError as error:
            print(f"{name} is left out: {error}")
        else:
            backends.append(name)
    return backends


def find_videos(folder: Path, backends: list[str], max_files: int) -> dict[str, int]:
    """Paths of the videos that every backend can read, with their numbers of frames. Ends the program if none is."""
    videos = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:max_files]:
        try:
            with open_video(str(path), "pyav") as video:
                num_frames = video.num_frames
            for backend in backends:
                read(str(path), [0, num_frames - 1], backend)
        except VideoDecodingError as error:
            print(f"{path.name} is left out: {error}")
        except Exception as error:  # decord has no common base for its errors
            print(f"{path.name} is left out, decord cannot read it: {type(error).__name__}")
        else:
            videos[str(path)] = num_frames
    if not videos:
        raise SystemExit(f"no readable video in {folder}")
    return videos


def measure(videos: dict[str, int], backends: list[str], repeats: int, generator: random.Random):
    """Medians over the rounds, summed over files: seconds for opening + two frames, and for all frames."""
    pair_times, all_times = defaultdict(lambda: defaultdict(list)), defaultdict(lambda: defaultdict(list))
    for _ in range(repeats):
        for path, num_frames in videos.items():
            pair = sorted(generator.choices(range(num_frames), k=2))
            for times, indices in ((pair_times, pair), (all_times, None)):
                for backend in generator.sample(backends, len(backends)):
                    start = time.perf_counter()
                    read(path, indices, backend)
                    times[backend][path].append(time.perf_counter() - start)
    return [
        {backend: sum(map(statistics.median, times[backend].values())) for backend in backends}
        for times in (pair_times, all_times)
    ]


def print_memory(videos: dict[str, int], backend: str, num_opens: int, generator: random.Random) -> None:
    print(f"\n| opens by {backend} | resident memory | open files |\n|---|---|---|")
    process = psutil.Process()
    # As training reads files: in another thread, for the time limit.
    loader = MediaLoader(backend)
    paths = itertools.cycle(videos)
    for count in range(num_opens + 1):
        if count % max(num_opens // 5, 1) == 0:
            print(f"| {count} | {process.memory_info().rss / 2**20:.0f} MiB | {process.num_fds()} |", flush=True)
        path = next(paths)
        indices = generator.choices(range(videos[path]), k=2)
        loader.read_frames(EncodedItem(path, path, is_video=True), lambda reader, indices=indices: indices)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    logging.getLogger("vicmae_hf").setLevel(logging.ERROR)
    if arguments.opens:
        videos = find_videos(arguments.videos, [arguments.backend], arguments.max_files)
        print_memory(videos, arguments.backend, arguments.opens, random.Random(arguments.seed))
        return
    backends = usable_backends()
    videos = find_videos(arguments.videos, backends, arguments.max_files)
    pairs, whole = measure(videos, backends, arguments.repeats, random.Random(arguments.seed))
    num_frames = sum(videos.values())
    print(f"\n{len(videos)} videos, {num_frames} frames, one thread, median of {arguments.repeats} rounds\n")
    print("| backend | open + 2 random frames | against naive | all frames | against naive |")
    print("|---|---|---|---|---|")
    for backend in backends:
        print(
            f"| {backend} | {1000 * pairs[backend] / len(videos):.1f} ms | {pairs[NAIVE] / pairs[backend]:.2f}x | "
            f"{num_frames / whole[backend]:.0f} frames/s | {whole[NAIVE] / whole[backend]:.2f}x |"
        )


if __name__ == "__main__":
    main()
