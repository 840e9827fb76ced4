"""Reads PyTorch checkpoint files without PyTorch: nested dictionaries of tensors, as numpy arrays.

Both formats of `torch.save`: the zip archive (since PyTorch 1.6) and the older stream of pickles. The pickles are read
with an unpickler that knows tensors and dictionaries and nothing else, so a file cannot run code.
"""

import collections
import dataclasses
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from sra_jax.errors import UserError

LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C

STORAGE_DTYPES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass
class _Storage:
    """A flat piece of memory that tensors are views of; the older format fills it after the tensors are known."""

    dtype: np.dtype
    values: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        values = self.storage.values
        if values is None or (0 not in self.shape and self._last() >= values.size):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [stride * values.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.shape, strides).copy()

    def _last(self) -> int:
        return self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


def _rebuild_tensor(storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in STORAGE_DTYPES:
            return np.dtype(STORAGE_DTYPES[name])
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is neither a tensor nor a dictionary")

    def persistent_load(self, identity: Any) -> _Storage:
        kind, dtype, key, *_ = identity
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind!r}")
        return self.storages.setdefault(str(key), _Storage(dtype))


def _read_archive(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("the zip archive holds no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        big_endian = f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") == b"big"
        with archive.open(pickles[0]) as file:
            unpickler = _Unpickler(file)
            tree = unpickler.load()
        for key, storage in unpickler.storages.items():
            values = np.frombuffer(archive.read(f"{folder}data/{key}"), storage.dtype)
            storage.values = values.byteswap() if big_endian else values
    return tree


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file:
        if _Unpickler(file).load() != LEGACY_MAGIC_NUMBER:
            raise ValueError("it does not begin as a PyTorch checkpoint does")
        _Unpickler(file).load()  # version of the format
        _Unpickler(file).load()  # the writer's machine: little-endian wherever PyTorch runs
        unpickler = _Unpickler(file)
        tree = unpickler.load()
        for key in _Unpickler(file).load():
            storage = unpickler.storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            values = np.frombuffer(file.read(count * storage.dtype.itemsize), storage.dtype)
            if values.size != count:
                raise EOFError("it ends early")
            storage.values = values
    return tree


def _arrays(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _arrays(value) for key, value in tree.items()}
    return tree.array() if isinstance(tree, _Tensor) else tree


def read_torch_file(path: str | Path) -> dict[str, Any]:
    """The dictionary that `torch.save` wrote, tensors as numpy arrays of their shapes and types.

    Raises:
      UserError: the file does not exist, is damaged or truncated, is no PyTorch checkpoint, or holds Python objects
        other than dictionaries of tensors, numbers and strings.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        tree = _arrays(_read_archive(path) if zipfile.is_zipfile(path) else _read_legacy(path))
    except (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, LookupError, ValueError, TypeError,
            AttributeError, MemoryError) as error:  # fmt: skip
        raise UserError(f"{path} cannot be read as a PyTorch checkpoint: {error}. Is the download complete?") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}; expected a dictionary of tensors (a state dict)")
    return tree
