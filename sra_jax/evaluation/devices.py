"""One mesh of this process's devices: evaluation is data-parallel and needs no other process."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sra_jax.distributed import sharding
from sra_jax.models import operations


def batch_shardings() -> tuple[NamedSharding, NamedSharding]:
    """(shared, split): whole on every local device, and split over them along the first axis."""
    mesh = _local_mesh()
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def local_multiply() -> operations.Multiply:
    """What multiplies matrices in float32 on the local devices: the compiler, or a BLAS where that is quicker."""
    return sharding.multiply_on(_local_mesh())


def _local_mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("data",))


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Appends zeros along the first axis up to `count` rows."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))
