"""Memory of a program that computes on the CPU: kept from step to step, and in large pages.

XLA's CPU backend takes memory from the C library, gigabytes for a whole step and megabytes for what each product of
matrices packs, and gives it back afterwards. By itself the library returns most of that to the kernel, which clears it
and maps it anew, page by page, at the next use; where memory is in pieces, as after hours of other work, it moves pages
about to find large ones, which can take a third of a step. Told before a program starts, by an environment variable,
glibc keeps it, and asks for pages of 2 MB in place of 4 KB; hence a command restarts itself with it.

glibc has several heaps, so that threads seldom wait for each other, and only the first can keep more than 64 MB at a
time. A step that holds much more is kept whole where all threads share that one. They wait for each other then, most of
all those of XLA's compiler: a small step is better off without.
"""

import glob
import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
KEPT = {
    "glibc.malloc.mmap_max": 0,  # pieces that are mapped one by one, and unmapped when they are given back
    "glibc.malloc.trim_threshold": 2**40,  # bytes free at a heap's end from which it would shrink
}
SHARED = {"glibc.malloc.arena_max": 1}  # heaps
LARGE_PAGES = {"glibc.malloc.hugetlb": 1}
LARGE = 10**8
"""Bytes that a step holds from which on all threads share a heap."""

_FIRST_GLIBC, _FIRST_WITH_PAGES = (2, 26), (2, 35)
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


_tuned_at_start = False
"""Whether this process is a command that asked at its start; a program that calls a command's `main` is none."""


def tune(held: float | None = None) -> None:
    """Replace this process by the same command with a tuned heap, where that can help; otherwise do nothing.

    To be called by a command before it imports anything that takes time, and by one that trains again, with `held`,
    when it has read its recipe, before it opens anything; without the first call the second does nothing. Neither does
    anything where an accelerator computes, where the C library cannot do it, and where `GLIBC_TUNABLES` already says
    something else of what would be set (`GLIBC_TUNABLES=glibc.malloc.hugetlb=0` therefore turns it off).

    Args:
      held: bytes that a step of the command holds at a time, about.
    """
    global _tuned_at_start
    if held is None:
        _tuned_at_start = True
    elif not _tuned_at_start:
        return
    environment = tuned(os.environ, held or 0)
    if environment is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def tuned(environment: Mapping[str, str], held: float = 0) -> dict[str, str] | None:
    """The environment with a heap tuned to a step that holds so many bytes.

    None where it is of no use, where it is tuned so already, and where something else is said of it.
    """
    version = _glibc()
    if version < _FIRST_GLIBC or not _computes_on_cpu(environment):
        return None
    pages = LARGE_PAGES if version >= _FIRST_WITH_PAGES and _kernel_waits_to_be_asked() else {}
    small = {name: str(value) for name, value in (KEPT | pages).items()}
    wanted = small | {name: str(value) for name, value in SHARED.items() if held >= LARGE}
    given = [entry.partition("=")[::2] for entry in environment.get(VARIABLE, "").split(":") if entry]
    said = {name: value for name, value in given if name in KEPT | SHARED | LARGE_PAGES}
    if said == wanted or said not in ({}, small):
        return None
    others = {name: value for name, value in given if name not in said}
    return {**environment, VARIABLE: ":".join(f"{name}={value}" for name, value in (others | wanted).items())}


def _computes_on_cpu(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _glibc() -> tuple[int, ...]:
    """The version of the C library if it is glibc, else (0,)."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else (0,)
    except (AttributeError, OSError, ValueError):  # another system, another C library
        return (0,)


def _kernel_waits_to_be_asked() -> bool:
    try:
        return "[madvise]" in _PAGES.read_text()
    except OSError:
        return False
