"""From random access examples to an endless stream of batches, the same for any number of processes."""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np

from sra_jax.data.dataset import ExampleSource

READ_THREADS = 2
PREFETCH_BATCHES = 4
RESTARTS = 3
"""How often lost workers are replaced before as many batches were read as there are workers."""

TO_THE_GROUP = {signal.SIGINT, signal.SIGTERM}
"""Signals that a terminal, or a scheduler, sends to all processes of a group."""


class WorkerLost(Exception):
    """Worker processes ended again and again without an error of their own, as those do that the system kills."""


@functools.lru_cache(maxsize=2)
def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch: a permutation (examples,) of 0, ..., examples - 1 that depends on all arguments alone.

    NumPy promises that RandomState, MT19937 and SeedSequence give the same numbers in all its versions.
    """
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, epoch))))
    order = random.permutation(examples)
    order.setflags(write=False)  # threads share it
    return order


class _Batches:
    """One process's part of every global batch: rows `rows` of batch k, stacked, for k = 0, 1, ..."""

    def __init__(self, source: ExampleSource, batch_size: int, seed: int, rows: Sequence[int]):
        self._source = source
        self._batch_size = batch_size
        self._seed = seed
        self._rows = np.asarray(rows, np.int64)

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size  # endless, for grain

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        epochs, indices = self._places(batch)
        if hasattr(self._source, "read_epochs"):
            return self._source.read_epochs(indices, epochs)
        if hasattr(self._source, "read_batch"):
            return self._source.read_batch(indices)
        examples = [self._source[index] for index in indices.tolist()]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def _places(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epochs and the examples of this process's rows of a global batch, which may reach over ends of epochs."""
        epochs, places = np.divmod(batch * self._batch_size + self._rows, len(self._source))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            indices[inside] = epoch_order(len(self._source), self._seed, epoch)[places[inside]]
        return epochs, indices


def non_finite(
    source: ExampleSource, *, batch_size: int, seed: int, rows: Sequence[int], batch: int, most: int = 5
) -> list[str]:
    """Names up to `most` examples in this process's rows of a global batch that hold NaN or infinite values.

    Args:
      source, batch_size, seed, rows: as `batches` takes them.
      batch: number of the batch.
      most: how many to name.
    """
    found: list[str] = []
    for index in _Batches(source, batch_size, seed, rows)._places(batch)[1].tolist():
        if len(found) < most and not all(map(_finite, source[index].values())):
            found.append(source.where(index) if hasattr(source, "where") else f"example {index}")
    return found


def _finite(values: np.ndarray) -> bool:
    return values.dtype.kind in "biu" or bool(np.isfinite(values).all())


def batches(
    source: ExampleSource, *, batch_size: int, seed: int, rows: Sequence[int], start: int = 0, workers: int = 0,
    threads: int = READ_THREADS,
) -> "grain.DatasetIterator | _WorkerStream":
    """Batches `start`, `start` + 1, ... of this process.

    The examples of all epochs form one sequence, epoch by epoch in the order of `epoch_order`; global batch k is its
    entries k * batch_size to (k + 1) * batch_size - 1. So every epoch covers every example exactly once, no example is
    dropped at its end, and neither the number of processes nor a resume changes which examples are in batch k. The
    state of the stream is the number of the next batch.

    Args:
      source: the examples. Where it has `read_batch(indices)`, which returns them stacked, batches are read with that;
        where an example is not the same in every epoch, with its `read_epochs(indices, epochs)`.
      batch_size: examples of a global batch.
      seed: of the permutations.
      rows: which rows of each global batch this process loads.
      start: number of the first batch.
      workers: processes that read ahead; 0 reads in threads of this process.
      threads: threads that read, in each process.

    Returns:
      An endless iterator over dicts of arrays (len(rows), ...); `close()` ends its threads and processes. A worker that
      is killed is replaced; `WorkerLost` is raised where that does not help.
    """
    reader = _Batches(source, batch_size, seed, rows)
    if not workers:
        return iter(_stream(reader, start, threads))
    return _WorkerStream(reader, start, threads, workers)


def _stream(reader: _Batches, start: int, threads: int) -> grain.IterDataset:
    return grain.MapDataset.source(reader)[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH_BATCHES)
    )


class _WorkerStream:
    """The stream as worker processes read it; one that the system kills is replaced."""

    def __init__(self, reader: _Batches, start: int, threads: int, workers: int):
        self._reader, self._next, self._threads, self._workers = reader, start, threads, workers
        self._lost_at: list[int] = []
        self._open()

    def _open(self) -> None:
        options = grain.MultiprocessingOptions(num_workers=self._workers)
        stream = _stream(self._reader, self._next, self._threads)
        self._stream = iter(stream.mp_prefetch(options, worker_init_fn=_begin_worker))
        # Python's exit would wait for workers that do not hear how it ends them
        self._closing = weakref.finalize(self, self._stream.close)

    def __iter__(self) -> "_WorkerStream":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while True:
            try:
                with _signals_are_for_this_process_alone():
                    batch = next(self._stream)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):  # grain's words for a worker without an error
                    raise
                self._replace()
            else:
                self._next += 1
                return batch

    def _replace(self) -> None:
        self.close()
        self._lost_at = [lost for lost in self._lost_at if lost > self._next - self._workers] + [self._next]
        how = "a worker process of data.workers was killed from outside, perhaps because memory ran out"
        if len(self._lost_at) > RESTARTS:
            raise WorkerLost(f"{how}, {len(self._lost_at)} times at batch {self._next}; fewer data.workers take less")
        print(f"{how}: reading goes on with new ones at batch {self._next}", file=sys.stderr)
        self._open()

    def close(self) -> None:
        """End the workers."""
        self._closing()


@contextlib.contextmanager
def _signals_are_for_this_process_alone() -> Iterator[None]:
    """Workers that start in the block never see the terminal's Ctrl-C nor the SIGTERM of a whole process group.

    They inherit which signals are held back; this process hears them on its other threads, and otherwise afterwards.
    """
    resource_tracker.ensure_running()  # its start, which else comes before the first worker's, lets the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(*_: Any) -> None:
    """In a worker: hear no signal of the group, and end when the process that reads is gone, however it ended."""
    for number in TO_THE_GROUP:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
