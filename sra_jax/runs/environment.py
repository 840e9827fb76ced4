"""What besides the config decides a run's numbers: settings of JAX, which variables may change, versions, hardware."""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sra_jax import files
from sra_jax.errors import UserError

FILE = "environment.json"

SETTINGS = (
    "jax_default_dtype_bits", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_enable_x64",
    "jax_numpy_dtype_promotion", "jax_random_seed_offset", "jax_threefry_partitionable",
)  # fmt: skip
"""Settings of JAX that change which numbers are drawn or with how many bits they are computed."""

VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "XLA_FLAGS")
"""Variables that choose how the compiler rounds, and much besides."""

HARMLESS = ("--xla_force_host_platform_device_count", "--xla_dump", "--xla_gpu_per_fusion_autotune_cache_dir")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def current() -> dict[str, Any]:
    """The environment of this process, as JSON data: `settings`, `variables`, `versions` and `device`."""
    settings = {name: getattr(jax.config, name) for name in SETTINGS if hasattr(jax.config, name)}
    flags = {
        name: " ".join(sorted(flag for flag in os.environ.get(name, "").split() if not flag.startswith(HARMLESS)))
        for name in VARIABLES
    }
    return {
        "settings": settings, "variables": {name: value for name, value in flags.items() if value},
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip


def write(workdir: Path) -> None:
    """Record the environment that a run goes on in."""
    files.write_text(workdir / FILE, json.dumps(current(), indent=2) + "\n")


def differences(workdir: Path) -> tuple[list[str], list[str]]:
    """How this environment differs from the one that a run was last trained in; both lists are empty without a record.

    Returns:
      Settings, which change numbers (`NAME: there -> here`); and what changes at most how they are rounded.

    Raises:
      UserError: the record is not one.
    """
    path = workdir / FILE
    if not files.exists(path):
        return [], []
    try:
        saved = json.loads(files.read_text(path))
        groups = {name: dict(saved[name]) for name in ("settings", "variables", "versions")}
        device = str(saved["device"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a record of a run's environment; move it away to go on") from error
    now = current()
    known = groups["settings"].keys() & now["settings"].keys()  # both versions of JAX have them
    settings = _changed(*({name: values[name] for name in known} for values in (groups["settings"], now["settings"])))
    others = [line for name in ("variables", "versions") for line in _changed(groups[name], now[name])]
    return settings, others + _changed({"device": device}, {"device": now["device"]})


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {old.get(name, 'unset')!r} -> {new.get(name, 'unset')!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
