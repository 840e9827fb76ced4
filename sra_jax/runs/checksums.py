"""Checksums of a checkpoint's arrays: whether what is read is what was computed.

The files that hold arrays have no checksum that reading checks, and one flipped bit in them gives other numbers, not an
error. So a sum is taken of the arrays themselves before they are written and again after they are read. It does not
depend on how an array is split: a run may go on with other devices or processes.
"""

import functools
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sra_jax.distributed.sharding import path_name

Sums = dict[str, int]


def arrays(tree: Any) -> tuple[Sums, list[str]]:
    """The checksum of every array of a tree, and the arrays that hold a NaN or an infinity.

    The checksum is sum_i w_i b_i mod 2^32, b_i being the bits of entry i and w_i an odd number that depends on its
    place. An array that differs in one entry has another sum for certain, one that differs in many almost certainly.

    Args:
      tree: of arrays, laid out in any way over the devices of any number of processes, all of which call this.

    Returns:
      Path -> sum in [0, 2^32), and the paths of arrays that are not finite.
    """
    names, measured = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names.append(path_name(path))
        measured.append([_measure(part, start, np.shape(leaf)) for part, start in _parts(leaf)])
    totals = np.array(
        [[sum(int(total) for total, _ in parts) % 2**32, sum(not finite for _, finite in parts)] for parts in
         jax.device_get(measured)], np.uint32,
    ).reshape(-1, 2)  # fmt: skip
    if jax.process_count() > 1:
        totals = np.asarray(multihost_utils.process_allgather(totals)).sum(0, dtype=np.uint32)
    sums = {name: int(total) for name, total in zip(names, totals[:, 0], strict=True)}
    return sums, [name for name, infinite in zip(names, totals[:, 1], strict=True) if infinite]


def _parts(leaf: Any) -> list[tuple[Any, tuple[int, ...]]]:
    """The parts of an array that lie here, each of its entries once over all processes, and where each part begins."""
    if not isinstance(leaf, jax.Array):
        return [(np.asarray(leaf), (0,) * np.ndim(leaf))]
    return [
        (shard.data, tuple(axis.start or 0 for axis in shard.index))
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _measure(part: Any, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Sum and finiteness of a part: by NumPy where it lies in this machine's memory, which compiles nothing."""
    if isinstance(part, jax.Array) and next(iter(part.devices())).platform != "cpu":
        return _measure_there(part, np.asarray(start, np.uint32), shape)
    array = np.ascontiguousarray(part).reshape(np.shape(part) or (1,))  # "ascontiguous" alone makes scalars vectors too
    width = min(array.dtype.itemsize, 4)
    bits = array.view(f"uint{8 * width}").astype(np.uint32, copy=False)
    rows, columns = _weights(np, bits.shape, start, shape, array.dtype.itemsize)
    total = np.sum(np.einsum("rc,c->r", bits.reshape(-1, bits.shape[-1]), columns) * rows, dtype=np.uint32)
    return total, not jnp.issubdtype(array.dtype, jnp.inexact) or bool(np.isfinite(array).all())


@functools.partial(jax.jit, static_argnums=2)
def _measure_there(part: jax.Array, start: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    array = part.reshape(part.shape or (1,))
    width = min(array.dtype.itemsize, 4)
    whole = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    bits = jax.lax.bitcast_convert_type(whole, f"uint{8 * width}").astype(jnp.uint32)
    bits = bits.reshape(*array.shape[:-1], -1)  # 64 bits become two entries
    rows, columns = _weights(jnp, bits.shape, start, shape, array.dtype.itemsize)
    total = jnp.sum((bits.reshape(-1, bits.shape[-1]) * columns).sum(-1, dtype=jnp.uint32) * rows, dtype=jnp.uint32)
    finite = jnp.isfinite(array).all() if jnp.issubdtype(array.dtype, jnp.inexact) else jnp.array(True)
    return total, finite


def _weights(numpy: Any, part: tuple[int, ...], start: Any, shape: tuple[int, ...], itemsize: int) -> tuple[Any, Any]:
    """Odd numbers for the rows (all axes but the last) and columns of a part; w is their product.

    Args:
      numpy: NumPy or JAX's.
      part: shape of the part's bits.
      start: where it begins in the whole array, one number an axis.
      shape: of the whole array.
      itemsize: bytes of an entry, of which four make a column.
    """
    row = numpy.zeros((1,) * len(part[:-1]), numpy.uint32)
    for axis, length in enumerate(part[:-1]):
        along = numpy.arange(length, dtype=numpy.uint32) + numpy.asarray(start[axis], numpy.uint32)
        along = along.reshape([-1 if a == axis else 1 for a in range(len(part) - 1)])
        row = row * np.uint32(shape[axis] % 2**32) + along
    first = numpy.asarray(start[-1], numpy.uint32) * np.uint32(max(itemsize // 4, 1)) if shape else np.uint32(0)
    column = numpy.arange(part[-1], dtype=numpy.uint32) + first
    return _odd(row.reshape(-1), 0x9E3779B9), _odd(column, 0x85EBCA6B)


def _odd(place: Any, factor: int) -> Any:
    mixed = place * np.uint32(factor)
    return (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0xC2B2AE35) | np.uint32(1)


def data(values: Mapping[str, Any]) -> int:
    """The checksum of JSON data: of what it is read back as, however it is spaced."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def differences(saved: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """The paths among those found whose sums differ from the saved ones, or were not saved."""
    return [name for name in sorted(found) if saved.get(name) != found[name]]
