"""Features of an external encoder, stored beside latents: for each shard of latents one of features, record by record.

A record is (N,Dz) float16, little-endian, one vector a token, row-major over the image; with several encoders their
vectors lie side by side. `features.json` describes them. Any encoder and any framework may make them: what comes in is
one NumPy array an example.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from sra_jax import files, remote
from sra_jax.data import record_files, shards
from sra_jax.data.image_files import is_system_name
from sra_jax.errors import UserError

FORMAT = "sra-jax features, version 1"
FILE = "features.json"
DTYPE = np.dtype("<f2")


@dataclasses.dataclass(frozen=True)
class Features:
    """What features.json says.

    Attributes:
      tokens: N of each example.
      widths: Dz of each encoder.
      sources: where each encoder's arrays came from.
      shards: one for each shard of latents, in the same order, with as many records.
    """

    tokens: int
    widths: tuple[int, ...]
    sources: tuple[str, ...]
    shards: tuple[shards.Shard, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of one example."""
        return self.tokens, sum(self.widths)

    @property
    def record_bytes(self) -> int:
        """Of one example."""
        return math.prod(self.shape) * DTYPE.itemsize


class Arrays:
    """One encoder's features of all examples, in order: a folder of .npy files (N,Dz), or one .npy file (M,N,Dz).

    Args:
      path: of the folder or file; files of a folder are taken in the order of their paths as text.

    Raises:
      UserError: there is nothing of the kind.
    """

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        self._files: list[Path] = []
        self._whole: np.ndarray | None = None
        if self.path.is_dir():
            self._files = sorted(p for p in self.path.rglob("*.npy") if not _hidden(p.relative_to(self.path)))
            if not self._files:
                raise UserError(f"--features={path} holds no .npy file: one array (tokens, channels) an example")
        elif self.path.is_file():
            self._whole = _opened(self.path)
            if self._whole.ndim != 3:
                raise UserError(f"{path} has shape {self._whole.shape}, not (examples, tokens, channels)")
        else:
            raise UserError(f"--features={path} does not exist: a folder of .npy files, or one .npy file")

    def __len__(self) -> int:
        return len(self._files) if self._whole is None else len(self._whole)

    def __getitem__(self, index: int) -> np.ndarray:
        """(N,Dz) of one example."""
        return _opened(self._files[index]) if self._whole is None else self._whole[index]

    def name(self, index: int) -> str:
        """What a message calls an example."""
        return str(self._files[index]) if self._whole is None else f"{self.path}[{index}]"


def _hidden(path: Path) -> bool:
    return any(map(is_system_name, path.parts))


def _opened(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a .npy file of numbers ({error})") from error


def read(folder: str | os.PathLike) -> Features | None:
    """The features in a folder of latents; None where it has none.

    Raises:
      UserError: features.json is something else.
    """
    advice = "make them with tools/prepare_latents.py --features"
    return shards.read_described(folder, FILE, FORMAT, _parsed, "features", advice)


def _parsed(values: Mapping[str, Any]) -> Features:
    tokens = shards.whole("tokens", values["tokens"], 1, 2**24)
    widths = tuple(shards.whole("widths", width, 1, 2**24) for width in values["widths"])
    described = Features(tokens, widths, tuple(map(str, values["sources"])), ())
    stored = tuple(shards.read_shard(given, described.record_bytes) for given in values["shards"])
    return dataclasses.replace(described, shards=stored)


def store(
    folder: str | os.PathLike, sources: Sequence[str], progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> Features:
    """Store features beside the latents of a folder, as float16; a killed attempt goes on at the next shard.

    Args:
      folder: of prepared latents.
      sources: of each encoder, as `Arrays` takes them; each has one array an example, in the latents' order.
      progress: wraps the numbers of the examples, to show how far the writing is.

    Raises:
      UserError: another number of arrays than examples, arrays of other shapes, numbers that are not finite or too
        large for float16, or features that are stored there already.
    """
    folder, manifest = Path(folder).expanduser(), shards.read_manifest(folder)
    if (folder / FILE).exists():
        raise UserError(f"{folder / FILE} exists: these latents have features; delete it to store others")
    arrays = [Arrays(source) for source in sources]
    for source, those in zip(sources, arrays, strict=True):
        if len(those) != manifest.examples:
            skipped = f"; {len(manifest.skipped)} images could not be read and have none" if manifest.skipped else ""
            raise UserError(
                f"--features={source} holds {len(those)} arrays, and {folder} {manifest.examples} examples{skipped}: "
                "one array an example is needed, in the source's order"
            )
    first = [_checked(those, 0, None) for those in arrays]
    shapes = [array.shape for array in first]
    if len({tokens for tokens, _ in shapes}) > 1:
        found = " and ".join(str(tokens) for tokens, _ in shapes)
        raise UserError(f"--features: the encoders have {found} tokens an example; they must agree")
    tokens = shapes[0][0]
    if math.isqrt(tokens) ** 2 != tokens or manifest.layout.shape[0] % math.isqrt(tokens):
        side = manifest.layout.shape[0]
        raise UserError(
            f"--features: {tokens} vectors an example are no square grid of patches of {side}x{side} latents, such as "
            f"{(side // 2) ** 2} for a patch of 2"
        )
    described = Features(tokens, tuple(width for _, width in shapes), tuple(map(str, sources)), ())
    with files.locked(folder, "store the features in another folder"):
        made = []
        numbers = iter(progress(range(manifest.examples)))
        for shard in manifest.shards:
            indices = [next(numbers) for _ in range(shard.examples)]
            made.append(_write_shard(folder, shard, indices, arrays, shapes, described.record_bytes))
        next(numbers, None)  # the progress bar sees the end
        described = dataclasses.replace(described, shards=tuple(made))
        values = {
            "format": FORMAT, "tokens": tokens, "widths": list(described.widths), "sources": list(described.sources),
            "record": "(tokens, widths side by side) float16, little-endian",
            "shards": [dataclasses.asdict(shard) for shard in made],
        }  # fmt: skip
        files.write_text(folder / FILE, json.dumps(values, indent=1) + "\n")
    return described


def _checked(arrays: Arrays, index: int, shape: tuple[int, ...] | None) -> np.ndarray:
    """An example's features as float16."""
    array = arrays[index]
    if array.ndim != 2 or (shape is not None and array.shape != shape):
        expected = "(tokens, channels)" if shape is None else f"{shape} as the first"
        raise UserError(f"{arrays.name(index)} has shape {array.shape}, not {expected}")
    if array.dtype.kind not in "fiu":
        raise UserError(f"{arrays.name(index)} holds {array.dtype}, not numbers")
    with np.errstate(over="ignore"):
        stored = array.astype(DTYPE)
    if not np.isfinite(stored).all():
        raise UserError(
            f"{arrays.name(index)} holds numbers that are not finite, or above 65504, the largest of float16"
        )
    return stored


def _write_shard(
    folder: Path, latents: shards.Shard, indices: Sequence[int], arrays: Sequence[Arrays],
    shapes: Sequence[tuple[int, ...]], record_bytes: int,
) -> shards.Shard:
    """The features of one shard of latents; one that an earlier attempt finished is checked against its arrays' count
    and kept."""
    path = folder / latents.file.replace("latents", "features", 1)
    note = folder / shards.PROGRESS_FOLDER / f"{path.stem}.json"
    source = [str(those.path) for those in arrays]
    if path.is_file() and note.is_file():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # damaged: made again
            kept = json.loads(note.read_text())
            shard = shards.read_shard(kept["shard"], record_bytes)
            if kept["sources"] == source and (shard.file, shard.bytes) == (path.name, path.stat().st_size):
                return shard
    with files.whole(path) as unfinished:
        writer = array_record_module.ArrayRecordWriter(str(unfinished), record_files.WRITER_OPTIONS)
        try:
            for index in indices:
                parts = [_checked(those, index, shape) for those, shape in zip(arrays, shapes, strict=True)]
                record = np.concatenate(parts, axis=1).tobytes()
                assert len(record) == record_bytes
                with shards.disk(path):
                    writer.write(record)
        finally:
            with shards.disk(path):
                writer.close()
        shard = shards.Shard(path.name, len(indices), unfinished.stat().st_size, remote.file_sha256(unfinished))
    files.write_text(note, json.dumps({"sources": source, "shard": dataclasses.asdict(shard)}))
    return shard


class WithFeatures:
    """A source of latents whose examples carry their stored features, `features` (N,Dz) float16; picklable.

    Args:
      latents: the source of the latents, whose examples are those of the shards in their order.
      folder: that holds both.
      stored: as `read` gives it.

    Raises:
      UserError: shards of features are missing, or hold another number of records than those of the latents.
    """

    def __init__(self, latents: Any, folder: str, stored: Features):
        self._latents, self._stored = latents, stored
        root = Path(folder).expanduser()
        filled = [shard for shard in stored.shards if shard.examples]
        self._ends = np.cumsum([shard.examples for shard in filled])
        self._files = record_files.OpenFiles(
            [str(root / shard.file) for shard in filled], [shard.examples for shard in filled], stored.record_bytes
        )
        for shard in filled:
            path = root / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise UserError(f"{path} is missing or damaged: delete {FILE} and store the features again")
        if not len(filled) or self._ends[-1] != len(latents):
            raise UserError(f"{root / FILE} speaks of another number of examples than the latents: store them again")

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """One example."""
        return {**self._latents[index], "features": self._read(np.array([index]))[0]}

    def where(self, index: int) -> str:
        """The place of an example, for messages."""
        return self._latents.where(index)

    def read_batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The examples at `indices` (B,), stacked."""
        return {**self._latents.read_batch(indices), "features": self._read(np.asarray(indices))}

    def _read(self, indices: np.ndarray) -> np.ndarray:
        numbers = np.searchsorted(self._ends, indices, side="right")
        starts = np.concatenate([[0], self._ends[:-1]])
        rows = np.empty((len(indices), self._stored.record_bytes), np.uint8)
        try:
            self._files.read(numbers, indices - starts[numbers], [rows])
        except record_files.TooManyOpenFilesError as error:
            raise UserError(str(error)) from error
        except record_files.UnreadableFileError as error:
            raise UserError(f"{error}: delete {FILE} and store the features again") from error
        return rows.view(DTYPE).reshape(len(indices), *self._stored.shape)
