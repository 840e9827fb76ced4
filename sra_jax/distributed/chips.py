"""Accelerators by their published rates: those at hand, and those that programs are compiled for without having one."""

import dataclasses
import math
import os
import re
from typing import Any

from sra_jax.errors import UserError

GIB = 2**30
RESERVED = 0.25 / 16
"""Share of a TPU's HBM that the compiler keeps to itself: it offers 15.75 GB of 16."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip (Cloud TPU documentation, system architecture page of each version).

    Attributes:
      peak_flops: bfloat16 operations a second.
      memory_bytes: HBM.
      memory_bandwidth: bytes a second from and to HBM.
      link_bandwidth: bytes a second that a chip sends over all its inter-chip links, one direction.
      cores_counted: whether accelerator names count TensorCores, of which there are two a chip (v4-8 is four chips).
      options: what libtpu needs to be told to make one device of a chip.
    """

    peak_flops: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    cores_counted: bool
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def usable_bytes(self) -> int:
        """HBM that a program may use."""
        return int(self.memory_bytes * (1 - RESERVED))


CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1228e9, 300e9, True, (("chip_config_name", "megacore"),)),
    "v5e": Chip(197e12, 16 * GIB, 819e9, 200e9, False),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 600e9, True),
    "v6e": Chip(918e12, 32 * GIB, 1640e9, 400e9, False),
}
TPU_KINDS = {
    "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}  # fmt: skip
"""JAX's names of TPU devices that are a chip each."""

PEAKS = (
    (r"TPU v2", 22.5e12), (r"TPU v3", 61.5e12),  # half a chip each: JAX shows its cores
    (r"B200", 2250e12), (r"H200", 989e12), (r"H100 PCIe", 756e12), (r"H100 NVL", 835e12), (r"GH200|H100", 989e12),
    (r"A100", 312e12), (r"A30", 165e12), (r"A10G", 70e12), (r"A10\b", 125e12), (r"L40S", 362e12), (r"L40\b", 181e12),
    (r"L4\b", 121e12), (r"RTX 4090", 165e12), (r"RTX 3090", 71e12), (r"A6000", 155e12),
)  # fmt: skip
"""Dense bfloat16 operations a second with float32 sums, by JAX's names of devices, from the makers' data sheets."""


def peak_flops(device_kind: str) -> float | None:
    """Published bfloat16 operations a second of a device by JAX's name for it; None where it is not known.

    Args:
      device_kind: such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    if device_kind in TPU_KINDS:
        return CHIPS[TPU_KINDS[device_kind]].peak_flops
    return next((peak for pattern, peak in PEAKS if re.search(pattern, device_kind)), None)


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBIC = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
"""The usual slice of so many chips, for chips linked in two and in three dimensions."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A kind of chip and how many of it are linked how."""

    kind: str
    layout: str
    count: int = 1
    """How many of such slices, which a network links and not the chips."""

    @property
    def chip(self) -> Chip:
        """One of them."""
        return CHIPS[self.kind]

    @property
    def usable_bytes(self) -> int:
        """HBM of one chip that a program may use."""
        return self.chip.usable_bytes

    @property
    def name(self) -> str:
        """Such as v5e:4x4, or 2 x v5e:16x16."""
        one = f"{self.kind}:{self.layout}"
        return one if self.count == 1 else f"{self.count} x {one}"

    @property
    def size(self) -> int:
        """Number of chips of all slices."""
        return self.count * math.prod(int(side) for side in self.layout.split("x"))


def parse_slice(text: str, count: int = 1) -> Slice:
    """`v5e:4x4` or, by the cloud's accelerator names, `v5e-16`, `v4-8` (cores); `count` of them.

    Raises:
      UserError: an unknown chip, or a number of chips that has no usual slice.
    """
    found = re.fullmatch(r"(\w+)(?::([1-9][0-9]{0,3}(?:x[1-9][0-9]{0,3})+)|-([0-9]{1,5}))", text, re.ASCII)
    if not found or found[1] not in CHIPS:
        raise UserError(
            f"--topology={text} is unknown; allowed: {', '.join(CHIPS)} with a layout such as v5e:4x4 or v4:2x2x4, or "
            "an accelerator name such as v5e-16 or v4-8"
        )
    kind, layout, number = found.groups()
    if layout:
        return Slice(kind, layout, count)
    counted = CHIPS[kind].cores_counted
    usual = CUBIC if counted else FLAT
    chips = int(number) // 2 if counted else int(number)
    if chips not in usual:
        allowed = ", ".join(f"{kind}-{n * 2 if counted else n}" for n in usual)
        raise UserError(f"--topology={text} is no usual slice: allowed {allowed}, or a layout such as {kind}:4x4")
    return Slice(kind, usual[chips], count)


def describe_devices(wanted: Slice) -> list[Any]:
    """Devices of a slice that does not exist here, for ahead-of-time compilation; needs libtpu but no TPU.

    Raises:
      UserError: libtpu is missing, or knows no such slice.
    """
    # libtpu would ask the cloud's metadata server where it is, and complain of what it does not find.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # Its lock file keeps two processes off one TPU; nothing here opens a TPU, so several may compile at a time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise UserError(install_hint()) from error
    from jax.experimental import topologies

    options = dict(wanted.chip.options)
    if wanted.count > 1:
        options["num_slices"] = wanted.count
    if wanted.size < 4:
        options["chips_per_host_bounds"] = (*map(int, wanted.layout.split("x")), 1)
    try:
        return list(topologies.get_topology_desc(f"{wanted.kind}:{wanted.layout}", platform="tpu", **options).devices)
    except Exception as error:
        raise UserError(f"--topology={wanted.name} is refused by libtpu: {str(error).splitlines()[0][:300]}") from error


def install_hint() -> str:
    """How to get the libtpu that goes with the installed JAX."""
    import importlib.metadata

    versions = [
        requirement.split(";")[0].strip()
        for requirement in importlib.metadata.requires("jax") or []
        if requirement.startswith("libtpu")
    ]
    wanted = versions[0] if versions else "libtpu"
    return (
        f"libtpu is not installed: pip install '{wanted}' (the version for JAX {importlib.metadata.version('jax')}; it "
        "needs no TPU to compile). Elsewhere set JAX_PLATFORMS=cpu so that JAX does not look for a TPU"
    )
