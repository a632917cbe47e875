"""
Damaged and odd videos and images, drawn from a seed out of small real ones.

`KINDS` names what is wrong with them. Each kind is a function of a random generator and of the `Originals`, that
returns the suffix and the bytes of a file, or makes what is no file. The first mutant of a kind is the plain case; of
the formats that are odd but whole, those after it are damaged as well.
"""

import io
import re
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image
from video_files import numbered_frames, write_video


CLASS_NAMES = ["ant", "bee", "cow"]
NUM_FRAMES, HEIGHT, WIDTH = 12, 48, 64

File = tuple[str, bytes]  # suffix and content


@dataclass(frozen=True)
class Originals:
    """Whole files in common formats."""

    videos: list[File]
    images: list[File]


@dataclass(frozen=True)
class Mutant:
    kind: str
    path: Path


def encode_video(suffix: str, codec: str, num_frames: int = NUM_FRAMES, height: int = HEIGHT, **settings) -> File:
    # The same bytes every time: no random numbers in containers, and x264 without the code in assembler, which reads
    # over the edges of pictures.
    settings["container_options"] = {"fflags": "bitexact", **settings.get("container_options", {})}
    encoder = {"x264-params": "no-asm=1"} if codec == "libx264" else {}
    settings["options"] = {"g": "4", **encoder, **settings.get("options", {})}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"video{suffix}")
        write_video(path, numbered_frames(num_frames, height, WIDTH), codec=codec, **settings)
        return suffix, path.read_bytes()


def encode_image(suffix: str, mode: str = "RGB", num_frames: int = 1, **settings) -> File:
    pictures = [Image.fromarray(frame).convert(mode) for frame in numbered_frames(num_frames, HEIGHT, WIDTH)]
    if num_frames > 1:
        settings |= {"save_all": True, "append_images": pictures[1:]}
    output = io.BytesIO()
    pictures[0].save(output, Image.registered_extensions()[suffix], **settings)
    return suffix, output.getvalue()


def make_originals() -> Originals:
    return Originals(
        videos=[
            encode_video(".mp4", "libx264"),
            encode_video(".mov", "libx264", container_options={"movflags": "faststart"}),
            encode_video(".m4v", "libx264", container_options={"movflags": "frag_keyframe+empty_moov"}),
            encode_video(".mkv", "libx264"),
            encode_video(".ts", "libx264"),
            encode_video(".mp4", "libx265", options={"x265-params": "log-level=none"}),
            encode_video(".webm", "libvpx"),
            encode_video(".webm", "libvpx-vp9"),
            encode_video(".mkv", "libsvtav1", height=64, options={"preset": "11"}),
            encode_video(".avi", "mpeg4"),
            encode_video(".avi", "mjpeg", pix_fmt="yuvj420p"),
            encode_video(".mpg", "mpeg2video"),
            encode_video(".mpeg", "mpeg1video"),
            encode_video(".flv", "flv"),
            encode_video(".wmv", "wmv2"),
        ],
        images=[
            encode_image(".jpg"),
            encode_image(".jpeg", progressive=True),
            encode_image(".jpg", "L"),
            encode_image(".png"),
            encode_image(".webp"),
            encode_image(".webp", lossless=True),
            encode_image(".bmp"),
            encode_image(".gif"),
            encode_image(".tif"),
            encode_image(".tiff", compression="tiff_lzw"),
            encode_image(".tiff", compression="jpeg"),
            encode_image(".ppm"),
        ],
    )


# What may happen to bytes: (generator, bytes, bytes of another file) -> bytes.


def draw_span(rng: np.random.Generator, data: bytes) -> tuple[int, int]:
    first, last = sorted(rng.integers(0, len(data) + 1, size=2).tolist())
    return first, last


def truncate(rng, data: bytes, other: bytes) -> bytes:
    return data[: rng.integers(1, len(data))]


def flip_bits(rng, data: bytes, first: int, last: int) -> bytes:
    changed = np.frombuffer(data, dtype=np.uint8).copy()
    for place in rng.integers(first, last, size=rng.integers(1, 9)):
        changed[place] ^= 1 << rng.integers(8)
    return changed.tobytes()


def flip_head(rng, data: bytes, other: bytes) -> bytes:
    return flip_bits(rng, data, 0, min(200, len(data)))


def flip_body(rng, data: bytes, other: bytes) -> bytes:
    return flip_bits(rng, data, len(data) // 5, 4 * len(data) // 5)


def flip_tail(rng, data: bytes, other: bytes) -> bytes:
    return flip_bits(rng, data, 9 * len(data) // 10, len(data))


def zero(rng, data: bytes, other: bytes) -> bytes:
    first, last = draw_span(rng, data)
    return data[:first] + bytes(last - first) + data[last:]


def splice(rng, data: bytes, other: bytes) -> bytes:
    return data[: rng.integers(1, len(data))] + other[rng.integers(0, len(other)) :]


def duplicate_part(rng, data: bytes, other: bytes) -> bytes:
    first, last = draw_span(rng, data)
    return data[:last] + data[first:]


def duplicate_all(rng, data: bytes, other: bytes) -> bytes:
    return data + data


DAMAGES = [truncate, flip_head, flip_body, flip_tail, zero, splice, duplicate_part, duplicate_all]


def draw(rng: np.random.Generator, files: list[File]) -> File:
    return files[rng.integers(len(files))]


def damaged(group: str, damage: Callable) -> Callable[[np.random.Generator, Originals], File]:
    def make(rng: np.random.Generator, originals: Originals) -> File:
        suffix, data = draw(rng, getattr(originals, group))
        return suffix, damage(rng, data, draw(rng, originals.videos + originals.images)[1])

    return make


# Files that are not what their names say.


def random_bytes(rng, originals: Originals) -> File:
    suffix, data = draw(rng, originals.videos + originals.images)
    return suffix, rng.bytes(len(data))


def web_page(rng, originals: Originals) -> File:
    """As a download that failed leaves it."""
    suffix, _ = draw(rng, originals.videos + originals.images)
    return suffix, b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body></body></html>\n"


def renamed(named: str, content: str) -> Callable[[np.random.Generator, Originals], File]:
    def make(rng: np.random.Generator, originals: Originals) -> File:
        return draw(rng, getattr(originals, named))[0], draw(rng, getattr(originals, content))[1]

    return make


def empty(rng, originals: Originals) -> File:
    return draw(rng, originals.videos + originals.images)[0], b""


def no_video_stream(rng, originals: Originals) -> File:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "sound.mp4")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return ".mp4", path.read_bytes()


# Headers that promise other sizes than there are, and small files that unpack to large ones.


ABSURD_SIZES = [(65535, 65535), (0, 0), (1, 65535), (16383, 16383), (4000, 4000)]  # width, height


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def black_png(width: int, height: int) -> bytes:
    """Of one bit a pixel."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((-(-width // 8) + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def absurd_image_size(rng, originals: Originals) -> File:
    width, height = draw(rng, ABSURD_SIZES)
    suffixes = (".png", ".bmp", ".gif", ".jpg", ".ppm")
    suffix, data = draw(rng, [file for file in originals.images if file[0] in suffixes])
    if suffix == ".png":
        header = struct.pack(">II", width, height) + data[24:29]
        return suffix, data[:8] + png_chunk(b"IHDR", header) + data[33:]
    if suffix == ".bmp":
        return suffix, data[:18] + struct.pack("<II", width, height) + data[26:]
    if suffix == ".gif":
        return suffix, data[:6] + struct.pack("<HH", width, height) + data[10:]
    if suffix == ".jpg":
        place = data.index(b"\xff\xc0") + 5  # behind marker, length and precision
        return suffix, data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]
    return suffix, data.replace(b"64 48", b"%d %d" % (width, height), 1)


def absurd_video_size(rng, originals: Originals) -> File:
    width, height = draw(rng, ABSURD_SIZES)
    # Where the header of an H.264 sample entry, a VP8 keyframe, an AVI's format and an MPEG sequence say the size.
    name, offset, size = [
        (b"avc1", 28, struct.pack(">HH", width, height)),
        (b"\x9d\x01\x2a", 3, struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)),
        (b"strf", 12, struct.pack("<II", width, height)),
        (b"\0\0\1\xb3", 4, ((width & 0xFFF) << 12 | height & 0xFFF).to_bytes(3)),
    ][rng.integers(4)]
    suffix, data = draw(rng, [file for file in originals.videos if name in file[1]])
    pieces = data.split(name)
    place = offset - len(name)
    changed = [piece[:place] + size + piece[place + len(size) :] for piece in pieces[1:]]
    return suffix, name.join([pieces[0], *changed])


def image_bomb(rng, originals: Originals) -> File:
    # Pillow refuses the first size and warns of the second.
    width = (20000, 9500)[rng.integers(2)]
    return ".png", black_png(width, width)


def video_bomb(rng, originals: Originals) -> File:
    width = (16000, 4000)[rng.integers(2)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bomb.mov")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=Fraction(30))
            stream.width = stream.height = width
            stream.pix_fmt = "monob"
            data = black_png(width, width)
            for index in range(NUM_FRAMES):
                packet = av.Packet(data)
                packet.stream, packet.time_base = stream, Fraction(1, 30)
                packet.pts = packet.dts = index
                packet.is_keyframe = True
                container.mux(packet)
        return ".mov", path.read_bytes()


# Formats that are odd, but whole.


def exif_image(rng, originals: Originals) -> File:
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(0, 10))  # orientation; 0 and 9 mean nothing
    return encode_image((".jpg", ".png", ".webp", ".tif")[rng.integers(4)], exif=exif)


def sound_and_size_change(rng, originals: Originals) -> File:
    """Two recordings in one stream, the second one larger."""
    return ".ts", encode_video(".ts", "libx264")[1] + encode_video(".ts", "libx264", height=96)[1]


ODD_FORMATS = {
    "10 bit": lambda rng, originals: encode_video(".mkv", "libx264", pix_fmt="yuv420p10le"),
    "full chroma": lambda rng, originals: encode_video(".mp4", "libx264", pix_fmt="yuv444p"),
    "one frame": lambda rng, originals: encode_video(".mp4", "libx264", num_frames=1),
    "variable rate": lambda rng, originals: encode_video(
        ".mkv", "libx264", timestamps=np.cumsum(rng.uniform(0.01, 3, NUM_FRAMES))
    ),
    "rotated video": lambda rng, originals: encode_video(".mp4", "libx264", rotation=90),
    "size changes": sound_and_size_change,
    "CMYK": lambda rng, originals: encode_image((".jpg", ".tif")[rng.integers(2)], "CMYK"),
    "palette": lambda rng, originals: encode_image((".png", ".bmp", ".tif")[rng.integers(3)], "P"),
    "alpha": lambda rng, originals: encode_image((".png", ".webp", ".tif")[rng.integers(3)], "RGBA"),
    "16 bit": lambda rng, originals: encode_image((".png", ".tif")[rng.integers(2)], "I;16"),
    "float": lambda rng, originals: encode_image(".tif", "F"),
    "EXIF": exif_image,
    "animated": lambda rng, originals: encode_image((".gif", ".webp", ".png")[rng.integers(3)], num_frames=4),
}

FILES = {
    **{f"video {damage.__name__}": damaged("videos", damage) for damage in DAMAGES},
    **{f"image {damage.__name__}": damaged("images", damage) for damage in DAMAGES},
    "random bytes": random_bytes,
    "web page": web_page,
    "image named as video": renamed("videos", "images"),
    "video named as image": renamed("images", "videos"),
    "video of other container": renamed("videos", "videos"),
    "image of other format": renamed("images", "images"),
    "empty": empty,
    "no video stream": no_video_stream,
    "absurd image size": absurd_image_size,
    "absurd video size": absurd_video_size,
    "image bomb": image_bomb,
    "video bomb": video_bomb,
    **ODD_FORMATS,
}


# What is no file, or none that may be read: they make something at a path without suffix, and return it.


def make_folder(path: Path) -> Path:
    path = path.with_suffix(".mp4")
    path.mkdir()
    return path


def make_broken_link(path: Path) -> Path:
    path = path.with_suffix(".mp4")
    path.symlink_to("gone.mp4")
    return path


def make_circular_link(path: Path) -> Path:
    path = path.with_suffix(".jpg")
    path.symlink_to(path.name)
    return path


def make_unreadable(path: Path) -> Path:
    path = path.with_suffix(".png")
    path.write_bytes(encode_image(".png")[1])
    path.chmod(0)
    return path


NO_FILES = {
    "folder named .mp4": make_folder,
    "broken link": make_broken_link,
    "circular link": make_circular_link,
    "no permission": make_unreadable,
}

KINDS = [*FILES, *NO_FILES]


def write_mutants(folder: Path, count: int, seed: int = 0) -> list[Mutant]:
    """Writes mutants to `folder/CLASS_NAME`, all kinds in turn; the same ones for the same count and seed."""
    originals = make_originals()
    mutants = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        path = folder / CLASS_NAMES[number % len(CLASS_NAMES)] / f"{number:04d}_{re.sub('[^A-Za-z0-9]', '_', kind)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, number])
        if kind in NO_FILES:
            path = NO_FILES[kind](path)
        else:
            suffix, data = FILES[kind](rng, originals)
            if kind in ODD_FORMATS and number >= len(KINDS):
                damage = DAMAGES[rng.integers(len(DAMAGES))]
                data = damage(rng, data, draw(rng, originals.videos)[1])
            path = path.with_suffix(suffix)
            path.write_bytes(data)
        mutants.append(Mutant(kind, path))
    return mutants
