"""Files of published models: from a folder, or by Hugging Face id from a cache that is filled from the network."""

import dataclasses
import hashlib
import os
import re
import urllib.request
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sra_jax import files
from sra_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is looked for, in words for messages.

    Attributes:
      what: such as "VAE".
      cache: name of its folder in the cache.
      needs: which files to put into a folder.
      example: a Hugging Face id.
    """

    what: str
    cache: str
    needs: str
    example: str


def find(name: str, file: str, kind: Kind) -> Path:
    """The path of one of a model's files, fetched into the cache if `name` is a Hugging Face id.

    Args:
      name: a folder, or a Hugging Face id `owner/name` (`owner/name/folder` for a folder inside a repository), fetched
        once into a cache in `$XDG_CACHE_HOME/sra_jax` (by default ~/.cache/sra_jax).
      file: the file's name.
      kind: of the model.

    Raises:
      UserError: the file is not in the folder, or cannot be fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / file).is_file():
            return folder / file
        raise UserError(
            f"the {kind.what} folder {folder} has no {file}: download {kind.needs}, for example of {kind.example}, "
            "into it"
        )
    identity = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.-]*)*)", name)
    if identity is None:
        raise UserError(
            f"no {kind.what} at {name!r}: give a folder that exists or a Hugging Face id such as {kind.example}"
        )
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = caches / "sra_jax" / kind.cache / name.replace("/", "--")
    if not (cache / file).is_file():
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        _fetch(f"{host}/{identity.group(1)}/resolve/main{identity.group(2)}/{file}", cache / file, name, kind)
    return cache / file


def _fetch(url: str, path: Path, name: str, kind: Kind) -> None:
    """Download `url` to `path`, which appears only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, files.whole(path) as temporary:
            length = response.headers.get("Content-Length")
            with open(temporary, "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
            if length is not None and temporary.stat().st_size != int(length):
                raise OSError(f"{temporary.stat().st_size} of {length} bytes arrived")
    except OSError as error:  # URLError, HTTPError and time-outs are OSErrors
        raise UserError(
            f"{name!r} is no folder here, and {url} cannot be fetched ({error}). Download {kind.needs} of {name} on a "
            "machine with a network, put them into one folder and give that folder"
        ) from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file.

    Raises:
      UserError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
