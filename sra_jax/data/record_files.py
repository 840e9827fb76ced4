"""Fixed-size records of ArrayRecord files, read straight into the arrays of a batch.

ArrayRecord's reader makes a `bytes` object of each record, and copies it more than once on the way there. A training
set is read over and over, so here a record is copied once, by one system call, from the page cache to its place in the
batch.

An ArrayRecord file is a Riegeli/records file, whose format is specified at
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md. Written with one record a chunk and
without compression, records of equal size lie at equal distances, interrupted only by a block header every 64 KiB. Each
file that is opened is checked for that against ArrayRecord's own reader; a file that is laid out in another way is read
with the latter.
"""

import collections
import contextlib
import errno
import os
import resource
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

# one record a chunk, and the low bits of moments are noise that no compression shortens
WRITER_OPTIONS = "group_size:1,uncompressed"
# what ArrayRecord advises for random access: no data beyond the record is read, no threads are started
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READ_BUFFER_BYTES = 1 << 15

_DESCRIPTORS = 2  # of an open RecordFile: ours and the reader's

_BLOCK = 1 << 16
_BLOCK_HEADER = 24
_BLOCK_CONTENT = _BLOCK - _BLOCK_HEADER
_CHUNK_HEADER = 40


class UnreadableFileError(Exception):
    """A file, `path`, or one of its records cannot be read."""

    def __init__(self, path: str, reason: object):
        super().__init__(f"{path} cannot be read ({reason})")
        self.path = path


class TooManyOpenFilesError(UnreadableFileError):
    """A file cannot be opened because this process has as many open as the system allows it."""

    def __init__(self, path: str):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        super().__init__(path, f"this process has as many files open as it may, {limit}: raise the limit, ulimit -n")


def room_for_files(wanted: int) -> int:
    """How many of `wanted` record files one set may keep open: with a quarter of the descriptors that are left.

    The soft limit is raised as far as it goes: many systems start with 1,024 and allow more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/dev/fd"))
    except OSError:  # not even this may be opened
        used = soft
    needed = used + 4 * _DESCRIPTORS * wanted
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - used) // (4 * _DESCRIPTORS)))


class RecordFile:
    """One ArrayRecord file open for reading; threads may share it.

    Attributes:
      path: of the file.
      descriptor: of the open file, closed when this object is no longer used.
      direct: whether the records lie where `locate` says.
    """

    def __init__(self, path: str, records: int, record_bytes: int):
        """Open a file of `records` records of `record_bytes` bytes each.

        Raises:
          UnreadableFileError: it is missing or damaged, or holds another number of records or records of another size.
          TooManyOpenFilesError: this process may open no more.
        """
        self.path = path
        self._record_bytes = record_bytes
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unopened(path, error) from error
        weakref.finalize(self, os.close, self.descriptor)
        try:
            self._reader = array_record_module.ArrayRecordReader(
                path, options=_READER_OPTIONS, file_reader_buffer_size=_READ_BUFFER_BYTES
            )
            found = self._reader.num_records()
        except (ValueError, RuntimeError, OSError) as error:
            raise UnreadableFileError(path, error) from error
        if found != records:
            try:
                os.close(os.dup(self.descriptor))  # the reader takes a file that it cannot open for an empty one
            except OSError as error:
                raise _unopened(path, error) from error
            raise UnreadableFileError(path, f"it holds {found} records instead of {records}")
        sample = np.unique([0, records // 2, records - 1])
        places = zip(*(values.tolist() for values in locate(sample, record_bytes)), strict=True)
        self.direct = all(
            _without_headers(os.pread(self.descriptor, span, offset), room) == self.read(record)
            for record, (offset, room, span) in zip(sample.tolist(), places, strict=True)
        )

    def read(self, record: int) -> bytes:
        """Record number `record` as ArrayRecord's reader gives it, which checks the hash that is stored with it.

        Raises:
          UnreadableFileError: it is damaged, or has another size.
        """
        try:
            content = self._reader.read([record])[0]
        except (ValueError, RuntimeError, OSError, IndexError) as error:
            raise UnreadableFileError(self.path, error) from error
        if len(content) != self._record_bytes:
            raise UnreadableFileError(
                self.path, f"record {record} has {len(content)} bytes instead of {self._record_bytes}"
            )
        return content


class OpenFiles:
    """The record files of a set, each opened when it is first read; picklable, threads may share it.

    Of more files than a process may have open, those that were not read for longest are closed.

    Args:
      paths: of the files.
      counts: records in each.
      record_bytes: of every record.
    """

    def __init__(self, paths: Sequence[str], counts: Sequence[int], record_bytes: int):
        self.paths = tuple(paths)
        self._counts, self._record_bytes = tuple(map(int, counts)), record_bytes
        self._start()

    def _start(self) -> None:
        self._files: collections.OrderedDict[int, RecordFile] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._room: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_lock", "_room")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __getitem__(self, number: int) -> RecordFile:
        """File `number`, open.

        Raises:
          UnreadableFileError: as `RecordFile` does.
        """
        with self._lock:
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
                return file
        with contextlib.suppress(TooManyOpenFilesError):
            file = self._open(number)
        if file is None:  # others in this process need more than was left to them
            with self._lock:
                self._files.clear()
            file = self._open(number)
        with self._lock:
            # two threads may both open the file: the later one stays, the other one closes with its last use
            self._files[number] = file
            while len(self._files) > self._most():
                self._files.popitem(last=False)
        return file

    def _open(self, number: int) -> RecordFile:
        return RecordFile(self.paths[number], self._counts[number], self._record_bytes)

    def _most(self) -> int:
        if self._room is None:
            self._room = room_for_files(len(self.paths))
        return self._room

    def read(self, numbers: np.ndarray, records: np.ndarray, parts: Sequence[np.ndarray]) -> None:
        """`read_records` of record `records[i]` of file `numbers[i]`, for each i; so many at a time as may be open."""
        step = len(numbers) if self._most() >= len(self.paths) else max(1, self._most() // 4)
        for start in range(0, len(numbers), step):
            rows = slice(start, start + step)
            # nothing else holds these files: they are closed when the next ones need their descriptors
            read_records(
                [self[number] for number in numbers[rows].tolist()], records[rows], [part[rows] for part in parts]
            )


def _unopened(path: str, error: OSError) -> UnreadableFileError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooManyOpenFilesError(path)
    return UnreadableFileError(path, error)


def locate(records: np.ndarray, record_bytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where records of `record_bytes` bytes lie in a file written with WRITER_OPTIONS.

    Args:
      records: numbers (N,) of the records in the file.
      record_bytes: size of each.

    Returns:
      Three (N,): the offset of a record's first byte in the file, how many of its bytes come before the first block
      header inside it, and from its first to its last byte how many there are in the file, block headers included.
    """
    # A chunk is its header, the compression (1 byte), the length of the list of sizes (1), that list: one varint, and
    # the record. The first chunk of a file, its signature, is a header and nothing else.
    before = _CHUNK_HEADER + 2 + -(-record_bytes.bit_length() // 7)
    start = _CHUNK_HEADER + records.astype(np.int64) * (before + record_bytes) + before  # block headers left out
    block, within = np.divmod(start, _BLOCK_CONTENT)
    room = _BLOCK_CONTENT - within
    headers = np.maximum(-(-(record_bytes - room) // _BLOCK_CONTENT), 0)
    return block * _BLOCK + _BLOCK_HEADER + within, room, record_bytes + headers * _BLOCK_HEADER


def read_records(files: Sequence[RecordFile], records: np.ndarray, parts: Sequence[np.ndarray]) -> None:
    """Read record `records[i]` of `files[i]` into row i of `parts`, for each i.

    The hashes that are stored with the records are not checked, unlike in `RecordFile.read`.

    Args:
      files: (N,), which may repeat.
      records: (N,) numbers of the records in their files.
      parts: contiguous uint8 arrays (N, bytes), filled here: the record's first bytes, those that follow, and so on;
        together as many as the files' records have.

    Raises:
      UnreadableFileError: a file ends early, or the system cannot read it.
    """
    record_bytes = sum(part.shape[1] for part in parts)
    places = list(zip(*(values.tolist() for values in locate(records, record_bytes)), strict=True))
    if hasattr(os, "posix_fadvise"):
        # what is not in memory is fetched together, not one record after the other
        for file, (offset, _, span) in zip(files, places, strict=True):
            os.posix_fadvise(file.descriptor, offset, span, os.POSIX_FADV_WILLNEED)
    rows = zip(*map(_rows, parts), strict=True)
    header = bytearray(_BLOCK_HEADER)
    for file, record, (offset, room, span), row in zip(files, records.tolist(), places, rows, strict=True):
        if not file.direct:
            _scatter(file.read(record), row)
            continue
        buffers = row if room >= record_bytes else list(_around_headers(row, room, header))
        try:
            count = os.preadv(file.descriptor, buffers, offset)
        except OSError as error:
            raise UnreadableFileError(file.path, error) from error
        if count != span:
            raise UnreadableFileError(file.path, f"it ends inside record {record}")


def _rows(part: np.ndarray) -> list[memoryview]:
    """Each row of a contiguous array (N, bytes) uint8 as a buffer to write to."""
    view, size = memoryview(part.reshape(-1).data), part.shape[1]
    return [view[start : start + size] for start in range(0, len(view), size)]


def _around_headers(buffers: Sequence[memoryview], room: int, header: bytearray) -> Iterator[memoryview | bytearray]:
    """The buffers, cut wherever a block header comes between their bytes, with `header` to take it."""
    for buffer in buffers:
        while len(buffer) > room:
            yield buffer[:room]
            yield header
            buffer, room = buffer[room:], _BLOCK_CONTENT
        yield buffer
        room -= len(buffer)


def _without_headers(content: bytes, room: int) -> bytes:
    """Bytes of a file as they are without block headers, the first of which comes after `room` bytes."""
    following = range(room + _BLOCK_HEADER, len(content), _BLOCK)
    return b"".join([content[:room], *(content[start : start + _BLOCK_CONTENT] for start in following)])


def _scatter(content: bytes, buffers: Sequence[memoryview]) -> None:
    """Copy bytes to the buffers, one after the other."""
    start = 0
    for buffer in buffers:
        buffer[:] = content[start : start + len(buffer)]
        start += len(buffer)
