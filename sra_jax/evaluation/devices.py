"""One mesh of this process's devices: evaluation is data-parallel and needs no other process."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def batch_shardings() -> tuple[NamedSharding, NamedSharding]:
    """(shared, split): whole on every local device, and split over them along the first axis."""
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Appends zeros along the first axis up to `count` rows."""
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))
