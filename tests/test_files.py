"""The lock of a folder or file that one program alone writes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sra_jax import files
from sra_jax.errors import RunError, UserError
from tests.conftest import ROOT

pytestmark = [pytest.mark.fast, pytest.mark.faults]

HOLD = """
import sys, time
from sra_jax import files
with files.locked(sys.argv[1], "choose another --output"):
    print("held", flush=True)
    time.sleep(60)
"""
FOREIGN = {"id": "theirs", "host": "far", "machine": "elsewhere", "pid": 7, "started": "2026-01-02", "command": "train"}


@contextlib.contextmanager
def held_by_another(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(files, "LOCK_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(files, "LOCK_STALE_SECONDS", 0.5)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_second_is_told_who_holds_it_and_a_killed_owner_leaves_nothing(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "samples.npz"
    with held_by_another(path) as owner:
        with pytest.raises(UserError, match=rf"process {owner.pid} on .* since 20.*choose another --output"), \
                files.locked(path, "choose another --output"):
            pass
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        with files.locked(path, ""):
            assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_one_program_does_not_get_a_lock_twice_and_gets_it_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path, ""):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), files.locked(tmp_path, ""):
            pass
        raise ZeroDivisionError
    with files.locked(tmp_path, ""):
        pass


def test_a_child_does_not_keep_its_parent_s_lock(tmp_path):
    with files.locked(tmp_path, ""):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        with files.locked(tmp_path, ""):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_an_owner_on_another_machine_that_lives_keeps_its_lock(tmp_path, quick):
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps(FOREIGN))
    ended = threading.Event()

    def beat():
        while not ended.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="process 7 on far since 2026-01-02"), files.locked(tmp_path, ""):
            pass
    finally:
        ended.set()
        thread.join()
    assert json.loads(lock.read_text()) == FOREIGN


@pytest.mark.parametrize("age", [0, 3600])
def test_a_silent_owner_on_another_machine_is_dead(tmp_path, quick, age):
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps(FOREIGN))
    os.utime(lock, (time.time() - age,) * 2)
    begun = time.monotonic()
    with files.locked(tmp_path, ""):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert age or time.monotonic() - begun >= 0.4
    assert not lock.exists()


def test_whoever_stood_still_learns_that_the_lock_was_taken_over(tmp_path, quick):
    with files.locked(tmp_path, "") as lock:
        lock.check()
        (tmp_path / ".lock").write_text(json.dumps(FOREIGN))
        deadline = time.monotonic() + 10
        with pytest.raises(RunError, match="taken over by process 7 on far"):
            while time.monotonic() < deadline:
                lock.check()
                time.sleep(0.02)
    assert json.loads((tmp_path / ".lock").read_text()) == FOREIGN


def test_a_lock_that_cannot_be_written(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock.*cannot be written"), files.locked(tmp_path, ""):
        pass
