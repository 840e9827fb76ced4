"""The devices at hand: whether there are any, which is asked before any work, and how much memory they have."""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from sra_jax.distributed.chips import CHIPS, TPU_KINDS
from sra_jax.errors import UserError


def check_devices() -> None:
    """Find this process's devices; nothing is compiled.

    Raises:
      UserError: JAX has none of the platforms that it was told to use, or one that cannot be started.
    """
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # the first where a platform is left out without a word
        asked = os.environ.get("JAX_PLATFORMS", "")
        told = f"JAX_PLATFORMS={asked}" if asked else "JAX"
        reason = (str(error).strip().splitlines() or ["there is no such device here"])[0][:200]
        raise UserError(
            f"{told} finds no device to compute on ({reason}): leave JAX_PLATFORMS out to use what is there, or "
            "install the plugin of the device, such as jax[cuda13] or jax[tpu]"
        ) from error


def memory_bytes() -> int | None:
    """Bytes that a program may use on the device that has least, of all processes; None where that is not known.

    CPUs do not say, and share the machine's memory with everything else.
    """
    sizes = [_memory_bytes(device) for device in jax.local_devices()]
    least = min(size or 0 for size in sizes)
    if jax.process_count() > 1:
        least = int(multihost_utils.process_allgather(np.asarray(least)).min())
    return least or None


def _memory_bytes(device: jax.Device) -> int | None:
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return int(limit)
    kind = TPU_KINDS.get(device.device_kind)
    return CHIPS[kind].usable_bytes if kind else None


def peak_memory_bytes() -> int | None:
    """Most bytes that one of this process's devices has held since it was started; None where they do not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((int(peak) for peak in peaks if peak), default=None)
