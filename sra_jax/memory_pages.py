"""Large memory pages for a program that computes on the CPU.

XLA's CPU backend takes the memory of a step from the C library and gives it back after every step, so that each step
touches gigabytes of fresh memory, and the kernel maps them in pages of 4 KB. With pages of 2 MB the same memory costs a
few hundred page faults instead of hundreds of thousands. glibc asks for them if it is told so before a program starts,
by an environment variable; hence a command restarts itself once with it.
"""

import glob
import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
_FIRST_GLIBC = (2, 35)
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def use_large_pages() -> None:
    """Replace this process by the same command with large pages, where that can help; otherwise do nothing.

    To be called by a command before it imports anything that takes time. It does nothing where an accelerator
    computes, where the C library or the kernel cannot do it, or gives large pages anyway, and where `GLIBC_TUNABLES`
    already says something of them (`GLIBC_TUNABLES=glibc.malloc.hugetlb=0` therefore turns it off).
    """
    environment = with_large_pages(os.environ)
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment with the request for large pages added, or None where it is of no use or already there."""
    tunables = environment.get(VARIABLE, "")
    if TUNABLE in tunables or not (_computes_on_cpu(environment) and _library_can() and _kernel_waits_to_be_asked()):
        return None
    return {**environment, VARIABLE: ":".join(filter(None, (tunables, f"{TUNABLE}=1")))}


def _computes_on_cpu(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _library_can() -> bool:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, OSError, ValueError):  # another system, another C library
        return False
    return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= _FIRST_GLIBC


def _kernel_waits_to_be_asked() -> bool:
    try:
        return "[madvise]" in _PAGES.read_text()
    except OSError:
        return False
