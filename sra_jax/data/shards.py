"""Latents on disk: ArrayRecord shards of fixed-size records, and manifest.json that describes them.

A record is the posterior's mean (H,W,C), its standard deviation (H,W,C), both in the manifest's dtype, then the label
(int32): raw little-endian bytes one after the other. Any record is read by itself, without decoding others. Shards
are not compressed, because the low bits of moments are noise.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module

from sra_jax import files
from sra_jax.data import record_files
from sra_jax.errors import UserError
from sra_jax.interop import autoencoder as vae_interop
from sra_jax.models.autoencoder import AutoencoderConfig

FORMAT = "sra-jax latents, version 1"
MANIFEST_FILE = "manifest.json"
DTYPES = ("float32", "float16", "bfloat16")
REPAIR = (
    "Delete these shards and run tools/prepare_latents.py with the same flags again: it makes those that are not there."
)
PROGRESS_FOLDER = "progress"
_SETTINGS_FILE = "settings.json"


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """How a record's bytes are laid out.

    Attributes:
      shape: (H,W,C) of mean and standard deviation.
      dtype: one of DTYPES.
    """

    shape: tuple[int, int, int]
    dtype: str

    @functools.cached_property
    def numpy_dtype(self) -> np.dtype:
        return jnp.dtype(self.dtype)

    @functools.cached_property
    def moment_bytes(self) -> int:
        """Size of the mean, and of the standard deviation."""
        return int(np.prod(self.shape)) * self.numpy_dtype.itemsize

    @functools.cached_property
    def record_bytes(self) -> int:
        return 2 * self.moment_bytes + 4

    def to_bytes(self, moments: np.ndarray, label: int) -> bytes:
        """Moments (2,H,W,C) of any floating type and a label, as a record."""
        return moments.astype(self.numpy_dtype).tobytes() + np.array(label, "<i4").tobytes()

    def from_bytes(self, record: bytes) -> dict[str, np.ndarray]:
        """An example: `mean` and `std` (H,W,C) in the layout's dtype, `label` () int32."""
        mean, std, label = np.split(np.frombuffer(record, np.uint8), [self.moment_bytes, 2 * self.moment_bytes])
        return self.from_parts(mean, std, label)

    def empty_parts(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Room for the parts of `count` records, mean, standard deviation and label: uint8 (count, bytes) each."""
        mean, std = np.empty((2, count, self.moment_bytes), np.uint8)
        return mean, std, np.empty((count, self.record_bytes - 2 * self.moment_bytes), np.uint8)

    def from_parts(self, mean: np.ndarray, std: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
        """Parts, uint8 (..., bytes), as examples: `mean` and `std` (...,H,W,C), `label` (...) int32; no copies."""
        leading = label.shape[:-1]
        return {
            "mean": mean.view(self.numpy_dtype).reshape(*leading, *self.shape),
            "std": std.view(self.numpy_dtype).reshape(*leading, *self.shape),
            "label": label.view("<i4").reshape(leading),
        }


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name in the folder, the number of its examples, its size and its SHA-256."""

    file: str
    examples: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of latents holds.

    Attributes:
      settings: how the latents were made and fingerprints of what from; equal settings make equal latents.
      source: the source's name as the user gave it.
      layout: of every record.
      num_classes: labels run from 0 to num_classes - 1.
      class_names: one name a class, or None.
      vae: name, fingerprint and config (as AutoencoderConfig) of the autoencoder.
      shards: in the order of the source.
      skipped: examples that could not be read: [name, reason] each.
    """

    settings: dict[str, Any]
    source: str
    layout: RecordLayout
    num_classes: int
    class_names: tuple[str, ...] | None
    vae_name: str
    vae_fingerprint: str | None
    vae_config: AutoencoderConfig
    shards: tuple[Shard, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def examples(self) -> int:
        return sum(shard.examples for shard in self.shards)

    def to_json(self) -> str:
        """The text of manifest.json."""
        values = {
            "format": FORMAT,
            "source": self.source,
            "examples": self.examples,
            "image_size": self.settings.get("image_size"),
            "latent_shape": list(self.layout.shape),
            "dtype": self.layout.dtype,
            "record": "mean (H,W,C), std (H,W,C) in dtype, label int32; little-endian, HWC order, nothing between",
            "record_bytes": self.layout.record_bytes,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "vae": {
                "name": self.vae_name,
                "sha256": self.vae_fingerprint,
                "scaling_factor": self.vae_config.scaling_factor,
                "config": json.loads(vae_interop.config_to_json(self.vae_config)),
            },
            "settings": self.settings,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "skipped": self.skipped,
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """The inverse of `to_json`.

        Raises:
          UserError: the text is something else.
        """
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, this version reads {FORMAT!r}")
            if values["dtype"] not in DTYPES:
                raise ValueError(f"dtype {values['dtype']!r} is none of {', '.join(DTYPES)}")
            vae_config = vae_interop.config_from_json(json.dumps(values["vae"]["config"]), where)
            if values["vae"]["scaling_factor"] != vae_config.scaling_factor:
                raise ValueError(
                    f"vae.scaling_factor={values['vae']['scaling_factor']} contradicts "
                    f"vae.config.scaling_factor={vae_config.scaling_factor}"
                )
            names = values["class_names"]
            return cls(
                settings=values["settings"],
                source=values["source"],
                layout=RecordLayout(tuple(values["latent_shape"]), values["dtype"]),
                num_classes=values["num_classes"],
                class_names=None if names is None else tuple(names),
                vae_name=values["vae"]["name"],
                vae_fingerprint=values["vae"]["sha256"],
                vae_config=vae_config,
                shards=tuple(Shard(**shard) for shard in values["shards"]),
                skipped=tuple((name, reason) for name, reason in values["skipped"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where} is not a manifest of prepared latents ({error!r}): make one with tools/prepare_latents.py"
            ) from error


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a folder of latents.

    Raises:
      UserError: there is no such folder, no manifest, or a preparation that has not ended.
    """
    path = Path(folder).expanduser() / MANIFEST_FILE
    if not path.is_file():
        if (path.parent / PROGRESS_FOLDER).is_dir():
            raise UserError(f"{path.parent} is prepared only in part: run tools/prepare_latents.py again to finish it")
        raise UserError(f"no prepared latents at {path.parent}: it has no {MANIFEST_FILE} (tools/prepare_latents.py)")
    return Manifest.from_json(path.read_text(), str(path))


def check_sizes(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Raise a UserError that names every shard that is missing or not as long as the manifest says."""
    problems = [problem for shard in manifest.shards if (problem := _size_problem(folder, shard))]
    if problems:
        listed = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise UserError(f"{len(problems)} of {len(manifest.shards)} shards are damaged:\n  {listed}\n{REPAIR}")


def damaged_shards(
    folder: str | os.PathLike, manifest: Manifest, progress: Callable[[Iterable[Shard]], Iterable[Shard]] = iter
) -> list[str]:
    """What is wrong with each damaged shard, by its size and its checksum; an empty list means that all is well.

    Args:
      folder: holds the shards.
      manifest: says what they should be.
      progress: wraps the shards, to show how far the reading is.
    """
    problems = []
    for shard in progress(manifest.shards):
        path = Path(folder).expanduser() / shard.file
        if problem := _size_problem(folder, shard):
            problems.append(problem)
        elif file_sha256(path) != shard.sha256:
            problems.append(f"{path} has another checksum than when it was written")
    return problems


def _size_problem(folder: str | os.PathLike, shard: Shard) -> str | None:
    path = Path(folder).expanduser() / shard.file
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == shard.bytes else f"{path} has {size} bytes instead of {shard.bytes}"


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_file(index: int, count: int) -> str:
    """The name of shard `index` of `count`."""
    return f"latents-{index:05d}-of-{count:05d}.arrayrecord"


class ShardWriter:
    """A folder of latents in the making, shared by all processes that prepare it.

    Beside the shards, the folder `progress` holds the settings and one small file for each shard that is done; a shard
    counts as done when both its files are there and whole. So work goes on where it stopped, in any process.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any], layout: RecordLayout, count: int):
        """Open or continue.

        Args:
          folder: made if it does not exist.
          settings: JSON values; whatever changes the latents.
          layout: of the records.
          count: number of shards.

        Raises:
          UserError: the folder holds latents that were made with other settings, or other files.
        """
        self.folder = Path(folder).expanduser()
        self.layout = layout
        self.count = count
        self._progress = self.folder / PROGRESS_FOLDER
        settings_path = self._progress / _SETTINGS_FILE
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self._progress.is_dir():
            raise UserError(f"{self.folder} is not empty and holds no latents: name a new folder")
        self._progress.mkdir(parents=True, exist_ok=True)
        if not settings_path.exists():
            files.write_text(settings_path, json.dumps(settings, indent=1) + "\n")
        before = json.loads(settings_path.read_text())
        if before != settings:
            changed = [
                f"{key}={settings.get(key)!r}, before {before.get(key)!r}"
                for key in sorted({*settings, *before})
                if settings.get(key) != before.get(key)
            ]
            raise UserError(f"{self.folder} was begun with other settings ({'; '.join(changed)}): name another folder")

    def _done_path(self, index: int) -> Path:
        return self._progress / f"{index:05d}.json"

    def done(self, index: int) -> tuple[Shard, list[tuple[str, str]]] | None:
        """A finished shard and what was skipped in it, or None if it is not finished."""
        path = self.folder / shard_file(index, self.count)
        if not self._done_path(index).is_file() or not path.is_file():
            return None
        values = json.loads(self._done_path(index).read_text())
        shard = Shard(**values["shard"])
        if path.stat().st_size != shard.bytes:
            return None
        return shard, [(name, reason) for name, reason in values["skipped"]]

    def write(self, index: int, examples: Iterable[tuple[np.ndarray, int]], skipped: list[tuple[str, str]]) -> Shard:
        """Write a shard; it appears under its name only when it is whole.

        Args:
          index: of the shard.
          examples: moments (2,H,W,C) and label of each.
          skipped: filled by the time `examples` ends: [name, reason] of each example that could not be read.
        """
        path = self.folder / shard_file(index, self.count)
        # a shard belongs to one process, so its temporary name is its own and a killed process's remains are reused
        partial = path.with_name(f".{path.name}.partial")
        partial.unlink(missing_ok=True)
        writer = array_record_module.ArrayRecordWriter(str(partial), record_files.WRITER_OPTIONS)
        number = 0
        try:
            for moments, label in examples:
                writer.write(self.layout.to_bytes(moments, label))
                number += 1
        finally:
            writer.close()
        shard = Shard(path.name, number, partial.stat().st_size, file_sha256(partial))
        os.replace(partial, path)
        files.write_text(
            self._done_path(index), json.dumps({"shard": dataclasses.asdict(shard), "skipped": skipped}, indent=1)
        )
        return shard

    def finish(self, make_manifest: Callable[[tuple[Shard, ...], tuple[tuple[str, str], ...]], Manifest]) -> bool:
        """Write the manifest if every shard is done, by whichever process.

        Returns:
          Whether all shards are done.
        """
        results = [done for index in range(self.count) if (done := self.done(index)) is not None]
        if len(results) < self.count:
            return False
        shards = tuple(shard for shard, _ in results)
        skipped = tuple(item for _, items in results for item in items)
        files.write_text(self.folder / MANIFEST_FILE, make_manifest(shards, skipped).to_json())
        return True
