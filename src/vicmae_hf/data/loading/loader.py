"""Decides the order of samples over a run, and makes the loader that fetches them."""

import atexit
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data._utils import signal_handling

from ...errors import InputError
from .collation import BatchCollator


logger = logging.getLogger(__name__)

# (epoch, position in the epoch's order, index of the sample). A sample's random numbers depend on the first two and on
# the seed alone. So they are the same for any number of workers and processes, and after resuming.
SampleKey = tuple[int, int, int]

# An unreadable item is replaced by items drawn at random, so that no neighbour is seen twice as often. After this many
# tries nearly all must be unreadable, so all items are tried in turn.
RANDOM_REPLACEMENTS = 100
# Workers that die this often, without a batch in between and without a file that is to blame, would do so for ever.
MAX_DEATHS = 10
# What torch says of a worker that died; with pinned memory, the thread in between may find it first.
DEATHS = ("DataLoader worker", "Pin memory thread")
# A cluster sends SIGTERM or SIGUSR1 before it takes a machine away; Ctrl-C is SIGINT. (Windows has no SIGUSR1.)
STOP_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


def draw_items(key: SampleKey, num_items: int, seed: int) -> Iterator[tuple[int, np.random.Generator]]:
    """
    Yields the item of a sample with the generator of its random numbers. Then yields items that may replace it if it
    cannot be read, each with a generator of its own. It ends when every item was given.
    """
    epoch, position, index = key
    for attempt in range(RANDOM_REPLACEMENTS + num_items):
        # numpy pads a short seed with zeros, so [seed, epoch, 0, 0] would be [seed, epoch], the seed of the epoch's
        # order. 1 + attempt is never 0.
        generator = np.random.default_rng([seed, epoch, position, 1 + attempt])
        if attempt >= RANDOM_REPLACEMENTS:
            index = (index + 1) % num_items
        elif attempt > 0:
            index = int(generator.integers(num_items))
        yield index, generator


def epoch_order(
    lengths: Sequence[int], weights: Sequence[float] | None, num_samples: int, generator: np.random.Generator
) -> np.ndarray:
    """
    Draws an order of the files of all sources, numbered through: `(num_samples,)` indices.

    Without weights every file comes once before any comes again. With weights each source fills its share of the
    places, and within a source every file comes once before any comes again.
    """
    offsets = np.cumsum([0, *lengths[:-1]])
    if weights is None:
        lengths, offsets, weights = [sum(lengths)], [0], [1.0]
    ends = np.rint(np.cumsum(weights) / np.sum(weights) * num_samples).astype(int)
    counts = np.diff(ends, prepend=0)
    # The places are shuffled among the sources. Then each source fills its places, round after round of its files.
    source_of_place = generator.permutation(np.repeat(np.arange(len(lengths)), counts))
    order = np.empty(num_samples, dtype=int)
    for source, (length, offset, count) in enumerate(zip(lengths, offsets, counts, strict=True)):
        rounds = [generator.permutation(length) for _ in range(0, count, length)]
        order[source_of_place == source] = np.array(rounds, dtype=int).ravel()[:count] + offset
    return order


class EpochBatchSampler(torch.utils.data.Sampler):
    """
    Batches of `SampleKey`s of a whole run, epoch after epoch, so that the loader never pauses between epochs.

    Every epoch has `batches_per_epoch` full batches; the samples left over differ from epoch to epoch. If there are
    fewer than `batch_size * batch_multiple`, they are repeated within the epoch.

    Args:
        lengths: number of files of each source.
        num_samples: samples of an epoch.
        batch_size: samples of one batch.
        num_epochs: how many epochs to go through.
        batch_multiple: batches that one update needs over all processes; an epoch is a multiple of it.
        weights: relative share of each source; None for their sizes.
        start_batch: batches to leave out, counted from the beginning of the run: resuming costs nothing.
        seed: the order is a function of it and of the epoch.

    Raises:
        InputError: if the weights do not fit the sources.
    """

    # Accelerate expects this attribute of a batch sampler that it divides between processes.
    drop_last = True

    def __init__(
        self,
        lengths: Sequence[int],
        num_samples: int,
        batch_size: int,
        num_epochs: int,
        batch_multiple: int = 1,
        weights: Sequence[float] | None = None,
        start_batch: int = 0,
        seed: int = 0,
    ):
        if weights is not None and (len(weights) != len(lengths) or min(weights) <= 0):
            raise InputError(f"Expected one positive weight for each of {len(lengths)} sources, got {list(weights)}.")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.num_epochs = num_epochs
        self.weights = weights
        self.start_batch = start_batch
        self.seed = seed
        self.batches_per_epoch = max(num_samples // (batch_size * batch_multiple), 1) * batch_multiple

    def __len__(self) -> int:
        return max(self.batches_per_epoch * self.num_epochs - self.start_batch, 0)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        first_epoch, first_batch = divmod(self.start_batch, self.batches_per_epoch)
        for epoch in range(first_epoch, self.num_epochs):
            generator = np.random.default_rng([self.seed, epoch])  # anew: a run can resume in any epoch
            order = epoch_order(self.lengths, self.weights, self.batches_per_epoch * self.batch_size, generator)
            for batch in range(first_batch, self.batches_per_epoch):
                positions = range(batch * self.batch_size, (batch + 1) * self.batch_size)
                yield [(epoch, position, int(order[position])) for position in positions]
            first_batch = 0


def ignore_stop_signals(worker: int) -> None:
    """Leaves stopping to the process that trains (see `training.stopping`): it still needs its workers' batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def loader_settings(num_workers: int, pin_memory: bool) -> dict[str, Any]:
    """Returns the settings that all loaders of training samples share."""
    return {
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "prefetch_factor": 4 if num_workers else None,  # batches ahead; they bridge a slow file
        "collate_fn": BatchCollator(),
        "worker_init_fn": ignore_stop_signals,
        # A generator of its own: the loader draws a number at its start, and the global random state stays as it is.
        "generator": torch.Generator().manual_seed(0),
    }


def build_dataloader(
    dataset: torch.utils.data.Dataset, batch_sampler: EpochBatchSampler, num_workers: int, pin_memory: bool
) -> torch.utils.data.DataLoader:
    """Makes a loader of the samples of a dataset, in batches. Its workers live as long as the run."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batch_sampler, **loader_settings(num_workers, pin_memory)
    )


@atexit.register  # else a program that ends with an error would wait for them for ever
def end_workers() -> None:
    """Ends the workers of this process, which do not end when they are asked to (see `ignore_stop_signals`)."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def disarm_death_signal() -> None:
    """
    Keeps torch from raising the death of a worker wherever the program is, in the middle of an update. The loader
    still notices it, when it waits for the worker's batch.
    """
    # torch sets a handler only there. Windows has no such signal.
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGCHLD)
        signal_handling._set_SIGCHLD_handler()  # once a process; so no loader sets it later
        is_of_torch = getattr(before, "__module__", None) == signal_handling.__name__  # of an earlier loader
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if is_of_torch or before is None else before)


class WorkerWatch(Protocol):
    """What `SteadyBatches` needs of `BadFiles`."""

    def watch_workers(self, num_workers: int) -> None: ...

    def add_files_of_dead_workers(self) -> list[str]: ...

    def merge_sometimes(self) -> None: ...


class SteadyBatches:
    """
    The batches of a run, also when workers die (a decoder crashed, the system killed one for its memory). New workers
    go on where the last batch ended, with the same samples. A file at which workers die again is recorded, and
    replaced like one that cannot be read.

    Args:
        open_loader: number of batches to leave out -> a loader of the others.
        watch: knows what the workers read.
        num_workers: of the loaders.

    Raises:
        InputError: if workers die again and again and were reading nothing.
    """

    def __init__(self, open_loader: Callable[[int], Iterable[Any]], watch: WorkerWatch, num_workers: int):
        self.open_loader = open_loader
        self.watch = watch
        self.num_workers = num_workers

    def __iter__(self) -> Iterator[Any]:
        num_batches = num_deaths = 0
        disarm_death_signal()
        self.watch.watch_workers(self.num_workers)
        while True:
            loader = self.open_loader(num_batches)
            try:
                for batch in loader:
                    self.watch.merge_sometimes()
                    yield batch
                    num_batches, num_deaths = num_batches + 1, 0
                return
            # The last ones, if a worker died before its batch was taken out of the shared memory.
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                is_death = str(error).startswith(DEATHS) or not isinstance(error, RuntimeError)
                if not self.num_workers or not is_death or str(error).startswith("Caught"):  # inside of a worker
                    raise
                num_deaths = 0 if self.watch.add_files_of_dead_workers() else num_deaths + 1
                if num_deaths > MAX_DEATHS:
                    raise InputError(
                        f"Workers died {num_deaths} times without a batch in between ({error}). If memory is short, "
                        "use fewer --dataloader_num_workers."
                    ) from error
                logger.warning("A loading worker died. New ones go on from the last batch (%s).", error)
