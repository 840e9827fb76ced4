"""Addresses as epath's paths, by fsspec.

epath's own class for gs:// goes through TensorFlow wherever it is installed, whose import takes seconds, and reads
listings from a memory of its own that other programs' writes do not reach.
"""

import datetime
import functools
import os
import pathlib
import types
from collections.abc import Iterator
from typing import IO, Any

import fsspec
from etils import epath

DATES = ("mtime", "updated", "LastModified", "last_modified", "created")
"""Where the file systems of fsspec say when an object was written."""

TAGS = ("etag", "ETag", "generation", "md5Hash")
"""Where they say what tells one version of it from another."""


@functools.cache
def file_system(scheme: str) -> fsspec.AbstractFileSystem:
    """The file system of a scheme; it asks for every listing anew."""
    return fsspec.filesystem(scheme, use_listings_cache=False)


class Address(epath.Path):
    """An object, or the beginning of its name as a folder, at SCHEME://BUCKET/NAME, with the methods of a path.

    A folder is there as long as an object is in it. Methods raise what the file system raises.
    """

    @property
    def _files(self) -> fsspec.AbstractFileSystem:
        return file_system(str(self).partition("://")[0])

    def _at(self, name: str) -> "Address":
        """A path of the same scheme, of a name as the file system gives it."""
        return type(self)(f"{str(self).partition('://')[0]}://{name.partition('://')[2] or name.lstrip('/')}")

    def __str__(self) -> str:
        scheme, _, rest = super().__str__().partition(":")
        return f"{scheme}://{rest.lstrip('/')}"

    def __fspath__(self) -> str:
        return str(self)

    def as_uri(self) -> str:
        """The address."""
        return str(self)

    def exists(self) -> bool:
        """Whether there is an object, or one below."""
        return self._files.exists(str(self))

    def is_dir(self) -> bool:
        """Whether there is an object below."""
        return self._files.isdir(str(self))

    def is_file(self) -> bool:
        """Whether there is an object."""
        return self._files.isfile(str(self))

    def iterdir(self) -> Iterator["Address"]:
        """The objects and folders in this folder."""
        own = str(self).partition("://")[2].strip("/")
        for name in self._files.ls(str(self), detail=False):
            if name.strip("/") != own:
                yield self._at(name.rstrip("/"))

    def glob(self, pattern: str) -> Iterator["Address"]:
        """Those whose names match."""
        return (self._at(name) for name in self._files.glob(str(self / pattern)))

    def walk(self, *, top_down: bool = True, on_error: Any = None) -> Iterator[tuple["Address", list[str], list[str]]]:
        """(folder, names of folders in it, names of objects in it) of this folder and all below."""
        for folder, folders, names in self._files.walk(str(self), topdown=top_down, on_error=on_error or "omit"):
            yield self._at(folder), list(folders), list(names)

    def relative_to(self, other: str | os.PathLike) -> pathlib.PurePosixPath:
        """What follows a folder's name."""
        return pathlib.PurePosixPath(os.path.relpath(str(self), os.fspath(other)))

    def expanduser(self) -> "Address":
        """The same: nothing here has a home."""
        return self

    def absolute(self) -> "Address":
        """The same."""
        return self

    def resolve(self, strict: bool = False) -> "Address":
        """The same."""
        return self

    def open(self, mode: str = "r", encoding: str | None = None, errors: str | None = None, **_: Any) -> IO[Any]:
        """A file; one that is written appears when it is closed."""
        return self._files.open(str(self), mode)

    def read_bytes(self) -> bytes:
        """The whole content."""
        return self._files.cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        """The whole content as text."""
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        """Write an object whole, in place of one that is there."""
        self._files.pipe_file(str(self), data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        """Write text, in place of what is there."""
        self.write_bytes(data.encode(encoding or "utf-8"))
        return len(data)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Make an empty object where there is none."""
        if not self.exists():
            self.write_bytes(b"")
        elif not exist_ok:
            raise FileExistsError(str(self))

    def stat(self) -> Any:
        """`is_directory`, `length` in bytes, `mtime` in seconds, and `tag`, which another version does not have."""
        found = self._files.info(str(self))
        date = next((found[name] for name in DATES if found.get(name)), 0)
        if isinstance(date, str):
            date = datetime.datetime.fromisoformat(date)
        seconds = date.timestamp() if isinstance(date, datetime.datetime) else float(date)
        return types.SimpleNamespace(
            is_directory=found.get("type") == "directory", length=found.get("size"), mtime=seconds, owner=None,
            group=None, mode=None, tag="-".join(str(found[name]) for name in TAGS if found.get(name)),
        )  # fmt: skip

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object."""

    def rmdir(self) -> None:
        """Nothing: a folder is gone with its last object."""

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove all objects below."""
        try:
            self._files.rm(str(self), recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        try:
            self._files.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def copy(self, dst: str | os.PathLike, overwrite: bool = False) -> "Address":
        """Copy an object within the storage."""
        target = type(self)(os.fspath(dst))
        if not overwrite and target.exists():
            raise FileExistsError(str(target))
        self._files.cp_file(str(self), str(target))
        return target

    def rename(self, target: str | os.PathLike) -> "Address":
        """Copy an object, or all below, to another name and remove them here."""
        other = type(self)(os.fspath(target))
        if other.exists():
            raise FileExistsError(str(other))
        return self.replace(other)

    def replace(self, target: str | os.PathLike) -> "Address":
        """`rename`, in place of what is there."""
        other = type(self)(os.fspath(target))
        names = self._files.find(str(self))
        for path in map(self._at, names):
            path.copy(other / path.relative_to(self) if str(path) != str(self) else other, overwrite=True)
        for path in map(self._at, names):
            path.unlink(missing_ok=True)
        return other


def register(schemes: list[str]) -> None:
    """Have epath make an `Address` of these schemes from here on, for every package that uses it."""
    epath.register_path_cls([f"{scheme}://" for scheme in schemes])(Address)
