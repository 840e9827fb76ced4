"""From random access examples to an endless stream of batches, the same for any number of processes."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from sra_jax.data.dataset import ExampleSource

READ_THREADS = 2
PREFETCH_BATCHES = 4


class _Batches:
    """One process's part of every global batch: rows `rows` of batch k, stacked, for k = 0, 1, ..."""

    def __init__(self, source: ExampleSource, order: grain.MapDataset, rows: Sequence[int], batch_size: int):
        self._source = source
        self._order = order
        self._rows = [int(row) for row in rows]
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._order) // self._batch_size

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        indices = [self._order[batch * self._batch_size + row] for row in self._rows]
        if hasattr(self._source, "read_batch"):
            return self._source.read_batch(indices)
        examples = [self._source[index] for index in indices]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def batches(
    source: ExampleSource, *, batch_size: int, seed: int, rows: Sequence[int], start: int = 0, workers: int = 0,
    threads: int = READ_THREADS,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start`, `start` + 1, ... of this process.

    The examples of all epochs form one sequence, each epoch a new permutation by (seed, epoch); global batch k is its
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
      An endless iterator over dicts of arrays (len(rows), ...).
    """
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    stream = grain.MapDataset.source(_Batches(source, order, rows, batch_size))[start:].to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH_BATCHES)
    )
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)
