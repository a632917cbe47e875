"""The record of files that could not be read, shared by all workers and processes of a run."""

import json
import logging
import multiprocessing
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch

from ...errors import InputError, MediaDecodingError
from ...files import write_json_lines
from ...settings import Settings, setting
from .reading import DamagedPlaceError, TimeLimitError
from .video import warn_once


logger = logging.getLogger(__name__)

Sample = TypeVar("Sample")

RETRY_SECONDS = 1800.0  # until a file that took too long is opened again
MERGE_SECONDS = 30.0  # between two records made of those of all processes
MAX_PLACES = 4  # of a damaged file that are tried before it counts as bad
UPDATE_SECONDS = 5.0  # between two looks at what other processes have recorded
OPENED_BYTES = 4096  # of the longest path on Linux; a longer name is cut


@dataclass(kw_only=True)
class BadFilesArguments(Settings):
    """The share of files that may be unreadable, for `BadFiles`."""

    max_bad_files: float = setting(
        0.05, "largest share of files that may be unreadable; one always may, unless this is 0", minimum=0, maximum=1
    )


class BadFilesError(InputError):
    """Too many files could not be read."""


def allowed_bad_files(num_files: int, max_share: float) -> int:
    return max(1, int(max_share * num_files)) if max_share > 0 else 0


def check_bad_files(errors: Sequence[str], num_files: int, max_share: float, remedy: str) -> None:
    """
    Raises a BadFilesError, which names the first errors, if more than a share of the files are bad or no good file is
    left. One bad file is always allowed, unless the share is 0: small folders should not stop at one.
    """
    max_files = allowed_bad_files(num_files, max_share)
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
    Files that exceeded the time limit, or at which workers died, also have `"transient": true`: the cause may be a
    stalled disk or a full memory, so they are tried again `RETRY_SECONDS` later, and by a run that goes on.

    While a run lasts, each of its processes and workers writes a record of its own into the folder `bad_files` beside
    `path`, and reads those of the others. It is all that they share. `merge` makes one record of them.

    Args:
        path: where to keep the record. An existing record is continued, without files that were changed since.
        num_files: how many files there are.
        max_share: the share of them that may be bad (see `check_bad_files`).

    Attributes:
        opened: for each worker of a loader, its process and the file that it is reading; None where there are none.
    """

    def __init__(self, path: str | os.PathLike | None, num_files: int, max_share: float):
        if not 0 <= max_share <= 1:
            raise InputError(f"max_bad_files is a share between 0 and 1, got {max_share}.")
        self.path = None if path is None else Path(path)
        self.num_files = num_files
        self.max_share = max_share
        self.errors: dict[str, str] = {}
        self.retry_times: dict[str, float] = {}  # of transient ones, in seconds since 1970
        self.times: dict[str, float] = {}  # of the newest entry about a file
        self.positions: dict[Path, int] = {}  # how far each record was read: only what others add is read again
        self.last_update = self.last_merge = 0.0
        self.merged: list[dict[str, Any]] | None = None  # what the record holds
        self.opened: torch.Tensor | None = None
        self.suspects: set[str] = set()  # files that were open when a worker died
        if self.path is not None:
            self._read(self.path)
        self.update()
        for name in list(self.errors):  # of an earlier run
            if name in self.retry_times or self._was_changed(name):
                del self.errors[name]
        self.retry_times.clear()

    def __len__(self) -> int:
        return len(self.errors)

    @property
    def parts(self) -> Path:
        """The folder of the records of single processes."""
        return self.path.with_suffix("")

    def finish(self) -> None:
        """Merges the records, and removes those of single processes. Called once nobody reads any more."""
        self.merge()
        if self.path is not None:
            shutil.rmtree(self.parts, ignore_errors=True)
            # What is read later, for a picture, begins them anew.
            self.positions = {record: position for record, position in self.positions.items() if record == self.path}

    def must_wait(self, name: str) -> bool:
        """Whether a file is to be left alone for now, as found in any worker or process (no other waits as long)."""
        if self.path is not None and time.time() > self.last_update + UPDATE_SECONDS:
            self.update()
        return time.time() < self.retry_times.get(name, 0.0)

    def read_first(self, source: str, candidates: Iterable[tuple[str, Callable[[], Sample]]]) -> Sample:
        """
        Returns the sample of the first of `candidates` that can be read, and records those before it. Only a file that
        exceeded the time limit before, or killed workers, is not opened again.

        Otherwise the record does not decide what is read. One worker may know of a file damaged in parts while another
        does not, and both must give the same sample. Such a file is bad only if several places of it are damaged.

        Args:
            source: where they come from, for messages.
            candidates: the name of each file, and a function that reads a sample from it.

        Raises:
            BadFilesError: if too many files are bad, or none of the candidates can be read.
        """
        tried = set()
        for name, read in candidates:
            tried.add(name)
            if self.must_wait(name):
                continue
            self.note_opened(name)
            try:
                sample = read_elsewhere(name, read)
            except MediaDecodingError as error:
                self.add(name, str(error), isinstance(error, TimeLimitError))
                continue
            self.note_opened("")
            if name in self.retry_times:
                self.forget(name)
            return sample
        raise BadFilesError(f"{source}: none of {len(tried)} files could be read, among them {min(tried)}.")

    def watch_workers(self, num_workers: int) -> None:
        """Makes room for `opened`. Called before the workers start."""
        from ..loading.shared_memory import share_with_workers  # only workers need it

        self.opened = share_with_workers(torch.zeros(num_workers, OPENED_BYTES, dtype=torch.uint8))

    def note_opened(self, name: str) -> None:
        """Notes which file this worker reads, where the training process finds it if the worker dies."""
        worker = torch.utils.data.get_worker_info()
        if worker is None or self.opened is None:
            return
        text = f"{os.getpid()} {name}".encode(errors="surrogateescape")[:OPENED_BYTES] if name else b""
        self.opened[worker.id].numpy()[:] = np.frombuffer(text.ljust(OPENED_BYTES, b"\0"), dtype=np.uint8)

    def add_files_of_dead_workers(self) -> list[str]:
        """
        Records the files that workers were reading when they died, and returns their names. The first death at a file
        is only reported, as memory may have been short. Its sample then stays the same.
        """
        multiprocessing.active_children()  # collects those that ended; else a dead one still has its number
        texts = [bytes(row).rstrip(b"\0").decode(errors="surrogateescape") for row in self.opened.numpy()]
        notes = [text.split(" ", 1) for text in texts if text]
        names = [name for process, name in notes if not psutil.pid_exists(int(process))]
        recorded = [name for name in names if name in self.suspects]
        for name in names:
            logger.warning("A worker died while it was reading %s.", name)
        for name in recorded:
            self.add(name, "workers that were reading it died", is_transient=True)
        self.suspects.update(names)
        self.opened.zero_()  # the workers start anew
        return recorded

    def add(self, name: str, error: str, is_transient: bool = False) -> None:
        """Records a bad file. Raises a BadFilesError if there are now more than allowed, or no good file is left."""
        if name not in self.errors:
            self.update()
        if name not in self.errors or is_transient:
            # A decoder that was given bytes does not know the name.
            error = error if name in error else f"{name}: {error}"
            logger.warning("Unreadable: %s", error)
            self._record(make_entry(name, error, is_transient))
            self.merge()
        self.check()

    def forget(self, name: str) -> None:
        """Takes a transient file out of the record, because it was read after all."""
        self._record({"path": name, "error": None})

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
            self.merge()
            self.check()
            raise
        finally:  # also of a run that is stopped
            self.merge()

    def merge_sometimes(self) -> None:
        """Merges the records, if the last time is `MERGE_SECONDS` ago."""
        if time.time() > self.last_merge + MERGE_SECONDS:
            self.merge()

    def merge(self) -> None:
        """Writes one record of those of all processes, each bad file once. Only the main process writes."""
        self.update()
        self.last_merge = time.time()
        if self.path is None or not (self.errors or self.path.exists()):
            return
        if torch.utils.data.get_worker_info() is not None or os.environ.get("RANK", "0") != "0":
            return
        entries = [make_entry(name, error, name in self.retry_times) for name, error in self.errors.items()]
        if entries == self.merged:
            return
        try:
            write_json_lines(self.path, entries)
            self.merged = entries
        except InputError as error:
            # A full disk must not end a training that only lost its record.
            logger.warning("%s; the run goes on.", error)

    def update(self) -> None:
        """Reads what other processes have recorded."""
        self.last_update = time.time()
        if self.path is not None:
            for part in sorted(self.parts.glob("*.jsonl")):
                self._read(part)

    def _record(self, entry: dict[str, Any]) -> None:
        entry["time"] = time.time()
        self._take(entry)
        if self.path is None:
            return
        part = self.parts / f"{platform.node()}-{os.getpid()}.jsonl"
        try:
            # On another machine the output folder may be missing.
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            # A full disk must not end a training that only lost a line of its record.
            logger.warning("%s: cannot be written (%s); the run goes on.", part, error)

    def _was_changed(self, name: str) -> bool:
        """Whether a file was replaced or changed since the records were written, as one that is repaired."""
        records = [record.stat().st_mtime for record in self.positions if record.exists()]
        # Not every name is a path, and that of a part has its times behind it. A copied file may keep its time of
        # change, but not that of its entry in the folder.
        path = name if os.path.exists(name) else name.rpartition(" [")[0]
        status = os.stat(path) if records and os.path.exists(path) else None
        # On Windows, st_ctime is the time at which the file was made.
        return status is not None and max(status.st_ctime, status.st_mtime) > max(records)

    def _read(self, record: Path) -> None:
        """Reads the lines of a record that are new."""
        try:
            with record.open("rb") as file:
                file.seek(self.positions.get(record, 0))
                for line in file:
                    # Another process is still writing it; reading on would find the rest as a line of its own.
                    if not line.endswith(b"\n"):
                        break
                    self.positions[record] = self.positions.get(record, 0) + len(line)
                    try:
                        self._take(json.loads(line))
                    except (ValueError, KeyError, TypeError):
                        # A process that was killed while it wrote left half a line, and another went on behind it.
                        logger.warning("%s: skipped a line that is no record: %r", record, line[:80])
        except (FileNotFoundError, NotADirectoryError):
            pass  # no record yet
        except OSError as error:
            logger.warning("%s: cannot be read (%s); the run goes on without it.", record, error)

    def _take(self, entry: dict[str, Any]) -> None:
        name, error, now = entry["path"], entry["error"], entry.get("time", 0.0)
        if not isinstance(name, str) or not isinstance(error, str | None):
            raise TypeError(f"expected texts, got {entry}")
        if now < self.times.get(name, 0.0):
            return  # records are read one after the other, and this entry is older than what another one said
        self.times[name] = now
        if error is None:
            self.errors.pop(name, None)
            self.retry_times.pop(name, None)
            return
        self.errors.setdefault(name, error)
        if entry.get("transient"):
            self.retry_times[name] = time.time() + RETRY_SECONDS


def read_elsewhere(name: str, read: Callable[[], Sample]) -> Sample:
    """Calls `read`, which draws a place in a file, until it meets no damage. Raises its error after `MAX_PLACES`."""
    for _ in range(MAX_PLACES - 1):
        try:
            return read()
        except DamagedPlaceError as error:
            warn_once(name, "%s is damaged in places, and its other frames are used (%s).", name, error)
    return read()


def make_entry(name: str, error: str, is_transient: bool) -> dict[str, Any]:
    """Makes an entry of a record (see `BadFiles`)."""
    return {"path": name, "error": error} | ({"transient": True} if is_transient else {})
