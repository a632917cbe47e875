"""Small trees of datasets on the disk, and what their preparation writes."""

import csv
import hashlib
import io
import json
from pathlib import Path

import datasets
from PIL import Image


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (number, 0, 0)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write(path: Path, content: bytes | str | list | dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (list, dict)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(output: Path) -> list[tuple[str, int]]:
    table = datasets.load_from_disk(str(output))
    return list(zip(table["name"], table["label"], strict=True))


def problems(output: Path) -> set[tuple[str, str]]:
    with (output / "problems.csv").open(newline="") as file:
        return {(line["problem"], line["name"]) for line in csv.DictReader(file)}


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def hash_of(*pairs: tuple[str, str]) -> str:
    """The documented hash, from (name, class name) pairs."""
    return hashlib.sha256(b"".join(sorted(f"{name}\t{label}\n".encode() for name, label in pairs))).hexdigest()
