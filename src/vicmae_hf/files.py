"""Writes files: whole or not at all, as text, JSON, JSON lines and CSV. Says in one line why one cannot be written."""

import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import InputError


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an error of writing to a file or folder into an InputError that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else " ".join(str(error).split())
        raise InputError(
            f"{path}: cannot be written ({reason}); expected a place with free space, and the right to write there."
        ) from error


def check_writable(path: str | os.PathLike) -> None:
    """Raises an InputError if no file or folder can be made at `path`. For the start of a script; leaves nothing."""
    whole = Path(path).absolute()
    place = next(folder for folder in whole.parents if os.path.lexists(folder))
    longest = max(whole.relative_to(place).parts, key=len)
    with writing(path):
        trial = partial_path(place / longest)
        try:
            trial.write_bytes(bytes(4096))  # something: a full disk still takes empty files
        finally:
            trial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    # In the name of this process, because several runs may write the same file.
    return path.with_name(f".partial-{platform.node()}-{os.getpid()}-{path.name}")


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to. The file appears as `path` only when it is whole and on disk; else an InputError."""
    partial = partial_path(path)
    with writing(path):
        try:
            yield partial
            with partial.open("r+b") as file:
                os.fsync(file.fileno())  # else, after a power failure, the name may stand for an empty file
            os.replace(partial, path)
        except FileNotFoundError:
            # Another run that finished the same store removes what it takes for leftovers. Then the file is there.
            if not path.exists():
                raise
        finally:
            partial.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a text file that is whole or absent. Raises an InputError if it cannot be written."""
    with partial_file(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes `content`, indented, as a file that is whole or absent."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON object. Raises an InputError if the file cannot be read, or holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def write_json_lines(path: str | os.PathLike, entries: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line, as a file that is whole or absent."""
    write_whole(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def write_csv(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table with a line of column names, as a file that is whole or absent."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_whole(path, text.getvalue())
