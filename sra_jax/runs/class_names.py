"""classes.json: what a run's labels stand for, written when it starts and read by the tools."""

import json
from collections.abc import Sequence
from pathlib import Path

from sra_jax import files
from sra_jax.errors import UserError

CLASSES = "classes.json"


def write(workdir: Path, names: Sequence[str] | None) -> None:
    """Keep the names, in the order of their labels; None, of a set without names, writes nothing."""
    if names is not None:
        files.write_text(workdir / CLASSES, json.dumps(list(names), indent=0, ensure_ascii=False) + "\n")


def read(workdir: Path, num_classes: int) -> tuple[str, ...] | None:
    """One name a label of the run in `workdir`, or None where it has none or was made before they were kept.

    Raises:
      UserError: the file holds something else.
    """
    path = workdir / CLASSES
    if not files.exists(path):
        return None
    try:
        names = json.loads(files.read_text(path))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("it is no list of names")
        if len(names) != num_classes:
            raise ValueError(f"it has {len(names)} names and the run {num_classes} classes")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} does not hold the run's class names ({error}): delete it and use numbers") from error
    return tuple(names)

