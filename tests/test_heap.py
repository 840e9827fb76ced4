"""A heap that keeps its memory: when it is asked for, that a command restarts itself for it once, and what it does."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sra_jax import heap

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import os, sys
print("start", sys.argv[1:], os.environ.get("GLIBC_TUNABLES", ""), flush=True)
from sra_jax import heap
heap.tune()
print("work")
"""
CPU = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"}

needs_glibc = pytest.mark.skipif(heap.tuned(CPU) is None, reason="this C library cannot be tuned")


def run(tmp_path: Path, text=SCRIPT, arguments: Sequence[str] = ("--a=b c", "d"), **environment: str) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(text)
    kept = {name: value for name, value in os.environ.items() if name != heap.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(script), *arguments], env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@needs_glibc
def test_a_command_restarts_once_with_its_arguments(tmp_path):
    tunables = heap.tuned(CPU)[heap.VARIABLE]
    assert run(tmp_path, JAX_PLATFORMS="cpu") == [
        "start ['--a=b c', 'd'] ", f"start ['--a=b c', 'd'] {tunables}", "work",
    ]  # fmt: skip


@needs_glibc
def test_other_tunables_are_kept():
    tunables = heap.tuned(CPU | {heap.VARIABLE: "glibc.malloc.tcache_count=5"})[heap.VARIABLE].split(":")
    assert tunables[0] == "glibc.malloc.tcache_count=5"
    assert set(tunables[1:]) >= {f"{name}={value}" for name, value in heap.KEPT.items()}


@needs_glibc
@pytest.mark.parametrize("name", [*heap.KEPT, *heap.LARGE_PAGES])
def test_what_a_user_says_of_the_heap_stays(name):
    assert heap.tuned(CPU | {heap.VARIABLE: f"{name}=7"}) is None


WORK = """
import resource, sys
from sra_jax import heap
heap.tune()
def work():
    for _ in range(int(sys.argv[1])):
        large, small = bytearray(30_000_000), [bytearray(1_000_000) for _ in range(40)]
        del large, small
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@needs_glibc
def test_memory_is_kept_for_the_next_step(tmp_path):
    """Without it each of ten rounds maps 70 MB anew, 17,000 pages of 4 KB or dozens of 2 MB."""
    (faults,) = run(tmp_path, WORK, ["10"], JAX_PLATFORMS="cpu")
    assert int(faults) < 50


def test_a_user_can_turn_it_off(tmp_path):
    lines = run(tmp_path, JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert lines == ["start ['--a=b c', 'd'] glibc.malloc.hugetlb=0", "work"]


@pytest.mark.parametrize("platforms", ["tpu", "cuda", "cuda,cpu"])
def test_accelerators_go_without(tmp_path, platforms):
    assert run(tmp_path, JAX_PLATFORMS=platforms) == ["start ['--a=b c', 'd'] ", "work"]
