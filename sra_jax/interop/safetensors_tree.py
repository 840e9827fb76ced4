"""Trees of arrays in safetensors files, under dotted names, and a checksum of a tree."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict

from sra_jax import files
from sra_jax.errors import UserError


def checksum(tree: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of the SHA-256 of all names, shapes and values."""
    digest = hashlib.sha256()
    for name, values in sorted(flatten_dict(tree, sep=".").items()):
        digest.update(f"{name} {values.shape} {values.dtype}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


def write_safetensors(path: Path, tree: Mapping[str, Any], metadata: dict[str, str]) -> None:
    """Writes a tree of arrays under dotted names; the file appears whole or not at all."""
    files.write_safetensors(path, flatten_dict(tree, sep="."), metadata)


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of arrays and the metadata that `write_safetensors` wrote.

    Raises:
      UserError: the file is missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return unflatten_dict(arrays, sep="."), file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}. Delete it and make it again") from error
