"""Labelled images from where users have them, named by one string each.

    tfds:NAME[:VERSION][:SPLIT]   a TFDS image classification set prepared on disk (TFDS_DATA_DIR says where)
    imagefolder:DIR               one folder a class with jpg, png or webp files, at any depth
    idx:DIR[:train|t10k]          MNIST's format: train-images-idx3-ubyte and -labels-idx1-ubyte, also with .gz
    sklearn:photos                scikit-learn's two sample photographs, a class each

`edm2:DIR` (moments that were already encoded) is in `sra_jax.data.moments`.
"""

import dataclasses
import gzip
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sra_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageItem:
    """One labelled image, not read yet.

    Attributes:
      where: names it in messages.
      content: what `sra_jax.data.images.read_image` takes.
      label: in [0, num_classes).
    """

    where: str
    content: bytes | Path | np.ndarray
    label: int


class ImageSource(Protocol):
    """Labelled images in a fixed order. Picklable.

    Attributes:
      num_classes: labels run from 0 to num_classes - 1.
      class_names: one name a class, or None where the set has none.
      random_access: whether `source[index]` works; `items` works always.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    random_access: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageItem: ...

    def items(self, start: int, stop: int) -> Iterator[ImageItem]:
        """The images start..stop-1 in order."""

    def fingerprint(self) -> str:
        """Changes when the set's contents or order change, so far as that is seen without reading every image."""


class _RandomAccess:
    """`items` of a source by its `__getitem__`."""

    random_access = True

    def items(self, start: int, stop: int) -> Iterator[ImageItem]:
        return (self[index] for index in range(start, stop))


def _digest(parts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def existing_folder(path: str, what: str) -> Path:
    """`path` as a folder that exists; else a UserError that says `what` it should hold."""
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        raise UserError(f"no folder at {path!r}: it should hold {what}")
    return folder


class ImageFolder(_RandomAccess):
    """Class folders of image files; classes are numbered in the order of their names, files in that of their paths."""

    def __init__(self, path: str):
        folder = existing_folder(path, f"one folder a class, with {', '.join(IMAGE_SUFFIXES)} files")
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        if not classes:
            raise UserError(f"{folder} has no class folders: put the images of each class into a folder of its own")
        self._folder = folder
        self._files: list[str] = []
        self._labels: list[int] = []
        for label, name in enumerate(classes):
            files = sorted(
                os.path.relpath(os.path.join(parent, file), folder)
                for parent, _, names in os.walk(folder / name, followlinks=True)
                for file in names
                if file.lower().endswith(IMAGE_SUFFIXES)
            )
            if not files:
                raise UserError(f"{folder / name} holds no {', '.join(IMAGE_SUFFIXES)} file: fill or remove this class")
            self._files += files
            self._labels += [label] * len(files)
        self.class_names: tuple[str, ...] | None = tuple(classes)
        self.num_classes = len(classes)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> ImageItem:
        path = self._folder / self._files[index]
        return ImageItem(str(path), path, self._labels[index])

    def fingerprint(self) -> str:
        return _digest(iter(self._files))


class IdxFolder(_RandomAccess):
    """Images and labels in MNIST's IDX files."""

    class_names = None

    def __init__(self, path: str):
        match = re.fullmatch(r"(.*?)(?::(train|t10k))?", path)
        self._split = match.group(2) or "train"
        self._folder = existing_folder(match.group(1), f"{self._split}-images-idx3-ubyte and -labels-idx1-ubyte")
        labels = self._read("labels-idx1-ubyte", 1)
        self._images: np.ndarray | None = self._read("images-idx3-ubyte", 3)
        if len(labels) != len(self._images):
            raise UserError(f"{self._folder}: {len(self._images)} {self._split} images but {len(labels)} labels")
        if not len(labels):
            raise UserError(f"{self._folder}: the {self._split} files hold no image")
        self._labels = labels
        self.num_classes = int(labels.max()) + 1

    def _read(self, suffix: str, axes: int) -> np.ndarray:
        plain = self._folder / f"{self._split}-{suffix}"
        path = plain if plain.is_file() else plain.with_name(plain.name + ".gz")
        if not path.is_file():
            raise UserError(f"{self._folder} has neither {plain.name} nor {path.name}")
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                data = file.read()
            kind, *shape = struct.unpack_from(f">{1 + axes}I", data)
            values = np.frombuffer(data, np.uint8, offset=4 * (1 + axes))
            if kind != 0x0800 + axes:
                raise ValueError(f"its first four bytes are {kind:#010x}, not {0x0800 + axes:#010x}")
            return values.reshape(shape)
        except (OSError, EOFError, ValueError, struct.error) as error:
            raise UserError(f"{path} is not an IDX file of bytes with {axes} axes: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # worker processes read the file themselves: cheaper than sending the whole set to each
        return {**self.__dict__, "_images": None}

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> ImageItem:
        if self._images is None:
            self._images = self._read("images-idx3-ubyte", 3)
        where = f"{self._folder}: {self._split} image {index}"
        return ImageItem(where, self._images[index], int(self._labels[index]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self._labels.tobytes()).hexdigest()


class SamplePhotos(_RandomAccess):
    """scikit-learn's two photographs, 640x427 pixels: enough to try every command without a download."""

    class_names: tuple[str, ...] | None = ("china", "flower")
    num_classes = 2

    def __init__(self, path: str):
        if path != "photos":
            raise UserError(f"sklearn:{path} is unknown: the only one is sklearn:photos")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> ImageItem:
        from sklearn.datasets import load_sample_image

        name = f"{self.class_names[index]}.jpg"
        return ImageItem(f"sklearn:{name}", load_sample_image(name), index)

    def fingerprint(self) -> str:
        return _digest(iter(self.class_names))


class TfdsImages:
    """A TFDS set with the features `image` and `label` that is on disk already; nothing is downloaded.

    Sets prepared as array_record (`download_and_prepare(file_format="array_record")`) have random access; those
    prepared as tfrecord, TFDS's default, are read in order.
    """

    def __init__(self, path: str):
        match = re.fullmatch(r"(?P<name>[\w./+-]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(?P<split>[A-Za-z_].*))?", path)
        if match is None:
            raise UserError(f"tfds:{path} is not tfds:NAME[:VERSION][:SPLIT], e.g. tfds:imagenet2012:5.1.0:train")
        self._name, self._split = match["name"], match["split"] or "train"
        builder = self._builder()
        info = builder.info
        if not {"image", "label"} <= set(info.features or ()) or not hasattr(info.features["label"], "names"):
            raise UserError(f"tfds:{path} is no image classification set: its features are {list(info.features)}")
        try:
            self._length = info.splits[self._split].num_examples
        except (KeyError, ValueError) as error:
            raise UserError(f"tfds:{path}: no split {self._split!r}, only {', '.join(info.splits)}") from error
        from tensorflow_datasets.core.file_adapters import FileFormat

        self.random_access = any(kind in FileFormat.with_random_access() for kind in info.available_file_formats())
        if not self.random_access and self._split not in info.splits:
            raise UserError(
                f"tfds:{path}: a part of a split can be read only from a set prepared with "
                f'file_format="array_record", and this one is {info.file_format.value}'
            )
        self.class_names: tuple[str, ...] | None = tuple(info.features["label"].names)
        self.num_classes = info.features["label"].num_classes
        self._data: Any = None

    def _builder(self) -> Any:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"tfds:{self._name} needs the package tensorflow-datasets ({error})") from error
        try:
            builder = tfds.builder(self._name)
        except (ValueError, OSError, LookupError, tfds.core.registered.DatasetNotFoundError) as error:
            raise UserError(f"tfds:{self._name} is neither known to TFDS nor on disk: {str(error)[:300]}") from error
        if not builder.is_prepared():
            raise UserError(
                f"tfds:{self._name} is not on disk (looked in {builder.data_dir}): prepare it with "
                f"tfds.builder({self._name!r}).download_and_prepare(), or set TFDS_DATA_DIR to the folder that has it"
            )
        return builder

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def __len__(self) -> int:
        return self._length

    def _item(self, index: int, example: Any) -> ImageItem:
        name = example.get("file_name")
        name = name.decode() if isinstance(name, bytes) else name
        where = f"tfds:{self._name}:{self._split}[{index}]" + (f" ({name})" if name else "")
        return ImageItem(where, bytes(example["image"]), int(example["label"]))

    def __getitem__(self, index: int) -> ImageItem:
        if self._data is None:
            import tensorflow_datasets as tfds

            self._data = self._builder().as_data_source(self._split, decoders={"image": tfds.decode.SkipDecoding()})
        return self._item(index, self._data[index])

    def items(self, start: int, stop: int) -> Iterator[ImageItem]:
        if self.random_access:
            yield from (self[index] for index in range(start, stop))
            return
        import tensorflow_datasets as tfds

        dataset = self._builder().as_dataset(
            f"{self._split}[{start}:{stop}]",
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
            shuffle_files=False,
        )
        for index, example in enumerate(tfds.as_numpy(dataset), start):
            yield self._item(index, example)

    def fingerprint(self) -> str:
        info = self._builder().info
        return _digest(iter([info.full_name, self._split, str(self._length)]))


_SOURCES: dict[str, Callable[[str], ImageSource]] = {
    "tfds": TfdsImages,
    "imagefolder": ImageFolder,
    "idx": IdxFolder,
    "sklearn": SamplePhotos,
}


def open_images(specification: str) -> ImageSource:
    """The source that a string such as `imagefolder:/data/train` names.

    Raises:
      UserError: unknown, missing or empty; the message says what was looked for.
    """
    kind, _, path = specification.partition(":")
    if kind not in _SOURCES:
        raise UserError(
            f"source {specification!r} is unknown: give tfds:NAME[:SPLIT], imagefolder:DIR, idx:DIR or sklearn:photos"
        )
    return _SOURCES[kind](path)
