"""Metrics of a run: metrics.jsonl, one object a logged step, and TensorBoard events of the same."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sra_jax import files
from sra_jax.runs import events

FILE = "metrics.jsonl"
EVENTS = "tensorboard"


def read(workdir: Path) -> list[dict[str, float]]:
    """All logged records; a last line that a kill cut short is left out."""
    path = workdir / FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def keep_until(workdir: Path, step: int) -> None:
    """Drop records of steps after `step`: the resumed run makes them again."""
    path = workdir / FILE
    if not path.exists():
        return
    files.write_text(path, "".join(json.dumps(r) + "\n" for r in read(workdir) if r["step"] <= step))


class Writer:
    """Appends records; used by process 0 only."""

    def __init__(self, workdir: Path):
        self._file = (workdir / FILE).open("a")
        self._events = events.Writer(workdir / EVENTS)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One record. Several may have the same step, with different keys."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        self._events.write_scalars(step, dict(values))

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture (H,W,C) uint8 among the events."""
        self._events.write_images(step, {name: picture[None]})

    def close(self) -> None:
        """Everything is on disk after this."""
        self._file.close()
        self._events.flush()
        self._events.close()
