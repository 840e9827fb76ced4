"""Files of published models: from a folder, or by Hugging Face id from a cache that is filled from the network."""

import dataclasses
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sra_jax import files, remote
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
      name: a folder, which may lie at an address (gs://..., hf://owner/name[/folder][@revision]), or a Hugging Face id
        `owner/name` (`owner/name/folder` for a folder inside a repository), fetched once into `files.cache_folder()`.
      file: the file's name.
      kind: of the model.

    Raises:
      UserError: the file is not in the folder, or cannot be fetched.
    """
    if remote.is_address(name):
        return files.local(remote.inside(name, file))
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
    cache = files.cache_folder() / kind.cache / name.replace("/", "--")
    if not (cache / file).is_file():
        address = f"hf://{name}/{file}"
        try:
            with files.whole(cache / file) as unfinished:
                remote.download(address, unfinished)
        except OSError as error:  # FileNotFoundError and Unreachable are such
            raise UserError(
                f"{name!r} is no folder here, and {address} cannot be fetched ({error.strerror or error}). Download "
                f"{kind.needs} of {name} on a machine with a network, put them into one folder and give that folder"
            ) from error
    return cache / file


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file.

    Raises:
      UserError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from error
