"""Metrics of a run: metrics.jsonl, one object a logged step, and TensorBoard events of the same."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sra_jax import files, remote
from sra_jax.errors import UserError
from sra_jax.runs import events

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
RUN_SECONDS, GOODPUT = "time/run_seconds", "time/goodput"
CLOCKED = ("steps_per_second", "examples_per_second")


def clocked(name: str) -> bool:
    """Whether a logged value is of the clock or the devices, and so differs between equal runs."""
    return name in CLOCKED or name.startswith(("time/", "device/"))


def read(workdir: Path) -> list[dict[str, float]]:
    """All logged records; a last line that a kill cut short is left out.

    Raises:
      UserError: a line is not a record of a step, or the file is not one.
    """
    path = workdir / FILE
    if not files.exists(path):
        return []
    whole, _, _ = files.read_text(path).rpartition("\n")
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is not a record of a step: {line[:80]!r}. Remove the line, or move the file "
                "away"
            ) from error
        records.append(record)
    return records


def keep_until(workdir: Path, step: int) -> None:
    """Drop records of steps after `step`: the resumed run makes them again."""
    path = workdir / FILE
    if not files.exists(path):
        return
    files.write_text(path, "".join(json.dumps(r) + "\n" for r in read(workdir) if r["step"] <= step))


class Writer:
    """Appends records; used by process 0 only. Its methods raise `OSError` where a file cannot be written.

    Args:
      workdir: the run's.
      further: other writers, with the methods `write`, `image` and `close`, that are told the same.
    """

    def __init__(self, workdir: Path, further: Sequence[Any] = ()):
        self._failed = False
        self._further = further
        path = workdir / FILE
        self._file = files.Growing(path, old=True) if remote.is_address(path) else path.open("a")
        self._events = events.Writer(workdir / EVENTS)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._failed = True
            raise

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record. Several may have the same step, with different keys."""
        with self._writing():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            self._events.write_scalars(step, dict(values))
        for other in self._further:
            other.write(step, values)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H,W,C) uint8 among the events."""
        with self._writing():
            self._events.write_images(step, {name: picture[None]})
        for other in self._further:
            other.image(step, name, picture)

    def sync(self) -> None:
        """What was written is in the files, and in the objects at an address, which else follow every half minute."""
        with self._writing():
            if isinstance(self._file, files.Growing):
                self._file.sync()
            self._events.sync()

    def close(self) -> None:
        """Everything is on disk after this, unless a write failed before."""
        for other in self._further:
            other.close()
        for part in (self._file.close, self._events.flush, self._events.close):
            with contextlib.suppress(OSError) if self._failed else self._writing():
                part()
