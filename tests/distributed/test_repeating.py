"""Where GPUs are to repeat every bit, a step of cuDNN's attention is compiled as a loop."""

import numpy as np
import pytest

from sra_jax.distributed import sharding

EXCLUDE = "--xla_gpu_exclude_nondeterministic_ops"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", False), ("--xla_dump_to=F", False), (f"{EXCLUDE}=true", True), (EXCLUDE, True), (f"{EXCLUDE}=1", True),
        (f"--xla_dump_to=F  {EXCLUDE}=True", True), ("--xla_gpu_deterministic_ops=true", True),
        (f"{EXCLUDE}=false", False), (f"{EXCLUDE}=0 --xla_gpu_deterministic_ops=false", False),
        (f"{EXCLUDE}=true {EXCLUDE}=false", False), (f"{EXCLUDE}=false {EXCLUDE}=true", True),
    ],
)  # fmt: skip
def test_flags_that_ask_for_the_same_bits(flags, expected):
    assert sharding.must_repeat(flags) == expected


def stand_in(platform, shape):
    """What is asked of a mesh, for devices that are not here."""
    class Device:
        client = type("Client", (), {"platform_version": "cuda"})()
        compute_capability = "9.0"

    Device.platform = platform
    return type("Mesh", (), {"shape": {"data": 1, "fsdp": 1, "model": 1} | shape, "devices": np.asarray([Device()])})()


@pytest.mark.parametrize(
    ("platform", "shape", "name", "flags", "expected"),
    [
        ("gpu", {}, "cudnn", "", True), ("gpu", {}, "cudnn", f"{EXCLUDE}=true", False),
        ("gpu", {}, "plain", f"{EXCLUDE}=true", True), ("gpu", {"fsdp": 2}, "cudnn", "", False),
        ("gpu", {"model": 2}, "plain", "", False), ("cpu", {}, "plain", "", False), ("tpu", {}, "flash", "", False),
    ],
)  # fmt: skip
def test_blocks_one_by_one(monkeypatch, platform, shape, name, flags, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert sharding.gains_by_unrolling(stand_in(platform, shape), name) == expected
