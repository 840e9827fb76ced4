"""The checksums of checkpoints: every flipped bit is seen, and no layout or device changes them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sra_jax.runs import checksums

pytestmark = pytest.mark.fast

SHAPES = [(), (1,), (5,), (8, 6), (8, 3, 4), (2, 8, 2, 4)]
DTYPES = [np.float32, np.int32, np.int8, np.bool_, ml_dtypes.bfloat16, np.float64, np.uint64]


def array(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * 100).astype(dtype)


def value(x):
    return checksums.arrays({"x": x})[0]["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_the_sum(dtype):
    original = array((3, 4), dtype)
    expected = value(original)
    for byte in range(original.nbytes):
        for bit in range(1 if dtype is np.bool_ else 8):
            damaged = original.copy()
            damaged.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
            assert value(damaged) != expected, (byte, bit)


def test_every_exchange_of_two_entries_changes_the_sum():
    original = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    swapped = set()
    for i in range(24):
        for j in range(i):
            other = original.copy().reshape(-1)
            other[[i, j]] = other[[j, i]]
            swapped.add(value(other.reshape(original.shape)))
    assert len(swapped) == 24 * 23 // 2
    assert value(original) not in swapped


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES[:5])
def test_accelerators_and_this_machine_agree(shape, dtype):
    """The jitted sum of other devices, run here, part by part."""
    x = array(shape, dtype)
    total, finite = checksums._measure_there(x, np.zeros(len(shape), np.uint32), shape)
    assert int(total) == value(x)
    assert finite
    if shape and shape[0] == 8:
        parts = [checksums._measure_there(x[i : i + 4], np.array([i] + [0] * (len(shape) - 1), np.uint32), shape)[0]
                 for i in (0, 4)]  # fmt: skip
        assert sum(map(int, parts)) % 2**32 == value(x)


@pytest.mark.parametrize("split", [P(), P("a"), P("a", "b"), P(None, "b"), P(("a", "b"))])
def test_no_layout_changes_the_sum(split):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = array((8, 4, 3))
    assert value(jax.device_put(x, NamedSharding(mesh, split))) == value(x)


def test_what_is_not_finite_is_named():
    tree = {"fine": jnp.ones(3), "counts": jnp.arange(3), "bad": [jnp.array([1.0, np.nan]), jnp.float32(-np.inf)]}
    assert checksums.arrays(tree)[1] == ["bad/0", "bad/1"]


def test_differences_and_data():
    assert checksums.differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": 3}) == ["b", "d"]
    assert checksums.data({"b": 0.1, "a": [1]}) == checksums.data({"a": [1], "b": 0.1}) != checksums.data({"a": [2]})
