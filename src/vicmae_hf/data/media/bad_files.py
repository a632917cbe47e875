"""The record of files that could not be read, shared by all workers and processes of a run."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...errors import InputError, MediaDecodingError
from ...files import write_json_lines
from ...settings import Settings, setting
from .reading import TimeLimitError


logger = logging.getLogger(__name__)

Sample = TypeVar("Sample")


@dataclass(kw_only=True)
class BadFilesArguments(Settings):
    """The share of files that may be unreadable, for `BadFiles`."""

    max_bad_files: float = setting(
        0.05, "share of unreadable files that stops the run; one is allowed unless 0", minimum=0, maximum=1
    )


class BadFilesError(InputError):
    """Too many files could not be read."""


def check_bad_files(errors: Sequence[str], num_files: int, max_share: float, remedy: str) -> None:
    """
    Raises a BadFilesError, which names the first errors, if more than a share of the files are bad or no good file is
    left. One bad file is always allowed, unless the share is 0: small folders should not stop at one.
    """
    max_files = max(1, int(max_share * num_files)) if max_share > 0 else 0
    if len(errors) > max_files:
        reason = f"--max_bad_files {max_share} allows {max_files}. {remedy}"
    elif len(errors) >= num_files:
        reason = "none is left."
    else:
        return
    first = "; ".join(errors[:3])
    raise BadFilesError(f"{len(errors)} of {num_files} files could not be read, and {reason} The first: {first}")


class BadFiles:
    """
    Files that could not be read: `{"path", "error"}`, one JSON object a line of `path`, or in memory if that is None.
    Files that exceeded the time limit also have `"timed_out": true`.

    Workers append to the file and read what others have found. It is all that they share.

    Args:
        path: where to keep the record. An existing record is continued.
        num_files: how many files there are.
        max_share: the share of them that may be bad (see `check_bad_files`).
    """

    def __init__(self, path: str | os.PathLike | None, num_files: int, max_share: float):
        if not 0 <= max_share <= 1:
            raise InputError(f"max_bad_files is a share between 0 and 1, got {max_share}.")
        self.path = None if path is None else Path(path)
        self.num_files = num_files
        self.max_share = max_share
        self.errors: dict[str, str] = {}
        self.timed_out: set[str] = set()
        self.num_bytes_read = 0  # of the record: only what others add is read again
        self.update()

    def __len__(self) -> int:
        return len(self.errors)

    def has_timed_out(self, name: str) -> bool:
        """Whether a file exceeded the time limit, in any worker or process (so that no other waits as long)."""
        if self.path is not None and self.path.exists() and self.path.stat().st_size > self.num_bytes_read:
            self.update()
        return name in self.timed_out

    def read_first(self, source: str, candidates: Iterable[tuple[str, Callable[[], Sample]]]) -> Sample:
        """
        Returns the sample of the first of `candidates` that can be read, and records those before it. Only a file that
        exceeded the time limit before is not opened again.

        Otherwise the record does not decide what is read. One worker may know of a file damaged in parts while another
        does not, and both must give the same sample.

        Args:
            source: where they come from, for messages.
            candidates: the name of each file, and a function that reads a sample from it.

        Raises:
            BadFilesError: if too many files are bad, or none of the candidates can be read.
        """
        tried = set()
        for name, read in candidates:
            tried.add(name)
            if self.has_timed_out(name):
                continue
            try:
                return read()
            except MediaDecodingError as error:
                self.add(name, str(error), isinstance(error, TimeLimitError))
        raise BadFilesError(f"{source}: none of {len(tried)} files could be read, among them {min(tried)}.")

    def add(self, name: str, error: str, timed_out: bool = False) -> None:
        """Records a bad file. Raises a BadFilesError if there are now more than allowed, or no good file is left."""
        if name not in self.errors:
            self.update()
        if name not in self.errors:
            # A decoder that was given bytes does not know the name.
            self.errors[name] = error = error if name in error else f"{name}: {error}"
            if timed_out:  # kept apart, because only these files are skipped
                self.timed_out.add(name)
            logger.warning("Unreadable: %s", error)
            self._append(name)
        self.check()

    def check(self) -> None:
        """Raises a BadFilesError, which names the first bad files, if there are more than allowed."""
        remedy = "Repair or remove them, or allow more."
        check_bad_files(list(self.errors.values()), self.num_files, self.max_share, remedy)

    @contextmanager
    def errors_of_workers(self) -> Iterator[None]:
        """
        Replaces BadFilesErrors of its block by one made from the record, of a single line. An error of a worker
        arrives with the worker's traceback in its message.
        """
        try:
            yield
        except BadFilesError:
            self.update()
            self.check()
            raise

    def rewrite(self) -> None:
        """Writes the record anew, each bad file once (two workers may have met one at the same time)."""
        self.update()
        if self.path is not None and self.errors:
            lines = "".join(map(self._line, self.errors))
            self.num_bytes_read = self.path.write_bytes(lines.encode())

    def _line(self, name: str) -> str:
        entry = {"path": name, "error": self.errors[name]}
        return json.dumps(entry | ({"timed_out": True} if name in self.timed_out else {})) + "\n"

    def _append(self, name: str) -> None:
        if self.path is None:
            return
        try:
            # On another machine the output folder may be missing.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write call in append mode, so that lines of several workers do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, self._line(name).encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            # A full disk must not end a training that only lost a line of its record.
            logger.warning("%s: cannot be written (%s); the run goes on.", self.path, error)

    def update(self) -> None:
        """Reads what other processes have recorded."""
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.num_bytes_read)
            for line in file:
                # Another process is still writing it; reading on would find the rest as a line of its own.
                if not line.endswith(b"\n"):
                    break
                self.num_bytes_read += len(line)
                try:
                    entry = json.loads(line)
                    self.errors.setdefault(entry["path"], entry["error"])
                except (ValueError, KeyError, TypeError):
                    # A process that was killed while it wrote left half a line, and another went on behind it.
                    logger.warning("%s: passed over a line that is no record: %r", self.path, line[:80])
                    continue
                if entry.get("timed_out"):
                    self.timed_out.add(entry["path"])


def write_failures(path: str | os.PathLike, failures: Sequence[dict[str, str]]) -> None:
    """Writes failures, `{"path", "error"}` a line; no file if there are none."""
    Path(path).unlink(missing_ok=True)  # an older one would be taken for this run's
    if failures:
        write_json_lines(path, failures)
