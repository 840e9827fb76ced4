"""Moments that were encoded already: folders of .npy files as users of the PyTorch code have them.

`edm2:DIR` is a folder that EDM2's tool and its successors wrote: .npy files of shape (2C,H,W), the first C channels the
posterior's mean and the others its standard deviation, and dataset.json with `{"labels": [[file, class], ...]}`.
"""

import dataclasses
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from sra_jax.data.image_sources import existing_folder
from sra_jax.data.images import UnreadableImageError
from sra_jax.errors import UserError

# np.load parses a file's header with `ast`, which fails now and then in threads of Python 3.11
_HEADER_LOCK = threading.Lock()

LABEL_LIMIT = 2**31
"""Labels are stored as int32."""


def _whole(label: Any) -> int:
    if isinstance(label, bool) or not isinstance(label, int):
        raise TypeError(f"the label {label!r} is no whole number")
    return label


@dataclasses.dataclass(frozen=True)
class MomentsItem:
    """The place and the label of one example's moments."""

    where: str
    path: Path
    label: int

    def read(self) -> np.ndarray:
        """Moments (2,H,W,C) float32: mean, standard deviation.

        Raises:
          UnreadableImageError: the file is missing, damaged or holds something else.
        """
        try:
            content = io.BytesIO(self.path.read_bytes())
            with _HEADER_LOCK:
                array = np.load(content)
        except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:  # a header may claim any size
            raise UnreadableImageError(str(error) or type(error).__name__) from error
        if not isinstance(array, np.ndarray):
            raise UnreadableImageError("is an archive of arrays, not one array")
        if array.ndim != 3 or array.shape[0] % 2 or not np.issubdtype(array.dtype, np.floating):
            raise UnreadableImageError(f"holds {array.dtype}{list(array.shape)}, not moments (2C,H,W)")
        mean, std = np.split(array.astype(np.float32), 2)
        if not np.isfinite(array).all():
            raise UnreadableImageError("holds NaN or infinite values")
        if not (std >= 0).all():
            raise UnreadableImageError("its second half is no standard deviation: it has negative values")
        return np.stack([np.moveaxis(mean, 0, -1), np.moveaxis(std, 0, -1)])


class MomentsFolder:
    """The examples of an `edm2:DIR` in the order of their names. No class names are stored there."""

    class_names = None
    left_out = ""

    def __init__(self, path: str):
        self._folder = existing_folder(path, ".npy files of moments and dataset.json")
        listing = self._folder / "dataset.json"
        try:
            if not listing.is_file():
                raise UserError(f"{self._folder} has no dataset.json with the labels of its .npy files")
            labels = json.loads(listing.read_text())["labels"]
            self._labels = sorted((str(name), _whole(label)) for name, label in labels)
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f'{listing} does not hold {{"labels": [["file.npy", class], ...]}}: {error!r}') from error
        if not self._labels:
            raise UserError(f"{listing} lists no example")
        lowest, highest = (end(label for _, label in self._labels) for end in (min, max))
        if not 0 <= lowest <= highest < LABEL_LIMIT:
            raise UserError(f"{listing}: labels run from {lowest} to {highest}, allowed is 0 to {LABEL_LIMIT - 1}")
        for name, _ in self._labels:
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise UserError(f"{listing} names {name}, which is not inside {self._folder}")
        self.num_classes = max(label for _, label in self._labels) + 1
        try:
            self.shape = self[0].read().shape  # (2,H,W,C)
        except UnreadableImageError as error:
            raise UserError(f"{self[0].where}, the first of {listing}, cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> MomentsItem:
        name, label = self._labels[index]
        path = self._folder / name
        return MomentsItem(str(path), path, label)

    def items(self, start: int, stop: int) -> Iterator[MomentsItem]:
        """The examples start..stop-1 in order."""
        return (self[index] for index in range(start, stop))

    def fingerprint(self) -> str:
        """Changes with the names and labels."""
        return hashlib.sha256(json.dumps(self._labels).encode()).hexdigest()
