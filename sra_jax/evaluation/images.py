"""Sets of images on disk, read batch by batch: an npz as ADM's suite writes it, or a folder of image files."""

import contextlib
import dataclasses
import hashlib
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from sra_jax.data import image_files
from sra_jax.data.image_files import IMAGE_SUFFIXES
from sra_jax.data.images import UnreadableImageError, opened
from sra_jax.errors import UserError
from sra_jax.files import local

IN_MEMORY_BATCH = 256

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
      class_names: one name a label, or None where labels are only numbers.
      left_out: what lies there and is not in the set, in words; empty where nothing is.
    """

    name: str
    shape: tuple[int, int, int, int]
    labels: np.ndarray | None
    read: Callable[[int], Iterator[np.ndarray]]
    class_names: tuple[str, ...] | None = None
    left_out: str = ""

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

    def in_memory(self) -> "ImageSet":
        """The same set, read now, with a progress bar: what is read more than once is decoded once."""
        parts = []
        with tqdm(total=len(self), desc=f"reading {self.name}", unit="image", dynamic_ncols=True) as bar:
            for images in self.read(IN_MEMORY_BATCH):
                parts.append(images)
                bar.update(len(images))
        return dataclasses.replace(self, read=reader(np.concatenate(parts)))


def reader(images: np.ndarray) -> Callable[[int], Iterator[np.ndarray]]:
    """`ImageSet.read` of an array (N,H,W,C) uint8."""

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size]

    return read


class Digest:
    """A checksum of images as they stream by.

    Attributes:
      text: 16 hexadecimal digits that stand for all images so far, in their order.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def watched(self, batches: Iterable[ImageBatch]) -> Iterator[ImageBatch]:
        """The same batches, counted in as they pass; how they are cut makes no difference."""
        for images, labels in batches:
            self._digest.update(np.ascontiguousarray(images).tobytes())
            yield images, labels

    @property
    def text(self) -> str:
        return self._digest.hexdigest()[:16]


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
    if len(shape) != 4 or shape[-1] not in (1, 3) or min(shape[1:3]) < 1:
        raise UserError(f"{source} has the shape {tuple(shape)}; expected (images, height, width, 1 or 3 channels)")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns the many ways in which a damaged npz fails into one message."""
    try:
        yield
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, KeyError, OSError, NotImplementedError,
        RuntimeError, MemoryError,
    ) as error:  # fmt: skip
        raise UserError(f"{path} cannot be read as npz: {error}. Is it complete?") from error


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an npz file.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
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
    with _readable(path), zipfile.ZipFile(path) as archive, np.load(path) as arrays:
        for name in names:
            _header_of(archive, name)
        return {name: arrays[name] for name in names}


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _header_of(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, column-major order and type of an array, which is as long as they say: nothing is allocated on a lie."""
    with archive.open(f"{name}.npy") as member:
        shape, fortran_order, dtype = _read_header(member)
        start = member.tell()
    expected, found = start + math.prod(shape) * dtype.itemsize, archive.getinfo(f"{name}.npy").file_size
    if not dtype.hasobject and (expected != found or min(shape, default=0) < 0):
        raise ValueError(f"{name} should be {dtype}{list(shape)}, {expected} bytes, and has {found}")
    return shape, fortran_order, dtype


def open_npz(path: Path, *, name: str | None = None) -> ImageSet:
    """Images `arr_0` (N,H,W,C) uint8 and labels `arr_1` (N,), if there, of a file as ADM's suite reads it.

    An array `class_names` (K,) of text, which tools/sample.py writes, says what the labels stand for. Images are read
    from the archive as they are needed: memory holds one batch of them.

    Raises:
      UserError: there is no such file, it is damaged, holds no image, or an `arr_0` of a wrong type or shape.
    """
    names = npz_names(path)
    if "arr_0" not in names:
        raise UserError(f"{path} holds no images: expected an array arr_0 (N,H,W,C) uint8, found {', '.join(names)}")
    with _readable(path), zipfile.ZipFile(path) as archive:
        shape, fortran_order, dtype = _header_of(archive, "arr_0")
    _check_header(shape, dtype, f"arr_0 of {path}")
    if not shape[0]:
        raise UserError(f"{path} holds no image: its arr_0 has the shape {shape}")
    if fortran_order:
        raise UserError(f"arr_0 of {path} is stored in column-major order; save numpy.ascontiguousarray of it")
    labels = read_npz(path, ["arr_1"])["arr_1"] if "arr_1" in names else None
    if labels is not None and (labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise UserError(
            f"labels arr_1 of {path} are {labels.dtype} of shape {labels.shape}; expected {shape[0]} integers"
        )

    class_names = None
    if labels is not None and "class_names" in names:
        class_names = tuple(map(str, np.atleast_1d(read_npz(path, ["class_names"])["class_names"])))
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise UserError(
                f"labels arr_1 of {path} run from {labels.min()} to {labels.max()}, and it names {len(class_names)} "
                "classes"
            )

    def read(batch_size: int) -> Iterator[np.ndarray]:
        with _readable(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            image_bytes = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                data = member.read(count * image_bytes)
                if len(data) < count * image_bytes:
                    raise EOFError(f"arr_0 ends after {start + len(data) // image_bytes} of {shape[0]} images")
                yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])

    count, height, width, channels = shape
    labels = None if labels is None else labels.astype(np.int64)
    return ImageSet(name or path.stem, (count, height, width, channels), labels, read, class_names)


def _decode(path: Path) -> np.ndarray:
    """(H,W,C) uint8: one channel for greyscale files, three for all others."""
    try:
        with opened(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UnreadableImageError(
                    f"it has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits"
                )
            array = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except UnreadableImageError as error:
        raise UserError(f"{path} is not a readable image: {error}") from error
    return array[:, :, None] if array.ndim == 2 else array


def open_folder(folder: Path, *, name: str | None = None) -> ImageSet:
    """All image files in a folder; its subfolders, sorted by their names as text, are classes (torchvision's order).

    Raises:
      UserError: no images, some in subfolders and some not, a file is damaged or of another size than the first.
    """
    tree = image_files.walk(folder)
    classes = {name: files for name, files in tree.classes.items() if files}
    if classes and tree.beside:
        raise UserError(
            f"{folder} holds images both beside and inside subfolders, which stand for classes; separate them"
        )
    paths = [folder / file for files in (tree.beside, *classes.values()) for file in files]
    if not paths:
        raise UserError(f"{folder} holds no {', '.join(IMAGE_SUFFIXES)} files")
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()]) if classes else None
    first: tuple[int, ...] = _decode(paths[0]).shape
    height, width, channels = first

    def decode(path: Path) -> np.ndarray:
        image = _decode(path)
        if image.shape != first:
            raise UserError(
                f"{path} is {image.shape}, {paths[0]} is {first} (height, width, channels); all must be alike"
            )
        return image

    def read(batch_size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), batch_size):
                yield np.stack(list(pool.map(decode, paths[start : start + batch_size])))

    return ImageSet(
        name or folder.resolve().name, (len(paths), height, width, channels), labels, read, tuple(classes) or None,
        image_files.described(tree.left_out),
    )  # fmt: skip


def open_images(path: str | Path, *, name: str | None = None) -> ImageSet:
    """A set of images from an npz file or a folder.

    Raises:
      UserError: it is neither, or damaged; see `open_npz` and `open_folder`.
    """
    path = local(path)
    if path.is_dir():
        return open_folder(path, name=name)
    if path.suffix == ".npz":
        return open_npz(path, name=name)
    raise UserError(
        f"{path} is {'no npz file' if path.exists() else 'not there'}: expected an npz file or a folder of images"
    )
