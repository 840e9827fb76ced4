"""The request for large pages: when it is made, and that a command restarts itself with it exactly once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sra_jax import memory_pages

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import os, sys
print("start", sys.argv[1:], os.environ.get("GLIBC_TUNABLES", ""), flush=True)
from sra_jax import memory_pages
memory_pages.use_large_pages()
print("work")
"""
CPU = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin"}

needs_pages = pytest.mark.skipif(
    memory_pages.with_large_pages(CPU) is None, reason="this C library or kernel gives no large pages on request"
)


def run(tmp_path: Path, **environment: str) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    kept = {name: value for name, value in os.environ.items() if name != memory_pages.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(script), "--a=b c", "d"], env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@needs_pages
def test_a_command_restarts_once_with_its_arguments(tmp_path):
    assert run(tmp_path, JAX_PLATFORMS="cpu") == [
        "start ['--a=b c', 'd'] ", "start ['--a=b c', 'd'] glibc.malloc.hugetlb=1", "work",
    ]  # fmt: skip


@needs_pages
def test_other_tunables_are_kept():
    tunables = memory_pages.with_large_pages(CPU | {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"})["GLIBC_TUNABLES"]
    assert tunables == "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"


def test_a_user_can_turn_it_off(tmp_path):
    lines = run(tmp_path, JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert lines == ["start ['--a=b c', 'd'] glibc.malloc.hugetlb=0", "work"]


@pytest.mark.parametrize("platforms", ["tpu", "cuda", "cuda,cpu"])
def test_accelerators_go_without(tmp_path, platforms):
    assert run(tmp_path, JAX_PLATFORMS=platforms) == ["start ['--a=b c', 'd'] ", "work"]
