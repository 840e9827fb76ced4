"""Labelled images from where users have them, named by one string each.

    tfds:NAME[:VERSION][:SPLIT]   a TFDS image classification set prepared on disk (TFDS_DATA_DIR says where, or the
                                  argument data_dir)
    imagefolder:DIR               one folder a class with jpg, png or webp files, at any depth; classes are numbered in
                                  the order of their folders' names as text, as torchvision does: 0, 1, 10, 11, 2, ...
    idx:DIR[:train|t10k]          MNIST's format: train-images-idx3-ubyte and -labels-idx1-ubyte, also with .gz
    sklearn:photos                scikit-learn's two sample photographs, a class each

`edm2:DIR` (moments that were already encoded) is in `sra_jax.data.moments`.
"""

import abc
import dataclasses
import difflib
import gzip
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from sra_jax.data import image_files
from sra_jax.data.image_files import IMAGE_SUFFIXES
from sra_jax.errors import UserError

_SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval"})


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
      left_out: what lies there and is not in the set, in words; empty where nothing is.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    random_access: bool
    left_out: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ImageItem: ...

    def items(self, start: int, stop: int) -> Iterator[ImageItem]:
        """The images start..stop-1 in order."""

    def labels(self) -> np.ndarray:
        """The labels of all images (N,) int64; no image is decoded."""

    def how_to_get_random_access(self) -> str:
        """What to do where there is none; empty elsewhere."""

    def fingerprint(self) -> str:
        """Changes when the set's contents or order change, so far as that is seen without reading every image."""


class RandomAccess(abc.ABC):
    """`items` of a source by its `__getitem__`, `labels` of its `_labels`."""

    random_access = True
    left_out = ""
    _labels: Sequence[int] | np.ndarray

    @abc.abstractmethod
    def __getitem__(self, index: int) -> ImageItem: ...

    def items(self, start: int, stop: int) -> Iterator[ImageItem]:
        return (self[index] for index in range(start, stop))

    def labels(self) -> np.ndarray:
        return np.array(self._labels, np.int64)

    def how_to_get_random_access(self) -> str:
        return ""


def digest(parts: Iterator[str]) -> str:
    """SHA-256 of some texts, in hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") + b"\n")
    return found.hexdigest()


def existing_folder(path: str, what: str) -> Path:
    """`path` as a folder that exists; else a UserError that says `what` it should hold."""
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        raise UserError(f"no folder at {path!r}: it should hold {what}")
    return folder


class ImageFolder(RandomAccess):
    """Class folders of image files; classes are numbered in the order of their names, files in that of their paths."""

    def __init__(self, path: str):
        folder = existing_folder(path, f"one folder a class, with {', '.join(IMAGE_SUFFIXES)} files")
        tree = image_files.walk(folder)
        if not tree.classes:
            raise UserError(f"{folder} has no class folders: put the images of each class into a folder of its own")
        for name, files in tree.classes.items():
            if not files:
                raise UserError(f"{folder / name} holds no {', '.join(IMAGE_SUFFIXES)} file: fill or remove this class")
        if tree.classes.keys() <= _SPLIT_NAMES and all(
            file.count(os.sep) > 1 for files in tree.classes.values() for file in files
        ):
            first = next(iter(tree.classes))
            raise UserError(
                f"{folder} holds {', '.join(tree.classes)} with folders in each: these are splits, not classes; give "
                f"one of them, imagefolder:{folder / first}"
            )
        self._folder = folder
        self._files = [file for files in tree.classes.values() for file in files]
        self._labels = [label for label, files in enumerate(tree.classes.values()) for _ in files]
        self.class_names: tuple[str, ...] | None = tuple(tree.classes)
        self.num_classes = len(tree.classes)
        beside = {"images beside the class folders": len(tree.beside)} if tree.beside else {}
        self.left_out = image_files.described({**tree.left_out, **beside})

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> ImageItem:
        path = self._folder / self._files[index]
        return ImageItem(str(path), path, self._labels[index])

    def fingerprint(self) -> str:
        return digest(iter(self._files))


class IdxFolder(RandomAccess):
    """Images and labels in MNIST's IDX files."""

    class_names: tuple[str, ...] | None = None
    _labels: np.ndarray

    def __init__(self, path: str):
        where, split = path, "train"
        if found := re.fullmatch(r"(.*):(train|t10k)", path):
            where, split = found.groups()
        self._split = split
        self._folder = existing_folder(where, f"{self._split}-images-idx3-ubyte and -labels-idx1-ubyte")
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


class SamplePhotos(RandomAccess):
    """scikit-learn's two photographs, 640x427 pixels: enough to try every command without a download."""

    _names = ("china", "flower")
    class_names: tuple[str, ...] | None = _names
    num_classes = 2
    _labels = (0, 1)

    def __init__(self, path: str):
        if path != "photos":
            raise UserError(f"sklearn:{path} is unknown: the only one is sklearn:photos")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> ImageItem:
        from sklearn.datasets import load_sample_image

        name = f"{self._names[index]}.jpg"
        return ImageItem(f"sklearn:{name}", load_sample_image(name), index)

    def fingerprint(self) -> str:
        return digest(iter(self._names))


class TfdsImages:
    """A TFDS set with the features `image` and `label` that is on disk already; nothing is downloaded.

    Sets prepared as array_record (`download_and_prepare(file_format="array_record")`) have random access; those
    prepared as tfrecord, TFDS's default, are read in order.
    """

    left_out = ""

    def __init__(self, path: str, data_dir: str | None = None):
        match = re.fullmatch(r"(?P<name>[\w./+-]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(?P<split>[A-Za-z_].*))?", path)
        if match is None:
            raise UserError(f"tfds:{path} is not tfds:NAME[:VERSION][:SPLIT], e.g. tfds:imagenet2012:5.1.0:train")
        self._name, self._split, self._data_dir = match["name"], match["split"] or "train", data_dir
        builder = self._builder()
        info = builder.info
        self._check_features(path, info.features)
        try:
            self._length = info.splits[self._split].num_examples
        except (KeyError, ValueError) as error:
            raise UserError(f"tfds:{path}: no split {self._split!r}, only {', '.join(info.splits)}") from error
        from tensorflow_datasets.core.file_adapters import FileFormat

        self.random_access = any(kind in FileFormat.with_random_access() for kind in info.available_file_formats())
        if not self.random_access and self._split not in info.splits:
            raise UserError(
                f"tfds:{path}: a part of a split can be read only from a set with random access, and this one is "
                f"{info.file_format.value}. {self.how_to_get_random_access()}"
            )
        if not self._length:
            raise UserError(f"tfds:{path} holds no image")
        self.class_names, self.num_classes = self._classes(info.features)
        self._data: Any = None
        next(iter(self.items(0, 1)))  # of a split without labels every label is -1: known before any work

    @staticmethod
    def _classes(features: Any) -> tuple[tuple[str, ...] | None, int]:
        """Names and number of the classes."""
        return tuple(features["label"].names), features["label"].num_classes

    @staticmethod
    def _check_features(path: str, features: Any) -> None:
        from tensorflow_datasets.core.features import ClassLabel, Image

        for name, kind in (("image", Image), ("label", ClassLabel)):
            found = features[name] if name in (features or ()) else None
            if not isinstance(found, kind):
                raise UserError(
                    f"tfds:{path} is no image classification set: "
                    + (f"its {name} is a {type(found).__name__}, not a {kind.__name__}" if found is not None else
                       f"it has no feature {name}, only {', '.join(features or ())}")
                )  # fmt: skip
        if not features["label"].num_classes:
            raise UserError(f"tfds:{path} does not say how many classes it has")

    def how_to_get_random_access(self) -> str:
        """What a user may do about a set that is stored as tfrecord."""
        return (
            "Make a second copy in another folder (where the first one lies, this does nothing): tfds.builder("
            f'{self._name!r}, data_dir="FOLDER").download_and_prepare(file_format="array_record"); then set '
            "TFDS_DATA_DIR=FOLDER"
        )

    def _builder(self) -> Any:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"tfds:{self._name} needs the package tensorflow-datasets ({error})") from error
        try:
            builder = tfds.builder(self._name, data_dir=self._data_dir)
        except tfds.core.registered.DatasetNotFoundError as error:
            # The list of other people's sets lies on a bucket: without a network, minutes of waiting for it.
            known = tfds.list_builders(with_community_datasets=False)
            close = difflib.get_close_matches(self._name.split(":")[0], known, n=1)
            raise UserError(
                f"tfds:{self._name} is neither known to TFDS nor on disk in {self._data_dir or 'its default folder'}"
                + (f"; did you mean {close[0]}?" if close else "")
            ) from error
        except (ValueError, OSError, LookupError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"tfds:{self._name} cannot be opened: {reason[:200]}") from error
        if not builder.is_prepared():
            raise UserError(
                f"tfds:{self._name} is not on disk (looked in {builder.data_dir}): prepare it with "
                f"tfds.builder({self._name!r}).download_and_prepare(), or name the folder that has it with --data_dir "
                "or TFDS_DATA_DIR"
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
        label = int(example["label"])
        if not 0 <= label < self.num_classes:
            raise UserError(
                f"{where} has the label {label}, classes run from 0 to {self.num_classes - 1}: in TFDS -1 stands for "
                f"no label, as in ImageNet's test split; name a labelled split, such as tfds:{self._name}:train"
            )
        return ImageItem(where, bytes(example["image"]), label)

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

    def labels(self) -> np.ndarray:
        items = tqdm(self.items(0, len(self)), total=len(self), desc=f"labels of tfds:{self._name}", unit="image")
        return np.array([item.label for item in items], np.int64)

    def fingerprint(self) -> str:
        info = self._builder().info
        return digest(iter([info.full_name, self._split, str(self._length)]))


_SOURCES: dict[str, Callable[..., ImageSource]] = {
    "tfds": TfdsImages,
    "imagefolder": ImageFolder,
    "idx": IdxFolder,
    "sklearn": SamplePhotos,
}


def open_images(specification: str, data_dir: str | None = None) -> ImageSource:
    """The source that a string such as `imagefolder:/data/train` names.

    Args:
      specification: KIND:WHERE.
      data_dir: for tfds, the folder of its sets; None takes TFDS's own.

    Raises:
      UserError: unknown, missing or empty; the message says what was looked for.
    """
    kind, _, path = specification.partition(":")
    if kind not in _SOURCES:
        raise UserError(
            f"source {specification!r} is unknown: give tfds:NAME[:SPLIT], imagefolder:DIR, idx:DIR or sklearn:photos"
        )
    if data_dir is not None:
        if kind != "tfds":
            raise UserError(f"--data_dir={data_dir} is the folder of TFDS's sets, and {specification} is none of them")
        return TfdsImages(path, str(existing_folder(data_dir, "TFDS's sets")))
    return _SOURCES[kind](path)
