"""What a pair of frames of a long recording costs: time, bytes read, memory.

    python benchmarks/long_videos.py --videos FOLDER --hours 3

Makes recordings by repeating the packets of the first H.264 clip of the folder, without encoding, in MP4, Matroska and
MPEG-TS. Draws pairs of them as in pretraining, and, beside it, by the index of the whole file, as for clips. Each
figure is of a process of its own, so that memory is its own. The first pair is not counted: it imports and warms up.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import psutil

from vicmae_hf.data import load_frame_pairs
from vicmae_hf.data.media import video


CONTAINERS = ("mp4", "mkv", "ts")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--videos", type=Path, required=True, help="folder with an H.264 clip in MP4")
    parser.add_argument("--hours", type=float, default=3.0, help="length of the recordings")
    parser.add_argument("--pairs", type=int, default=20, help="pairs that are drawn of each; the table shows medians")
    parser.add_argument("--measure", type=Path, help="only measure this recording (what the script calls itself with)")
    parser.add_argument("--whole", action="store_true", help="with --measure: by the index of the whole file")
    return parser.parse_args()


def is_h264(path: Path) -> bool:
    with av.open(str(path)) as container:
        return container.streams.video[0].codec_context.name == "h264"


def repeat_packets(source: Path, target: Path, hours: float) -> int:
    """Writes a recording, and returns its number of frames."""
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        stream = given.streams.video[0]
        copied = made.add_stream_from_template(stream)
        packets = [packet for packet in given.demux(stream) if packet.size]
        duration = int(Fraction(len(packets)) / stream.average_rate / stream.time_base)
        repetitions = int(hours * 3600 * stream.average_rate / len(packets))
        for repetition in range(repetitions):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.is_keyframe = copied, stream.time_base, packet.is_keyframe
                copy.pts, copy.dts = (time + repetition * duration for time in (packet.pts, packet.dts))
                copy.duration = packet.duration
                made.mux(copy)
        return repetitions * len(packets)


def count_bytes_read() -> int:
    return psutil.Process().io_counters().read_chars


def measure(path: Path, num_pairs: int, whole: bool) -> None:
    """Prints the milliseconds, MiB read and MiB of memory of a pair."""
    if whole:
        video.LONG_SECONDS = float("inf")
    dataset = load_frame_pairs(path)
    load_frame_pairs(Path(__file__).parents[1] / "docs" / "images" / "demo_losses.png")[0]  # imports what it needs
    memory, read, seconds = psutil.Process().memory_info().rss, [], []
    for epoch in range(num_pairs):
        before, start = count_bytes_read(), time.perf_counter()
        dataset[epoch, 0, 0]
        seconds.append(time.perf_counter() - start)
        read.append(count_bytes_read() - before)
    growth = psutil.Process().memory_info().rss - memory
    print(statistics.median(seconds[1:]) * 1e3, statistics.median(read[1:]) / 2**20, growth / 2**20)


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        measure(arguments.measure, arguments.pairs, arguments.whole)
        return
    clip = next((path for path in sorted(arguments.videos.rglob("*.mp4")) if is_h264(path)), None)
    if clip is None:
        raise SystemExit(f"no H.264 clip in MP4 in {arguments.videos}")
    print(
        f"| {arguments.hours:g} h of {clip.name} | frames | MB | read | ms a pair | MiB read a pair | MiB of memory |"
    )
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for container in CONTAINERS:
            path = Path(folder, f"recording.{container}")
            num_frames = repeat_packets(clip, path, arguments.hours)
            for how, flags in (("in parts", []), ("as a whole", ["--whole"])):
                command = [sys.executable, __file__, "--videos", folder, "--pairs", str(arguments.pairs)]
                output = subprocess.check_output([*command, "--measure", path, *flags], text=True)
                milliseconds, read, memory = map(float, output.split())
                print(
                    f"| {container} | {num_frames} | {path.stat().st_size / 1e6:.0f} | {how} | {milliseconds:.1f} | "
                    f"{read:.2f} | {memory:.1f} |",
                    flush=True,
                )
            path.unlink()


if __name__ == "__main__":
    main()
