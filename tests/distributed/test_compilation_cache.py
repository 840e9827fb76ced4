"""Compiled programs are kept by default, where it is safe and wanted."""

import os
import time

import jax
import pytest

from sra_jax import files
from sra_jax.distributed import compilation_cache
from tests.conftest import TINY_DIGITS, run

SETTINGS = (
    "jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs"
)  # fmt: skip


@pytest.fixture
def as_started(tmp_path, monkeypatch):
    """JAX as a user's shell leaves it, and a cache folder of the test's own."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name in ("JAX_COMPILATION_CACHE_DIR", *(setting.upper() for setting in SETTINGS)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SRA_JAX_CACHE", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
def test_a_second_start_takes_what_the_first_compiled(tmp_path):
    """As a user runs it: the second start reads what the first has written, and ends with the same numbers."""
    command = ("main.py", *TINY_DIGITS, "--config.steps=2", "--config.checkpoint_every=2", "--config.log_every=1")
    environment = {"JAX_COMPILATION_CACHE_DIR": "", "SRA_JAX_CACHE": str(tmp_path / "cache"),
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}  # fmt: skip
    used = []
    for attempt in range(2):
        done = run(*command, f"--workdir={tmp_path / str(attempt)}", environment=environment, fresh=True)
        assert "not kept" not in done.stderr
        (folder,) = (tmp_path / "cache" / "programs").iterdir()
        used.append({path.name: path.read_bytes() for path in folder.glob("jit_train_step*-atime")})
    assert folder.name == compilation_cache.kind()
    assert len(used[0]) == 1
    assert used[0].keys() == used[1].keys()
    assert used[0] != used[1]
    metrics = [(tmp_path / str(attempt) / "metrics.jsonl").read_text() for attempt in range(2)]
    first, second = (text.split('"steps_per_second"')[0] for text in metrics)
    assert first == second


def test_default_folder_and_its_bound(as_started):
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir == str(as_started / "programs" / compilation_cache.kind())
    assert jax.config.jax_compilation_cache_max_size == compilation_cache.MAX_BYTES
    assert os.stat(jax.config.jax_compilation_cache_dir).st_mode & 0o077 == 0


def test_a_folder_of_one_s_own_then_none(as_started, tmp_path):
    compilation_cache.use(str(tmp_path / "own"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own" / compilation_cache.kind())
    compilation_cache.use("off")
    assert jax.config.jax_compilation_cache_dir is None
    assert not files.cache_folder().exists()


def test_several_processes_on_cpus_all_compile(as_started, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"])
def test_jax_s_own_variables_come_first(name, as_started, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "0")
    compilation_cache.use(str(tmp_path / "own"))
    assert jax.config.jax_compilation_cache_dir is None
    assert not (tmp_path / "own").exists()


def test_what_was_given_to_jax_stays(as_started, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    compilation_cache.use()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")


@pytest.mark.faults
def test_a_folder_that_cannot_be_used_is_a_warning(as_started, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    compilation_cache.use(str(tmp_path / "file"))
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "compiled programs are not kept" in line
    assert "--config.compilation_cache" in line


@pytest.mark.faults
def test_entries_that_a_kill_cut_short_are_removed(as_started):
    compilation_cache.use()
    folder = as_started / "programs" / compilation_cache.kind()
    for name in ("whole", "cut", "new"):
        (folder / f"{name}-cache").write_bytes(b"x")
    (folder / "whole-atime").write_bytes(b"01234567")
    old = time.time() - 2 * compilation_cache.SETTLED_SECONDS
    for name in ("whole", "cut"):
        os.utime(folder / f"{name}-cache", (old, old))
    compilation_cache.use()
    assert {path.name for path in folder.glob("*-cache")} == {"whole-cache", "new-cache"}


def test_other_processors_and_versions_have_other_folders(monkeypatch):
    here = compilation_cache.kind()
    monkeypatch.setattr(compilation_cache.platform, "machine", lambda: "another")
    other = compilation_cache.kind()
    monkeypatch.setattr(compilation_cache.importlib.metadata, "version", lambda name: "99.0")
    newer = compilation_cache.kind()
    assert len({here, other, newer}) == 3
    assert newer.startswith("jax-99.0-")
