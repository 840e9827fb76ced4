"""Files that appear only whole: a program that is killed while it writes leaves the old file, or none. With
the checks that spare long work without a place for its result, and the lock that keeps two programs from writing the
same.
"""

import concurrent.futures
import contextlib
import datetime
import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image

from sra_jax import remote
from sra_jax.errors import Busy, RunError, UserError

LOCK_BEAT_SECONDS = 5
"""How often the owner of a lock shows that it lives."""

LOCK_STALE_SECONDS = 45
"""An owner on another machine that has not shown it for so long is taken for dead."""

GROWING_SECONDS = 30
"""How often an object that grows is written anew, at most."""


def cache_folder() -> Path:
    """Where downloaded, converted, trained and compiled things are kept between runs.

    $SRA_JAX_CACHE, else `sra_jax` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache).
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sra_jax"
    return Path(os.environ.get("SRA_JAX_CACHE") or default)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends without an error.

    Folders above are made. Several processes may write the same file; the last remains. After an error nothing is left
    behind; a kill leaves a hidden file whose name ends in `.partial`. What goes to an address is written to the folder
    for temporary files and sent from there.

    Args:
      path: the file, or local folder that does not exist yet, to appear.

    Yields:
      A local path, to be created in the block.
    """
    path = remote.path(path)
    if remote.is_address(path):
        with tempfile.TemporaryDirectory(prefix="sra_jax_") as folder:
            yield Path(folder) / path.name
            remote.upload(Path(folder) / path.name, path)
        for key in [key for key in _copies if key[0] == os.fspath(path)]:
            del _copies[key]
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(_partial_name(path))
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


def _partial_name(path: Path) -> str:
    return f".{path.name}.{os.getpid()}.partial"


def check_output(flag: str, path: str | Path, overwrite: bool | None = None, *, folder: bool = False) -> Path:
    """Refuse, before any work, what could not be written after it.

    Args:
      flag: what the user gave the path to, such as `--output`.
      path: the file or folder to be written; folders above need not exist.
      overwrite: whether an old file may be replaced; None for a command that has no flag --overwrite and replaces none.
      folder: the path is a folder, which may exist.

    Returns:
      The path.

    Raises:
      UserError: something is there that may not be replaced, or the path cannot be created.
    """
    path = remote.path(path)

    def refuse(reason: str) -> UserError:
        return UserError(f"{flag}={path} {reason}")

    if remote.is_address(path):
        return _checked_address(flag, path, overwrite, folder, refuse)
    try:
        found = path.stat().st_mode if path.exists() else None
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path.with_name(_partial_name(path)))  # the longest name that is written to
        above = path if folder else path.parent
        while not os.path.lexists(above):
            above = above.parent
    except (OSError, ValueError) as error:
        raise refuse(f"cannot be written ({getattr(error, 'strerror', None) or error}): choose another name") from error
    if not folder and found is not None:
        if stat.S_ISDIR(found):
            raise refuse("is a folder: give the name of a file, or move the folder away")
        if not stat.S_ISREG(found):
            raise refuse("is no plain file and is not replaced: choose another name")
        if not overwrite:
            raise refuse(_not_overwritten(overwrite))
    if not above.is_dir():
        raise refuse(f"cannot be written: {above} is no folder. Choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise refuse(f"cannot be written: nothing may be created in {above}. Choose another place")
    return path


def _not_overwritten(overwrite: bool | None) -> str:
    other = "give another name, or --overwrite to replace it"
    if overwrite is None:
        other = "choose another name or delete it"
    return f"exists and is not overwritten: {other}"


def _checked_address(
    flag: str, path: Path, overwrite: bool | None, folder: bool, refuse: Callable[[str], UserError]
) -> Path:
    """`check_output` of an address: a small object is written beside it and removed again."""
    if remote.scheme(path) == remote.HUB:
        raise refuse("is only read here: write a local file and upload it (hf upload OWNER/NAME FILE)")
    probe = (path if folder else path.parent) / f".{uuid.uuid4().hex}.partial"
    try:
        with remote.asked(path):
            if not folder and path.exists() and not overwrite:
                raise refuse(_not_overwritten(overwrite))
        with remote.asked(probe):
            probe.write_bytes(b"")
            probe.unlink()
    except OSError as error:
        raise remote.unreachable(flag, path, error) from error
    return path


def check_outputs_differ(**paths: str | Path | None) -> None:
    """Raises a `UserError` where two flags, given by name, would write the same file."""
    seen: dict[str, str] = {}
    for flag, path in paths.items():
        if path:
            other = seen.setdefault(os.path.realpath(path), flag)
            if other != flag:
                raise UserError(f"--{other} and --{flag} both name {path}: give each a file of its own")


def check_room(flag: str, path: str | Path, size: int) -> None:
    """Raises a `UserError` where a file of `size` bytes will not fit on the disk of `path`."""
    if remote.is_address(path):
        return
    above = Path(path).absolute().parent
    while not above.is_dir():
        above = above.parent
    free = shutil.disk_usage(above).free
    if size > free:
        raise UserError(f"{flag}={path} will take {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {above}")


def write_results(results: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write what took long to make, each by its function of the path; what cannot be written there is kept elsewhere.

    Raises:
      RunError: a file could not be written; the others are, and the message says where this one lies instead.
    """
    failures = []
    for path, write in results.items():
        try:
            write(path)
        except (OSError, safetensors.SafetensorError) as error:
            failures.append(f"{path} cannot be written ({error}); {_keep_elsewhere(path, write)}")
    if failures:
        raise RunError(". ".join(failures))


def _keep_elsewhere(path: Path, write: Callable[[Path], None]) -> str:
    """Write a file that has no place to another folder, and say where."""
    for folder in (tempfile.gettempdir(), Path.cwd(), Path.home()):
        try:
            kept = Path(tempfile.mkdtemp(prefix="kept_", dir=folder)) / path.name
            write(kept)
        except (OSError, safetensors.SafetensorError):
            continue
        return f"it lies in {kept} instead: move it from there"
    return "nor can it be written in the folder for temporary files, here or at home: it is lost"


def check_plain(path: Path, folder: bool = False) -> None:
    """Raises a `UserError` where anything but a plain file, or a folder, lies at `path`; nothing may lie there."""
    if remote.is_address(path):
        return  # objects are nothing else
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        found = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "neither file nor folder"
        raise UserError(f"{path} is {found} where a {'folder' if folder else 'plain file'} belongs: move it away")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
      UserError: it is a folder, a pipe or the like, which reading would wait for, or not text.
      OSError: it does not exist, or cannot be read.
    """
    check_plain(path)
    try:
        with _asked(path):
            return remote.path(path).read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, in place of one that is there."""
    with whole(path) as unfinished:
        unfinished.write_text(text)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays under their names as NumPy's uncompressed archive."""
    with whole(path) as unfinished, unfinished.open("wb") as file:  # by name, NumPy would add a suffix
        np.savez(file, allow_pickle=False, **arrays)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image (H,W,C) uint8, C 1 or 3, as a PNG."""
    with whole(path) as unfinished:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(unfinished, format="PNG")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors under their names; safetensors writes memory as it lies, so each is made contiguous first."""
    with whole(path) as unfinished:
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        safetensors.numpy.save_file(contiguous, unfinished, dict(metadata or {}) or None)


def exists(path: str | os.PathLike) -> bool:
    """Whether a file or folder, or an object at an address, is there."""
    with _asked(path):
        return remote.path(path).exists()


def size(path: str | os.PathLike) -> int:
    """Of a file or object, in bytes.

    Raises:
      FileNotFoundError: there is none.
    """
    return remote.state(path)["size"] if remote.is_address(path) else os.stat(path).st_size


def modified(path: str | os.PathLike) -> float:
    """When a file or object was last written, in seconds by the clock of whoever keeps it."""
    return remote.state(path)["modified"] if remote.is_address(path) else os.stat(path).st_mtime


def touch(path: str | os.PathLike) -> None:
    """Let a file or object that is there be last written now."""
    if not remote.is_address(path):
        os.utime(path)
        return
    with remote.asked(path):
        found = remote.path(path)
        found.write_bytes(found.read_bytes())


def absolute(path: str | os.PathLike) -> Path:
    """A path from the root on; an address is one already."""
    found = remote.path(path)
    return found if remote.is_address(found) else found.absolute()


def move_folder(source: Path, target: Path) -> None:
    """Give a folder another name in the same place; folders above are made."""
    if remote.is_address(source):
        remote.move_folder(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)


def send_folder(folder: str | os.PathLike, address: Path) -> None:
    """Copy all files of a local folder to an address."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            remote.upload(path, address / os.path.relpath(path, folder))


def remove_folder(folder: Path) -> None:
    """Delete a folder with all it holds, as far as that is possible."""
    if remote.is_address(folder):
        with contextlib.suppress(OSError):
            remote.remove_folder(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _asked(path: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    return remote.asked(path) if remote.is_address(path) else contextlib.nullcontext()


_copies: dict[tuple[str, str], Path] = {}
"""Address and folder of copies -> the copy that this process has checked."""


def local(path: str | os.PathLike, cache: str | os.PathLike | None = None, sha256: str | None = None) -> Path:
    """A local file: the path itself, or a copy of what lies at an address.

    A copy is made once for all processes of a machine, appears whole, and is made again when the object's size or date
    (on Hugging Face: its tag) is another. Where Hugging Face cannot be asked, an earlier copy is taken as it is.

    Args:
      path: of a file.
      cache: folder of copies; by default `staged` in `cache_folder()`.
      sha256: of the content, compared when a copy is made.

    Raises:
      UserError: there is no such object, it cannot be reached, or what arrived is something else.
    """
    if not remote.is_address(path):
        return Path(path)
    folder = Path(cache) if cache else cache_folder() / "staged"
    key = os.fspath(path), str(folder)
    if key not in _copies or not _copies[key].is_file():
        try:
            _copies[key] = _copied(path, folder / remote.place(path), sha256)
        except FileNotFoundError as error:
            raise UserError(f"{os.fspath(path)} does not exist ({error.strerror})") from error
        except remote.Unreachable as error:
            raise UserError(f"{os.fspath(path)} cannot be fetched ({error.strerror})") from error
        except OSError as error:
            raise UserError(
                f"{os.fspath(path)} cannot be copied to {folder} ({error.strerror or error}): make room, or choose "
                "another folder (SRA_JAX_CACHE; of latents: --config.data.cache)"
            ) from error
    return _copies[key]


def _copied(address: str | os.PathLike, target: Path, sha256: str | None) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    note = target.with_name(f".{target.name}.source")
    with target.with_name(f".{target.name}.turn").open("w") as turn:
        with contextlib.suppress(OSError):  # a file system without locks: two copies may be made, the last stays
            fcntl.flock(turn, fcntl.LOCK_EX)
        kept = note.read_text() if target.is_file() and note.is_file() else None
        if kept is not None and remote.is_fixed(address):
            return target
        try:
            found = remote.state(address)
        except remote.Unreachable as error:
            if kept is None or remote.scheme(address) != remote.HUB:
                raise
            print(
                f"{os.fspath(address)} cannot be asked for ({error.strerror}): the copy here is used", file=sys.stderr
            )
            return target
        expected = found["size"]
        if kept == remote.describe(found) and expected in (None, target.stat().st_size):
            return target
        if expected is not None:
            check_room("a copy", target, expected)
        with whole(target) as unfinished:
            remote.download(address, unfinished)
            arrived = unfinished.stat().st_size
            if expected not in (None, arrived):
                raise remote.Unreachable(address, f"{arrived} of {expected} bytes arrived")
            for wanted in (sha256, remote.sha256_of(found)):
                if wanted is not None and remote.file_sha256(unfinished) != wanted:
                    raise remote.Unreachable(address, "what arrived has another checksum than was written")
        write_text(note, remote.describe(found))
    return target


COPIED_AT_ONCE = 8


def local_folder(
    folder: str | os.PathLike, names: Sequence[tuple[str, int, str | None]], cache: str | os.PathLike | None = None
) -> Path:
    """A local folder that holds files: the folder itself, or one with `local` copies where it is an address.

    Args:
      folder: that holds them.
      names: (name, bytes, SHA-256 or None) of each.
      cache: as `local` takes it.

    Raises:
      UserError: as `local`; or there is no room for them all.
    """
    if not remote.is_address(folder):
        return Path(folder)
    below = Path(cache) if cache else cache_folder() / "staged"
    target = below / remote.place(folder)
    missing = [(name, size) for name, size, _ in names if not (target / name).is_file()]
    if missing:
        total = sum(size for _, size in missing)
        check_room("a copy", target / missing[0][0], total)
        print(f"copying {len(missing)} files ({total / 1e9:.2f} GB) of {os.fspath(folder)} to {below}", file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(COPIED_AT_ONCE) as pool:
        addresses = [remote.inside(os.fspath(folder), name) for name, _, _ in names]
        for _ in pool.map(local, addresses, [cache] * len(names), [sha256 for _, _, sha256 in names]):
            pass
    return target


class Growing:
    """An object that is written piece by piece, as a file is that is opened for appending.

    What is written is held in memory. The object, which can only be replaced, is written anew at a `flush` when
    `GROWING_SECONDS` have passed, and at `sync` and `close`: a kill loses what came since.

    Args:
      path: an address.
      old: whether what is there already is kept; otherwise it must not be there.

    Raises:
      OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, old: bool):
        self._path = path
        with remote.asked(path):
            self._content = bytearray(path.read_bytes() if old and path.exists() else b"")
        self._sent = len(self._content)
        self._since = time.monotonic()

    def write(self, data: str | bytes) -> int:
        """Add to the end."""
        self._content += data.encode() if isinstance(data, str) else data
        return len(data)

    def flush(self) -> None:
        """Now and then, `sync`."""
        if time.monotonic() - self._since >= GROWING_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Everything is in the object after this."""
        if self._sent != len(self._content):
            with remote.asked(self._path):
                self._path.write_bytes(bytes(self._content))
            self._sent = len(self._content)
        self._since = time.monotonic()

    def tell(self) -> int:
        """Bytes so far."""
        return len(self._content)

    def close(self) -> None:
        """The same as `sync`."""
        self.sync()


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
                with _asked(self._file):
                    found = _read_record(self._file)
                    if found is not None and found.get("id") != self._record["id"]:
                        self._taken_by = found
                        return
                    if found is not None:  # None: cannot be read just now, or removed by hand
                        touch(self._file)
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
    At an address, where there is no flock, the last to write the object `.lock` in it has it; an owner on this machine
    whose process is gone is dead at once.

    Args:
      path: what is to be written. The folder in which the lock's file lies must exist.
      change: what a user may do instead of waiting, such as "choose another --workdir".

    Yields:
      The lock; `check()` tells a program that stood still whether the lock is still its own.

    Raises:
      Busy: another program holds it, and the message names the process, its machine, its start and its command.
      UserError: the lock's file cannot be written.
    """
    if remote.is_address(path):
        with _locked_address(remote.path(path), remote.path(path) / ".lock", change) as lock:
            yield lock
        return
    place = Path(path).absolute()
    file = place / ".lock" if place.is_dir() else place.with_name(f".{place.name}.lock")
    record = _record()
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


@contextlib.contextmanager
def locked_output(path: str | Path, change: str) -> Iterator[Lock]:
    """`locked`, of a file whose folder is made where it does not exist."""
    path = remote.path(path)
    if remote.is_address(path):
        with _locked_address(path, path.with_name(f".{path.name}.lock"), change) as lock:
            yield lock
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, change) as lock:
        yield lock


def _record() -> dict[str, Any]:
    """Who asks for a lock."""
    return {
        "id": uuid.uuid4().hex, "host": socket.gethostname(), "machine": _machine(), "namespace": _namespace(),
        "pid": os.getpid(), "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }  # fmt: skip


def _busy(path: Path, owner: Mapping[str, Any] | None, change: str) -> Busy:
    return Busy(f"{path} is being written by {_owner(owner)}: wait for it, end it, or {change}")


@contextlib.contextmanager
def _locked_address(path: Path, file: Path, change: str) -> Iterator[Lock]:
    """`locked` by an object that names its owner: whoever wrote last has it, and all look again after a moment."""
    record = _record()
    try:
        with remote.asked(file):
            found = _read_record(file)
            if found is not None and not _is_gone(found):
                _wait_for_silence(path, file, found, lambda owner: _busy(path, owner, change))
            file.write_text(json.dumps(record))
            time.sleep(1)
            found = _read_record(file)
    except OSError as error:
        raise UserError(f"{file}, the lock of {path}, cannot be written ({error.strerror})") from error
    if found is not None and found.get("id") != record["id"]:
        raise _busy(path, found, change)
    lock = Lock(path, file, record)
    try:
        yield lock
    finally:
        lock.release()
        with contextlib.suppress(OSError), remote.asked(file):  # who comes then waits until the beat is old
            found = _read_record(file)
            if found is not None and found.get("id") == record["id"]:
                file.unlink()


def _is_gone(record: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names was one of this machine and has ended."""
    if (record.get("machine"), record.get("namespace")) != (_machine(), _namespace()):
        return False
    try:
        os.kill(int(record["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, TypeError, ValueError):
        return False
    return False


def _acquire(path: Path, file: Path, record: Mapping[str, Any], change: str) -> int:
    """The open lock's file, locked and with our record in it."""

    def busy(owner: Mapping[str, Any] | None) -> Busy:
        return _busy(path, owner, change)

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
    if remote.is_address(file):
        return modified(file)
    with file.open("rb") as opened:  # opening is what makes NFS ask the server anew
        return os.fstat(opened.fileno()).st_mtime


def _now_at(file: Path) -> float:
    """The time by the clock that stamps files there, which may be a server's."""
    probe = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        probe.write_bytes(b"")
        return modified(probe)
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


def _namespace() -> str:
    """What processes have in common that number each other alike."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


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
