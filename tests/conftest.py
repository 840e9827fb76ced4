"""Eight simulated devices for the whole suite, one cache of compiled programs, and a run that many tests look at."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tests.running import (  # noqa: F401
    QUICK_COMPILING,
    ROOT,
    command_environment,
    compilation_cache,
    kill_when,
    run,
    start,
)  # fmt: skip

os.environ["XLA_FLAGS"] = " ".join(
    [QUICK_COMPILING, os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of a test's time would be the compilation of what another test, or the last run of the suite, has compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()  # grain's worker processes read their options there

TINY_DIGITS = (
    "--config=configs/digits.py", "--config.model.width=32", "--config.model.depth=3", "--config.model.heads=2",
    "--config.alignment.student_block=1", "--config.alignment.teacher_block=2", "--config.batch_size=16",
    "--config.steps=24", "--config.optimizer.warmup_steps=0", "--config.log_every=4", "--config.checkpoint_every=6",
    "--config.sample_every=0", "--config.ema.decay=0.8", "--config.sampling.steps=4",
    "--config.sampling.preview_per_class=2",
)  # fmt: skip
"""The digits recipe at a size that trains in a second after compilation."""

CACHE_DAYS = 14
WORKERS = 4
LONG_ROOMS = ("tools", "training", "distributed", "runs", "planning", "models", "methods")
"""Whose files take minutes each: they begin first, and the many short ones fill what the processes have left."""

FAST_ROOMS = ("config", "data", "diffusion", "methods", "models")
NOT_FAST = (
    "test_a_network_on_a_mesh_attends_as_one_on_a_device",
    "test_compiled_size_does_not_grow_with_depth", "test_ddim_with_eta_one_is_ddpm_with_the_small_variance",
    "test_each_pulls_the_tokens_as_it_does_alone", "test_features_are_of_each_image_alone",
    "test_groups_are_the_computation_of_every_token_by_itself", "test_initialisation_as_pytorchs",
    "test_one_pass_of_the_student_and_one_of_the_teacher_whatever_the_sum", "test_remat_changes_no_gradient",
    "test_scan_and_stops_equal_a_plain_loop", "test_tfds",
    "test_the_loss_is_least_where_the_correction_gives_the_velocity", "test_worker_processes_change_nothing",
    "test_worker_processes_read_the_same",
)  # fmt: skip


def pytest_sessionstart(session: pytest.Session) -> None:
    """Programs that were compiled long ago are compiled again, so that the folder does not grow for ever."""
    if hasattr(session.config, "workerinput"):
        return
    for entry in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"):
        with contextlib.suppress(OSError):  # another session was faster
            if time.time() - entry.stat().st_mtime > CACHE_DAYS * 86400:
                entry.unlink()


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of what is pure code are the fast ones, but for those that are marked slow or start processes."""
    rooms = {item: item.path.relative_to(ROOT / "tests").parts[0] for item in items}
    items.sort(key=lambda item: LONG_ROOMS.index(rooms[item]) if rooms[item] in LONG_ROOMS else len(LONG_ROOMS))
    for item, room in rooms.items():
        left_out = getattr(item, "originalname", None) in NOT_FAST or item.get_closest_marker("slow")
        if room in FAST_ROOMS and not left_out:
            item.add_marker("fast")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """A worker for each core that has 3 GB of memory to itself; none where the tests of named files are run, since a
    worker takes seconds to start."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist reads it
    if all(argument.partition("::")[0].endswith(".py") for argument in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, WORKERS, _available_memory() // (3 << 30)))


def _available_memory() -> int:
    """In bytes; on a system that does not say, enough."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 40


@contextlib.contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that all processes of this session share, and whether it is to be filled in the block.

    The others wait until the block ends. What ends with an error is tried again by the next.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
        yield folder, not done.exists()
        done.touch()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The workdir of a finished tiny run on the digits, with a preview at its last step. Read only."""
    with made_once(tmp_path_factory, "tiny_run") as (workdir, to_do):
        if to_do:
            run("main.py", *TINY_DIGITS, "--config.sample_every=24", f"--workdir={workdir}", fresh=True)
    return workdir
