"""Files that appear only whole: a program that is killed while it writes leaves the old file, or none."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image


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
