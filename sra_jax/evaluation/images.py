"""Sets of images on disk, read batch by batch: an npz as ADM's suite writes it, or a folder of png and jpg files."""

import contextlib
import dataclasses
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sra_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")

# Images (B,H,W,C) uint8 and their labels (B,) or None.
ImageBatch = tuple[np.ndarray, np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size, and labels if there are any.

    Attributes:
      name: of the set, for results.
      shape: (N,H,W,C), C is 1 or 3.
      labels: (N,) int64, or None.
      read: `read(batch_size)` yields arrays (B,H,W,C) uint8, in order, the last one shorter.
    """

    name: str
    shape: tuple[int, int, int, int]
    labels: np.ndarray | None
    read: Callable[[int], Iterator[np.ndarray]]

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """Yields (images (B,H,W,C) uint8, labels (B,) or None) in order, B at most `batch_size`.

        Raises:
          UserError: an image is damaged, or the file ends early.
        """
        done = 0
        for images in self.read(batch_size):
            labels = None if self.labels is None else self.labels[done : done + len(images)]
            done += len(images)
            yield images, labels


def check_images(images: np.ndarray, source: str) -> None:
    """Refuses what is not a batch (N,H,W,C) of uint8 images with one or three channels.

    Raises:
      UserError: wrong type or shape.
    """
    _check_header(images.shape, images.dtype, source)


def _check_header(shape: tuple[int, ...], dtype: np.dtype, source: str) -> None:
    if dtype != np.uint8:
        raise UserError(
            f"{source} holds {dtype} values; expected uint8 images, 0 to 255 (round and clip before saving)"
        )
    if len(shape) != 4 or shape[-1] not in (1, 3):
        raise UserError(f"{source} has the shape {tuple(shape)}; expected (images, height, width, 1 or 3 channels)")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns the many ways in which a damaged npz fails into one message."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as npz: {error}. Is it complete?") from error


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an npz file.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with _readable(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_npz(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """The named arrays of an npz file, none of which may hold Python objects.

    Raises:
      UserError: there is no such file, it is damaged, or an array is missing.
    """
    missing = set(names) - set(npz_names(path))
    if missing:
        raise UserError(f"{path} holds no {', '.join(sorted(missing))}, only {', '.join(npz_names(path))}")
    with _readable(path), np.load(path) as arrays:
        return {name: arrays[name] for name in names}


def _read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def open_npz(path: Path, *, name: str | None = None) -> ImageSet:
    """Images `arr_0` (N,H,W,C) uint8 and labels `arr_1` (N,), if there, of a file as ADM's suite reads it.

    Images are read from the archive as they are needed: memory holds one batch of them.

    Raises:
      UserError: there is no such file, it is damaged, holds no `arr_0`, or that is of a wrong type or shape.
    """
    names = npz_names(path)
    if "arr_0" not in names:
        raise UserError(f"{path} holds no images: expected an array arr_0 (N,H,W,C) uint8, found {', '.join(names)}")
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        shape, fortran_order, dtype = _read_header(member)
    _check_header(shape, dtype, f"arr_0 of {path}")
    if fortran_order:
        raise UserError(f"arr_0 of {path} is stored in column-major order; save numpy.ascontiguousarray of it")
    labels = read_npz(path, ["arr_1"])["arr_1"] if "arr_1" in names else None
    if labels is not None and (labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise UserError(
            f"labels arr_1 of {path} are {labels.dtype} of shape {labels.shape}; expected {shape[0]} integers"
        )

    def read(batch_size):
        with _readable(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            image_bytes = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                data = member.read(count * image_bytes)
                if len(data) < count * image_bytes:
                    raise EOFError(f"arr_0 ends after {start + len(data) // image_bytes} of {shape[0]} images")
                yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])

    return ImageSet(name or path.stem, shape, None if labels is None else labels.astype(np.int64), read)


def _decode(path: Path) -> np.ndarray:
    """(H,W,C) uint8: one channel for greyscale files, three for all others."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{path} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
            array = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    return array[:, :, None] if array.ndim == 2 else array


def open_folder(folder: Path, *, name: str | None = None) -> ImageSet:
    """All png and jpg files in a folder, sorted by path; names of subfolders, sorted, are classes.

    Raises:
      UserError: no images, some in subfolders and some not, a file is damaged or of another size than the first.
    """
    paths = sorted(
        Path(parent) / file for parent, _, files in os.walk(folder) for file in files if file.lower().endswith(SUFFIXES)
    )
    if not paths:
        raise UserError(f"{folder} holds no {', '.join(SUFFIXES)} files")
    parents = [path.parent.relative_to(folder) for path in paths]
    classes = sorted(set(parents))
    if len(classes) > 1 and Path(".") in classes:
        raise UserError(
            f"{folder} holds images both beside and inside subfolders, which stand for classes; separate them"
        )
    labels = None if classes == [Path(".")] else np.array([classes.index(parent) for parent in parents])
    first = _decode(paths[0]).shape

    def decode(path):
        image = _decode(path)
        if image.shape != first:
            raise UserError(
                f"{path} is {image.shape}, {paths[0]} is {first} (height, width, channels); all must be alike"
            )
        return image

    def read(batch_size):
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), batch_size):
                yield np.stack(list(pool.map(decode, paths[start : start + batch_size])))

    return ImageSet(name or folder.name, (len(paths), *first), labels, read)


def open_images(path: str | Path, *, name: str | None = None) -> ImageSet:
    """A set of images from an npz file or a folder.

    Raises:
      UserError: it is neither, or damaged; see `open_npz` and `open_folder`.
    """
    path = Path(path)
    if path.is_dir():
        return open_folder(path, name=name)
    if path.suffix == ".npz":
        return open_npz(path, name=name)
    raise UserError(
        f"{path} is {'no npz file' if path.exists() else 'not there'}: expected an npz file or a folder of images"
    )
