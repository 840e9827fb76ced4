"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2), blocks on the device."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.errors import UserError
from sra_jax.evaluation.devices import batch_shardings, local_multiply, pad_rows

NEIGHBOURS = 3
BLOCK = 4096


class PrecisionRecall(NamedTuple):
    """Precision, recall, and what they are means of.

    Attributes:
      precision: share of the samples inside the manifold of the reference.
      recall: share of the reference inside the manifold of the samples.
      samples_covered: (N,) bool, its mean is precision.
      reference_covered: (M,) bool, its mean is recall.
      samples_radii: (N,) float32, squared distance of each sample to its k-th neighbour among the samples.
      reference_radii: (M,) float32, the same within the reference.
    """

    precision: float
    recall: float
    samples_covered: np.ndarray
    reference_covered: np.ndarray
    samples_radii: np.ndarray
    reference_radii: np.ndarray


@jax.jit
def _squared_norms(features: jax.Array) -> jax.Array:
    return (features**2).sum(axis=1)


def _squared_distances(rows: jax.Array, row_norms: jax.Array, columns: jax.Array, column_norms: jax.Array) -> jax.Array:
    """(R,D), (R,), (C,D), (C,) -> (R,C). Norms come from outside: XLA would compute them again for every entry."""
    product = local_multiply()(rows, columns, (1, 1), jax.lax.Precision.HIGHEST, None)
    return jnp.maximum(row_norms[:, None] - 2 * product + column_norms, 0)


@jax.jit
def _keep_smallest(
    smallest: jax.Array, rows: jax.Array, row_norms: jax.Array, columns: jax.Array, column_norms: jax.Array,
    count: jax.Array | int,
) -> jax.Array:
    """Merges distances to the first `count` columns into each row's sorted list of smallest ones, (R,k) -> (R,k)."""
    distances = _squared_distances(rows, row_norms, columns, column_norms)
    distances = jnp.where(jnp.arange(len(columns)) < count, distances, jnp.inf)
    return -jax.lax.top_k(-jnp.concatenate([smallest, distances], axis=1), smallest.shape[1])[0]


@jax.jit
def _cover(
    rows: jax.Array, row_norms: jax.Array, row_radii: jax.Array, columns: jax.Array, column_norms: jax.Array,
    column_radii: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Which rows lie within the radius of any column, and which columns within that of any row: (R,), (C,) bool."""
    distances = _squared_distances(rows, row_norms, columns, column_norms)
    return (distances <= column_radii).any(axis=1), (distances <= row_radii[:, None]).any(axis=0)


def _blocks(features: np.ndarray, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(features), block):
        yield slice(start, start + block), pad_rows(features[start : start + block], block)


def _block_size(block: int, length: int) -> int:
    """`block` or less, so that blocks are about full; a multiple of the number of devices."""
    devices = jax.local_device_count()
    even = -(-length // -(-length // block))
    return -(-even // devices) * devices


def squared_radii(features: np.ndarray, *, neighbours: int = NEIGHBOURS, block: int = BLOCK) -> np.ndarray:
    """Squared distance of each vector to its k-th nearest neighbour within the set: (N,D) -> (N,), float32.

    Memory on the device is proportional to block * (D + block), whatever N is.

    Raises:
      UserError: not more than `neighbours` vectors.
    """
    if len(features) <= neighbours:
        raise UserError(
            f"precision and recall with k={neighbours} need more than {neighbours} images, got {len(features)}"
        )
    block = _block_size(block, len(features))
    shared, split = batch_shardings()
    features = np.asarray(features, np.float32)
    radii = np.empty(len(features), np.float32)
    for rows_at, rows in _blocks(features, block):
        rows = jax.device_put(rows, split)
        row_norms = _squared_norms(rows)
        # The k nearest, and the vector itself at distance zero.
        smallest = jax.device_put(np.full((block, neighbours + 1), np.inf, np.float32), split)
        for columns_at, columns in _blocks(features, block):
            count = len(features[columns_at])
            columns = jax.device_put(columns, shared)
            smallest = _keep_smallest(smallest, rows, row_norms, columns, _squared_norms(columns), count)
        radii[rows_at] = np.asarray(smallest)[: len(radii[rows_at]), -1]
    return radii


def precision_recall(
    samples: np.ndarray, reference: np.ndarray, *, neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> PrecisionRecall:
    """Precision and recall of features (N,D) against reference features (M,D).

    Squared distances in float32. Both sets are moved to the reference's mean first: distances stay, and features with
    a large mean lose no digits. (ADM's suite computes them in half precision where nothing overflows; its numbers then
    depend on the device.)

    Raises:
      UserError: not more than `neighbours` vectors in a set, or different widths.
    """
    if samples.shape[1] != reference.shape[1]:
        raise UserError(f"features of width {samples.shape[1]} and {reference.shape[1]} cannot be compared")
    centre = reference.mean(axis=0, dtype=np.float64).astype(np.float32)
    samples, reference = samples - centre, reference - centre
    radii_of = functools.partial(squared_radii, neighbours=neighbours, block=block)
    samples_radii, reference_radii = radii_of(samples), radii_of(reference)

    rows_block, columns_block = (_block_size(block, len(features)) for features in (samples, reference))
    shared, split = batch_shardings()
    samples_covered = np.zeros(len(samples), bool)
    reference_covered = np.zeros(len(reference), bool)
    for rows_at, rows in _blocks(samples, rows_block):
        rows = jax.device_put(rows, split)
        row_norms = _squared_norms(rows)
        row_radii = samples_radii[rows_at]
        # A negative radius covers nothing: rows and columns that only fill the block have no say.
        row_radii = jax.device_put(np.pad(row_radii, (0, rows_block - len(row_radii)), constant_values=-1), split)
        for columns_at, columns in _blocks(reference, columns_block):
            column_radii = reference_radii[columns_at]
            count = len(column_radii)
            column_radii = np.pad(column_radii, (0, columns_block - count), constant_values=-1)
            columns, column_radii = jax.device_put((columns, column_radii), shared)
            in_rows, in_columns = _cover(rows, row_norms, row_radii, columns, _squared_norms(columns), column_radii)
            samples_covered[rows_at] |= np.asarray(in_rows)[: len(samples_covered[rows_at])]
            reference_covered[columns_at] |= np.asarray(in_columns)[:count]
    return PrecisionRecall(
        float(samples_covered.mean()),
        float(reference_covered.mean()),
        samples_covered,
        reference_covered,
        samples_radii,
        reference_radii,
    )
