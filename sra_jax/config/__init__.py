"""A run's config: every key and its default (keys.py), the numbers that they may hold (limits.py), the checks before
any work (checks.py), the objects that it describes (objects.py), what its step takes of a memory (memory.py), the flag
that names a recipe (flag.py), reading, writing and comparing (saved.py), the page of all keys (reference.py).

Other rooms use it as `from sra_jax import config as config_lib`.
"""

from sra_jax.config.checks import check
from sra_jax.config.flag import change, define_flag, given, load
from sra_jax.config.flag import read as read_value
from sra_jax.config.keys import AUTO, DTYPES, FREE_KEYS, default, flatten, tell_captions
from sra_jax.config.limits import check_workers
from sra_jax.config.memory import held_by_a_step, kept_by_blocks
from sra_jax.config.objects import (
    accumulation_of,
    correction_of,
    fewest_devices,
    guidance_interval,
    guidance_of,
    mesh_shape,
    method_names,
    methods_of,
    process_of,
    profiles_of,
    sampler_of,
    step_flops,
    tells_captions,
    total_steps,
    transformer_of,
)
from sra_jax.config.saved import differences, from_flag, from_json, read, readable, to_json
from sra_jax.diffusion.registry import process_defaults

__all__ = [
    "AUTO", "DTYPES", "FREE_KEYS", "accumulation_of", "change", "check", "check_workers", "correction_of",
    "default", "define_flag", "differences", "fewest_devices", "flatten", "from_flag", "from_json", "given",
    "guidance_interval", "guidance_of", "held_by_a_step", "kept_by_blocks", "load", "mesh_shape", "method_names",
    "methods_of", "process_defaults", "process_of", "profiles_of", "read", "read_value", "readable", "sampler_of",
    "step_flops", "tell_captions", "tells_captions", "to_json", "total_steps", "transformer_of",
]
