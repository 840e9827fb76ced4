"""Compiled programs that are kept between starts: JAX's persistent compilation cache, on by default.

A home folder may be shared by unlike machines, and code that was compiled for one processor can end another's process.
JAX's key of a program does not tell processors apart, so each kind of machine and each version has a folder of its own.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import jax

from sra_jax import files, remote

OFF = "off"
"""In place of a folder: every program is compiled."""

MAX_BYTES = 4 << 30
"""Of one kind of machine; what was used longest ago goes first."""

LEAST_SECONDS = 0.2
"""A program that compiles faster is not kept: hundreds of small ones would make each look into the folder slow."""

SETTLED_SECONDS = 60
"""An entry that was written so long ago without a note of its use was cut short by a kill."""

PROCESSOR = ("flags", "Features")
"""Lines of /proc/cpuinfo that name what code for a processor may use, on x86 and on ARM."""

_ours: str | None = None


def use(given: str = "") -> None:
    """Keep what is compiled from here on, and take what was kept; to be called before anything is compiled.

    JAX's own variables come first: where `JAX_COMPILATION_CACHE_DIR` or `JAX_ENABLE_COMPILATION_CACHE` is set, or a
    folder was given to JAX in another way, nothing is changed here. A folder that cannot be used is said on stderr. Of
    several processes on CPUs only the first would find its programs, and the others, which compile theirs, be too late
    for the first exchange: they all compile.

    Args:
      given: a folder or an address; "off"; empty for `programs` in `files.cache_folder()`.
    """
    global _ours
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    if getattr(jax.config, "jax_compilation_cache_dir", None) not in (None, "", _ours):
        return
    folder: Path | None = None
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        given = OFF
    if remote.is_address(given):
        folder = remote.path(given) / kind()
    elif given != OFF:
        folder = _prepared(Path(given) if given else files.cache_folder() / "programs")
    _ours = None if folder is None else str(folder)
    jax.config.update("jax_compilation_cache_dir", _ours)
    if folder is not None:
        _set("jax_compilation_cache_max_size", -1 if remote.is_address(folder) else MAX_BYTES)  # it needs a file lock
        _set("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def _set(name: str, value: float) -> None:
    """Unless the user's environment says otherwise."""
    if name.upper() not in os.environ:
        jax.config.update(name, value)


def _prepared(folder: Path) -> Path | None:
    """The part of a folder that is this kind of machine's, made where it is not there; None where it is of no use."""
    folder = folder / kind()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who may write there may run code here
        with tempfile.TemporaryFile(dir=folder) as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            probe.write(b"1")
        _mend(folder)
    except OSError as error:
        if jax.process_index() == 0:
            print(
                f"compiled programs are not kept, since {folder} cannot be used ({error.strerror}): "
                f"--config.compilation_cache names another folder, or {OFF}", file=sys.stderr,
            )  # fmt: skip
        return None
    return folder


def _mend(folder: Path) -> None:
    """Remove entries that a killed process began to write: JAX would neither replace nor evict them."""
    for entry in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            used = entry.with_name(f"{entry.name.removesuffix('-cache')}-atime")
            if time.time() - entry.stat().st_mtime > SETTLED_SECONDS and not (used.exists() and used.stat().st_size):
                entry.unlink()


def kind() -> str:
    """What decides whether a compiled program can run: the processor's features and the versions of JAX and XLA.

    Returns:
      The versions and a digest, as a folder's name.
    """
    processor = {platform.system(), platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):  # a system without it
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor |= {" ".join(sorted(line.split())) for line in lines if line.startswith(PROCESSOR)}
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib")]
    digest = hashlib.sha256(repr((versions, sorted(processor))).encode()).hexdigest()[:12]
    return f"jax-{versions[0]}-{digest}"
