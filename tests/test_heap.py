"""A heap that keeps its memory: when it is asked for, that a command restarts itself for it, and what it does."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sra_jax import heap
from tests.running import run as command

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import os, sys
print("start", sys.argv[1:], os.environ.get("GLIBC_TUNABLES", ""), flush=True)
from sra_jax import heap
heap.tune()
print("read", flush=True)
heap.tune(float(os.environ.get("HELD", "0")))
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
        "start ['--a=b c', 'd'] ", f"start ['--a=b c', 'd'] {tunables}", "read", "work",
    ]  # fmt: skip


@needs_glibc
def test_a_command_with_a_large_step_restarts_once_more(tmp_path):
    small, large = (heap.tuned(CPU, held)[heap.VARIABLE] for held in (0, heap.LARGE))
    assert set(large.split(":")) - set(small.split(":")) == {"glibc.malloc.arena_max=1"}
    begun = [f"start ['--a=b c', 'd'] {text}" for text in ("", small, large)]
    assert run(tmp_path, JAX_PLATFORMS="cpu", HELD=f"{heap.LARGE}") == [*begun[:2], "read", begun[2], "read", "work"]


@needs_glibc
def test_other_tunables_are_kept():
    tunables = heap.tuned(CPU | {heap.VARIABLE: "glibc.malloc.tcache_count=5"})[heap.VARIABLE].split(":")
    assert tunables[0] == "glibc.malloc.tcache_count=5"
    assert set(tunables[1:]) >= {f"{name}={value}" for name, value in heap.KEPT.items()}
    again = heap.tuned(CPU | {heap.VARIABLE: ":".join(tunables)}, heap.LARGE)[heap.VARIABLE].split(":")
    assert sorted(again) == sorted([*tunables, "glibc.malloc.arena_max=1"])


@needs_glibc
@pytest.mark.parametrize("held", [0, heap.LARGE])
@pytest.mark.parametrize("name", [*heap.KEPT, *heap.SHARED, *heap.LARGE_PAGES])
def test_what_a_user_says_of_the_heap_stays(name, held):
    assert heap.tuned(CPU | {heap.VARIABLE: f"{name}=7"}, held) is None


WORK = """
import resource, sys, threading
from sra_jax import heap
held, size = (int(text) for text in sys.argv[1:])
heap.tune()
heap.tune(held)
def work():
    for _ in range(10):
        large, small = bytearray(size), [bytearray(1_000_000) for _ in range(40)]
        del large, small
def faults():
    work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if held:  # as XLA computes
    thread = threading.Thread(target=faults)
    thread.start()
    thread.join()
else:
    faults()
"""


@needs_glibc
@pytest.mark.parametrize(("held", "size"), [(0, 30_000_000), (heap.LARGE, 2 * heap.LARGE)])
def test_memory_is_kept_for_the_next_step(tmp_path, held, size):
    """Without it each of ten rounds maps it all anew, 17,000 pages of 4 KB or dozens of 2 MB and more."""
    (faults,) = run(tmp_path, WORK, [str(held), str(size)], JAX_PLATFORMS="cpu")
    assert int(faults) < 50


@needs_glibc
@pytest.mark.parametrize(("recipe", "starts"), [("digits", 2), ("sit_b2", 3)])
def test_main_decides_by_the_recipe(tmp_path, recipe, starts):
    (tmp_path / "sitecustomize.py").write_text("print('start')")
    (tmp_path / "file").touch()
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = command(
        "main.py", f"--config=configs/{recipe}.py", f"--workdir={tmp_path}/file/run", code=2, fresh=True,
        environment={"PYTHONPATH": path, heap.VARIABLE: ""},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["start"] * starts


@needs_glibc
def test_a_program_that_calls_a_command_is_not_replaced(tmp_path):
    text = "from sra_jax import heap; print('start'); heap.tune(2 * heap.LARGE); print('work')"
    assert run(tmp_path, text, JAX_PLATFORMS="cpu") == ["start", "work"]


def test_a_user_can_turn_it_off(tmp_path):
    lines = run(tmp_path, JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert lines == ["start ['--a=b c', 'd'] glibc.malloc.hugetlb=0", "read", "work"]


@pytest.mark.parametrize("platforms", ["tpu", "cuda", "cuda,cpu"])
def test_accelerators_go_without(tmp_path, platforms):
    lines = run(tmp_path, JAX_PLATFORMS=platforms, HELD=f"{heap.LARGE}")
    assert lines == ["start ['--a=b c', 'd'] ", "read", "work"]
