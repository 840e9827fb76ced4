"""Files that appear only whole: a program that is killed while it writes leaves the old file, or none. And the lock
that keeps two programs from writing the same.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from sra_jax.errors import RunError, UserError

LOCK_BEAT_SECONDS = 5
"""How often the owner of a lock shows that it lives."""

LOCK_STALE_SECONDS = 45
"""An owner on another machine that has not shown it for so long is taken for dead."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends without an error.

    Folders above are made. Several processes may write the same file; the last remains. After an error nothing is left
    behind; a kill leaves a hidden file whose name ends in `.partial`.

    Args:
      path: the file, or folder that does not exist yet, to appear.

    Yields:
      A path in the same folder, to be created in the block.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if unfinished.is_file():
            unfinished.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file, in place of one that is there."""
    with whole(path) as unfinished:
        unfinished.write_text(text)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays under their names as NumPy's uncompressed archive."""
    with whole(path) as unfinished, unfinished.open("wb") as file:  # by name, NumPy would add a suffix
        np.savez(file, **arrays)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image (H,W,C) uint8, C 1 or 3, as a PNG."""
    with whole(path) as unfinished:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(unfinished, format="PNG")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under their names; safetensors writes memory as it lies, so each is made contiguous first."""
    with whole(path) as unfinished:
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(contiguous, unfinished, dict(metadata or {}) or None)


class Lock:
    """A lock that is held; `locked` makes it.

    Args:
      path: what is locked.
      file: the lock's file, which this program holds and has written `record` into.
      record: who holds it.
    """

    def __init__(self, path: Path, file: Path, record: Mapping[str, Any]):
        self._path, self._file, self._record = path, file, record
        self._released = threading.Event()
        self._taken_by: Mapping[str, Any] | None = None
        self._thread = threading.Thread(target=self._beat, name=f"lock {path}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._released.wait(LOCK_BEAT_SECONDS):
            try:
                found = _read_record(self._file)
                if found is not None and found.get("id") != self._record["id"]:
                    self._taken_by = found
                    return
                if found is not None:  # None: cannot be read just now, or removed by hand
                    os.utime(self._file)
            except OSError:
                continue  # a file system that is away for a moment

    def check(self) -> None:
        """Raises `RunError` where another program took the lock over, because this one stood still for too long."""
        if self._taken_by is not None:
            raise RunError(
                f"{self._path} was taken over by {_owner(self._taken_by)} after this process had stood still for "
                f"{LOCK_STALE_SECONDS} seconds; it ends here so that not both write there"
            )

    def release(self) -> None:
        """Show life no longer."""
        self._released.set()
        self._thread.join()


@contextlib.contextmanager
def locked(path: Path, change: str) -> Iterator[Lock]:
    """Be the only program that writes a folder or file for as long as the block runs.

    The lock is a file: `.lock` in a folder that exists, `.NAME.lock` beside anything else. The system's own lock on it
    (flock) ends with the process that holds it, so that a crash leaves nothing behind. Where programs of several
    machines share a folder, that lock may not reach from one to the other: the file therefore names its owner, who
    touches it every `LOCK_BEAT_SECONDS`. An owner on another machine that is silent for `LOCK_STALE_SECONDS` is dead.
    Several processes of one run are one owner: process 0 takes the lock for all.

    Args:
      path: what is to be written. The folder in which the lock's file lies must exist.
      change: what a user may do instead of waiting, such as "choose another --workdir".

    Yields:
      The lock; `check()` tells a program that stood still whether the lock is still its own.

    Raises:
      UserError: another program holds it, and the message names the process, its machine, its start and its command; or
        the lock's file cannot be written.
    """
    place = Path(path).absolute()
    file = place / ".lock" if place.is_dir() else place.with_name(f".{place.name}.lock")
    record = {
        "id": uuid.uuid4().hex, "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "command": " ".join(sys.argv),
    }  # fmt: skip
    descriptor = _acquire(path, file, record, change)
    lock = Lock(path, file, record)
    try:
        yield lock
    finally:
        lock.release()
        found = _read_record(file)
        if found is not None and found.get("id") == record["id"] and descriptor in _descriptors:
            file.unlink(missing_ok=True)  # before the lock is let go: who comes then looks whether it still lies there
        _close(descriptor)


def _acquire(path: Path, file: Path, record: Mapping[str, Any], change: str) -> int:
    """The open lock's file, locked and with our record in it."""

    def busy(owner: Mapping[str, Any] | None) -> UserError:
        return UserError(f"{path} is being written by {_owner(owner)}: wait for it, end it, or {change}")

    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{file}, the lock of {path}, cannot be written ({error.strerror})") from error
        _descriptors.add(descriptor)
        try:
            foreign = _flock(descriptor)
            if foreign is None:
                raise busy(_read_record(file))
            if not _still_there(descriptor, file):
                raise FileNotFoundError  # its owner has just let it go: begin again
            found = _read_record(file)
            if found is not None and (foreign or found.get("machine") != record["machine"]):
                _wait_for_silence(path, file, found, busy)
                foreign = True
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(record).encode(), 0)
            os.fsync(descriptor)
            if foreign:  # where flock does not reach, two may have waited: the last to write has it
                time.sleep(1)
                found = _read_record(file)
                if found is not None and found.get("id") != record["id"]:
                    raise busy(found)
            return descriptor
        except BaseException as error:
            _close(descriptor)
            if not isinstance(error, FileNotFoundError):
                raise


def _flock(descriptor: int) -> bool | None:
    """Lock an open file: None where another program holds it, True where this file system has no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return True
    return False


def _still_there(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _wait_for_silence(path: Path, file: Path, owner: Mapping[str, Any], busy: Any) -> None:
    """Until an owner that flock says nothing of is known to be dead; raises what `busy` makes where it lives."""
    beat = _beat_of(file)
    patience = LOCK_STALE_SECONDS - (_now_at(file) - beat)
    if patience <= 0:
        return
    print(f"waiting {patience:.0f} seconds at most to see whether {_owner(owner)} still writes {path}", file=sys.stderr)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(LOCK_BEAT_SECONDS / 5, 1))
        if _beat_of(file) != beat:
            raise busy(_read_record(file))


def _beat_of(file: Path) -> float:
    with file.open("rb") as opened:  # opening is what makes NFS ask the server anew
        return os.fstat(opened.fileno()).st_mtime


def _now_at(file: Path) -> float:
    """The time by the clock that stamps files there, which may be a server's."""
    probe = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read_record(file: Path) -> dict[str, Any] | None:
    """Who a lock's file names; None where it is empty, damaged or gone."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _owner(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "another process"
    return (
        f"process {record.get('pid')} on {record.get('host')} since {record.get('started')} ({record.get('command')})"
    )


def _machine() -> str:
    """What all processes that share a kernel have in common, containers too; another one after each boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


_descriptors: set[int] = set()
"""Open locks' files. A child process does not keep its parent's locks."""


def _close(descriptor: int) -> None:
    if descriptor in _descriptors:
        _descriptors.discard(descriptor)
        os.close(descriptor)


def _close_in_child() -> None:
    for descriptor in list(_descriptors):
        _close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)
