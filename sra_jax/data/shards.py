"""Latents on disk: ArrayRecord shards of fixed-size records, and manifest.json that describes them.

A record is the posterior's mean (H,W,C), its standard deviation (H,W,C), both in the manifest's dtype, then the label
(int32): raw little-endian bytes one after the other. Any record is read by itself, without decoding others. Shards
are not compressed, because the low bits of moments are noise.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from array_record.python import array_record_module

from sra_jax import files, remote
from sra_jax.data import record_files
from sra_jax.data.image_files import is_system_name
from sra_jax.errors import RunError, UserError
from sra_jax.interop import autoencoder as vae_interop
from sra_jax.models.autoencoder import AutoencoderConfig

FORMAT = "sra-jax latents, version 1"
MANIFEST_FILE = "manifest.json"
DTYPES = ("float32", "float16", "bfloat16")
REPAIR = (
    "Delete these shards and run tools/prepare_latents.py with the same flags again: it makes those that are not there."
)
CHECKED_AT_ONCE = 256
PROGRESS_FOLDER = "progress"
_SETTINGS_FILE = "settings.json"


T = TypeVar("T")


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
            shape = tuple(whole("latent_shape", side, 1, 2**16) for side in values["latent_shape"])
            if len(shape) != 3:
                raise ValueError(f"latent_shape {shape} is not height, width, channels")
            layout = RecordLayout(shape, values["dtype"])
            num_classes = whole("num_classes", values["num_classes"], 1, 2**31 - 1)
            vae_config = vae_interop.config_from_json(json.dumps(values["vae"]["config"]), where)
            if values["vae"]["scaling_factor"] != vae_config.scaling_factor:
                raise ValueError(
                    f"vae.scaling_factor={values['vae']['scaling_factor']} contradicts "
                    f"vae.config.scaling_factor={vae_config.scaling_factor}"
                )
            names = values["class_names"]
            if names is not None and (len(names) != num_classes or not all(isinstance(name, str) for name in names)):
                raise ValueError(f"class_names are not {num_classes} names")
            shards = tuple(read_shard(given, layout.record_bytes) for given in values["shards"])
            if len({shard.file for shard in shards}) < len(shards):
                raise ValueError("it names a shard twice")
            return cls(
                settings=dict(values["settings"]),
                source=str(values["source"]),
                layout=layout,
                num_classes=num_classes,
                class_names=None if names is None else tuple(names),
                vae_name=str(values["vae"]["name"]),
                vae_fingerprint=values["vae"]["sha256"],
                vae_config=vae_config,
                shards=shards,
                skipped=tuple((str(name), str(reason)) for name, reason in values["skipped"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{where} is not a manifest of prepared latents ({error!r}): make one with tools/prepare_latents.py"
            ) from error


def whole(what: str, value: Any, low: int, high: int) -> int:
    """`value`, read from JSON, if it is a whole number from low to high; else a ValueError that names it `what`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{what} {value!r} is no whole number from {low} to {high}")
    return value


def read_shard(given: Any, record_bytes: int) -> Shard:
    """A shard as a manifest or a preparation's progress names it: a file of the folder itself, large enough.

    Raises:
      ValueError, TypeError: it is something else.
    """
    shard = Shard(**given)
    if not isinstance(shard.file, str) or PurePath(shard.file).name != shard.file or shard.file in ("", ".", ".."):
        raise ValueError(f"the shard {shard.file!r} is no file of this folder")
    whole(f"{shard.file}: bytes", shard.bytes, 0, 2**62)
    whole(f"{shard.file}: examples", shard.examples, 0, shard.bytes // record_bytes)
    if not isinstance(shard.sha256, str):
        raise ValueError(f"{shard.file} has no checksum")
    return shard


def read_described(
    folder: str | os.PathLike, name: str, version: str, parse: Callable[[Mapping[str, Any]], T], what: str, advice: str
) -> T | None:
    """What a file beside latents says of further records that are stored there; None where there is no such file.

    Args:
      folder: of the latents.
      name: the file's.
      version: its "format", which must be this.
      parse: makes the result of the file's values; what it raises is what is wrong with them.
      what, advice: for the message: what is stored, and what to do.

    Raises:
      UserError: the file is something else.
    """
    path = _at(folder) / name
    if not files.exists(path):
        return None
    try:
        values = json.loads(files.read_text(path))
        if values["format"] != version:
            raise ValueError(f"its format is {values['format']!r}, this version reads {version!r}")
        return parse(values)
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{path} does not describe stored {what} ({error!r}): {advice}") from error


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a folder of latents.

    Raises:
      UserError: there is no such folder, no manifest, or a preparation that has not ended.
    """
    path = _at(folder) / MANIFEST_FILE
    try:
        there = path.is_file() if not remote.is_address(path) else files.exists(path)
        part = not there and (path.parent / PROGRESS_FOLDER).is_dir()
    except remote.Unreachable as error:
        raise remote.unreachable("data.path", path.parent, error) from error
    if not there:
        if part:
            raise UserError(f"{path.parent} is prepared only in part: run tools/prepare_latents.py again to finish it")
        raise UserError(f"no prepared latents at {path.parent}: it has no {MANIFEST_FILE} (tools/prepare_latents.py)")
    try:
        text = files.read_text(path)
    except (OSError, UserError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(text, str(path))


def _at(folder: str | os.PathLike) -> Path:
    """A folder as a path; `~` is expanded."""
    return remote.path(folder) if remote.is_address(folder) else Path(folder).expanduser()


def local_folder(folder: str | os.PathLike, shards: Iterable[Shard], cache: str = "") -> Path:
    """A local folder with these shards: the folder itself, or one with copies where it is an address.

    Copies are made once a machine and kept; their checksums are compared when they are made.

    Args:
      folder: that holds the shards.
      shards: as its manifest names them.
      cache: where copies lie; by default `staged` in `files.cache_folder()`.

    Raises:
      UserError: a shard is missing, or not what was written, or there is no room.
    """
    if not remote.is_address(folder):
        return _at(folder)
    return files.local_folder(folder, [(shard.file, shard.bytes, shard.sha256) for shard in shards], cache or None)


def check_sizes(folder: str | os.PathLike, manifest: Manifest) -> None:
    """Raise a UserError that names every shard that is missing or not as long as the manifest says."""
    problems = [problem for shard in manifest.shards if (problem := _size_problem(folder, shard))]
    if problems:
        listed = "\n  ".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise UserError(f"{len(problems)} of {len(manifest.shards)} shards are damaged:\n  {listed}\n{REPAIR}")


def damaged_shards(
    folder: str | os.PathLike, manifest: Manifest, progress: Callable[[Iterable[Shard]], Iterable[Shard]] = iter
) -> list[str]:
    """What is wrong with each damaged shard: its size, its checksum, or examples that are not finite or have no class.

    An empty list means that all is well.

    Args:
      folder: holds the shards.
      manifest: says what they should be.
      progress: wraps the shards, to show how far the reading is.
    """
    problems, first = [], 0
    for shard in progress(manifest.shards):
        if problem := damaged_file(folder, shard):
            problems.append(problem)
        else:
            problems += _content_problems(Path(folder).expanduser() / shard.file, shard, manifest, first)
        first += shard.examples
    return problems


def damaged_file(folder: str | os.PathLike, shard: Shard) -> str | None:
    """What is wrong with a file by its size and its checksum, whatever its records are; None: nothing."""
    path = Path(folder).expanduser() / shard.file
    if problem := _size_problem(folder, shard):
        return problem
    return None if remote.file_sha256(path) == shard.sha256 else f"{path} has another checksum than when it was written"


def _content_problems(path: Path, shard: Shard, manifest: Manifest, first: int) -> Iterator[str]:
    """Records of a whole file that no model can be trained on; `first` is the number of its first example."""
    if not shard.examples:
        return
    try:
        file = record_files.RecordFile(str(path), shard.examples, manifest.layout.record_bytes)
        for start in range(0, shard.examples, CHECKED_AT_ONCE):
            records = np.arange(start, min(start + CHECKED_AT_ONCE, shard.examples))
            parts = manifest.layout.empty_parts(len(records))
            record_files.read_records([file] * len(records), records, parts)
            batch = manifest.layout.from_parts(*parts)
            finite = [np.isfinite(batch[name]).all(axis=(1, 2, 3)) for name in ("mean", "std")]
            for record in records[~(finite[0] & finite[1])]:
                yield f"{path}, record {record} (example {first + record}), holds NaN or infinite values"
            for record in records[(batch["label"] < 0) | (batch["label"] >= manifest.num_classes)]:
                yield (
                    f"{path}, record {record} (example {first + record}), has the label "
                    f"{batch['label'][record - start]}, classes run from 0 to {manifest.num_classes - 1}"
                )
    except record_files.UnreadableFileError as error:
        yield str(error)


def _size_problem(folder: str | os.PathLike, shard: Shard) -> str | None:
    path = Path(folder).expanduser() / shard.file
    if not path.is_file():
        return f"{path} is {'no file' if path.exists() else 'missing'}"
    size = path.stat().st_size
    return None if size == shard.bytes else f"{path} has {size} bytes instead of {shard.bytes}"


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns ArrayRecord's word for a disk that is full or away into one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(
            f"{path} cannot be written ({error}). The shards before are whole: make room, and the same command goes on "
            "with this one"
        ) from error


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
        foreign = self.folder.is_dir() and any(not is_system_name(path.name) for path in self.folder.iterdir())
        if foreign and not self._progress.is_dir():
            raise UserError(f"{self.folder} is not empty and holds no latents: name a new folder")
        self._progress.mkdir(parents=True, exist_ok=True)
        if not settings_path.exists():
            files.write_text(settings_path, json.dumps(settings, indent=1) + "\n")
        try:
            before = dict(json.loads(settings_path.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{settings_path} is damaged ({error}), so that nobody can tell how the shards beside it were made: "
                "name a new folder"
            ) from error
        if before != settings:
            changed = [
                f"{key}={settings.get(key)!r}, before {before.get(key)!r}"
                for key in sorted({*settings, *before})
                if settings.get(key) != before.get(key)
            ]
            raise UserError(f"{self.folder} was begun with other settings ({'; '.join(changed)}): name another folder")

    @contextlib.contextmanager
    def claimed(self, process_index: int, process_count: int) -> Iterator[None]:
        """Be the only process that makes these shards for as long as the block runs.

        Raises:
          UserError: another process makes them, under this number or in another division of the work.
        """

        def lock(name: str) -> contextlib.AbstractContextManager[files.Lock]:
            return files.locked(self._progress / name, "choose another --output")

        own = f"process-{process_index}-of-{process_count}"
        with lock(own):
            for path in self._progress.glob(".process-*.lock"):
                other = path.name[1:].removesuffix(".lock")
                if not other.endswith(f"-of-{process_count}"):
                    with lock(other):  # can be taken: its process is dead
                        pass
            yield

    def _done_path(self, index: int) -> Path:
        return self._progress / f"{index:05d}.json"

    def done(self, index: int) -> tuple[Shard, list[tuple[str, str]]] | None:
        """A finished shard and what was skipped in it, or None if it is not finished."""
        path = self.folder / shard_file(index, self.count)
        if not self._done_path(index).is_file() or not path.is_file():
            return None
        try:
            values = json.loads(self._done_path(index).read_text())
            shard = read_shard(values["shard"], self.layout.record_bytes)
            skipped = [(str(name), str(reason)) for name, reason in values["skipped"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None  # a damaged record of a shard: it is made again
        return (shard, skipped) if shard.file == path.name and path.stat().st_size == shard.bytes else None

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
                with disk(path):
                    writer.write(self.layout.to_bytes(moments, label))
                number += 1
        finally:
            with disk(path):
                writer.close()
        shard = Shard(path.name, number, partial.stat().st_size, remote.file_sha256(partial))
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
