"""From random access examples to an endless stream of batches, the same for any number of processes."""

import functools
import sys
from collections.abc import Sequence

import grain
import numpy as np

from sra_jax.data.dataset import ExampleSource

READ_THREADS = 2
PREFETCH_BATCHES = 4


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
        indices = self._indices(batch)
        if hasattr(self._source, "read_batch"):
            return self._source.read_batch(indices)
        examples = [self._source[index] for index in indices.tolist()]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def _indices(self, batch: int) -> np.ndarray:
        """The examples in this process's rows of a global batch, which may reach over ends of epochs."""
        epochs, places = np.divmod(batch * self._batch_size + self._rows, len(self._source))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            indices[inside] = epoch_order(len(self._source), self._seed, epoch)[places[inside]]
        return indices


def non_finite(
    source: ExampleSource, *, batch_size: int, seed: int, rows: Sequence[int], batch: int, most: int = 5
) -> list[str]:
    """Names up to `most` examples in this process's rows of a global batch that hold NaN or infinite values.

    Args:
      source, batch_size, seed, rows: as `batches` takes them.
      batch: number of the batch.
      most: how many to name.
    """
    found = []
    for index in _Batches(source, batch_size, seed, rows)._indices(batch).tolist():
        if len(found) < most and not all(map(_finite, source[index].values())):
            found.append(source.where(index) if hasattr(source, "where") else f"example {index}")
    return found


def _finite(values: np.ndarray) -> bool:
    return values.dtype.kind in "biu" or bool(np.isfinite(values).all())


def batches(
    source: ExampleSource, *, batch_size: int, seed: int, rows: Sequence[int], start: int = 0, workers: int = 0,
    threads: int = READ_THREADS,
) -> grain.DatasetIterator:
    """Batches `start`, `start` + 1, ... of this process.

    The examples of all epochs form one sequence, epoch by epoch in the order of `epoch_order`; global batch k is its
    entries k * batch_size to (k + 1) * batch_size - 1. So every epoch covers every example exactly once, no example is
    dropped at its end, and neither the number of processes nor a resume changes which examples are in batch k. The
    state of the stream is the number of the next batch.

    Args:
      source: the examples. Where it has `read_batch(indices)`, which returns them stacked, batches are read with that.
      batch_size: examples of a global batch.
      seed: of the permutations.
      rows: which rows of each global batch this process loads.
      start: number of the first batch.
      workers: processes that read ahead; 0 reads in threads of this process.
      threads: threads that read, in each process.

    Returns:
      An endless iterator over dicts of arrays (len(rows), ...); `close()` ends its threads and processes.
    """
    stream = grain.MapDataset.source(_Batches(source, batch_size, seed, rows))[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH_BATCHES)
    )
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)
