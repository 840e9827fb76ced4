"""The folder where downloaded, converted and trained weights are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$SRA_JAX_CACHE, else `sra_jax` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sra_jax"
    return Path(os.environ.get("SRA_JAX_CACHE") or default)
