"""Tokens of a trained model: after any of its blocks, at any noise level, with or without the true label.

Features for many examples are averaged over tokens and kept on disk:

    <cache>/<key>/manifest.json         what the features are of; the key is a hash of it
    <cache>/<key>/features_00000.npy    (rows, levels, blocks, D) float32
    <cache>/<key>/labels_00000.npy      (rows,) int32

Every file appears whole, so that a pass that was interrupted goes on where it stopped.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sra_jax import config as config_lib
from sra_jax import files, values
from sra_jax.data.dataset import Dataset, ExampleSource, told
from sra_jax.diffusion.guidance import without
from sra_jax.diffusion.process import Process
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.runs.state import Params
from sra_jax.runs.trained import TrainedModel

CONDITIONS = ("null", "true")
SHARD_BYTES = 2**28
IN_MEMORY_BYTES = 2**30
MAPPED_FILES = 128
READ_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which features.

    Attributes:
      blocks: ascending block numbers from 1.
      levels: ascending noise levels, fractions of the process's time range: 0 = data, 1 = noise.
      condition: the label that the network sees: "null" for the null label, "true" for the example's own.
      seed: of the noise; an example has the same noise at every level.
    """

    blocks: tuple[int, ...]
    levels: tuple[float, ...]
    condition: str = "null"
    seed: int = 0

    def check(self, depth: int) -> None:
        """Raises `UserError` where a network of `depth` blocks has no such features."""
        wrong = [block for block in self.blocks if not 1 <= block <= depth]
        if wrong or not self.blocks or list(self.blocks) != sorted(set(self.blocks)):
            raise UserError(
                f"--blocks={','.join(map(str, self.blocks))}: give ascending block numbers from 1 to {depth}, or all"
            )
        levels = self.levels
        if not levels or list(levels) != sorted(set(levels)) or not all(0 <= level <= 1 for level in levels):
            raise UserError(
                f"--levels={','.join(map(str, levels))}: give ascending noise levels between 0 (data) and 1 (noise)"
            )
        if self.condition not in CONDITIONS:
            raise UserError(f"--condition={self.condition!r} is unknown; allowed: {', '.join(CONDITIONS)}")


def check_condition(condition: str, config: ConfigDict) -> None:
    """Raises `UserError` where a run would be shown a null label that it has not, or was never trained with."""
    if condition == "null" and not config.label_dropout:
        raise UserError(
            "--condition=null shows the network the null label, which this run was never trained with "
            "(label_dropout=0): give --condition=true"
        )


def parse_blocks(given: Sequence[str], depth: int) -> tuple[int, ...]:
    """The --blocks flag: block numbers, or `all` of the network's.

    Raises:
      UserError: something else.
    """
    if list(given) == ["all"]:
        return tuple(range(1, depth + 1))
    try:
        return tuple(values.whole("--blocks", block) for block in given)
    except UserError as error:
        raise UserError(f"--blocks={','.join(given)}: give block numbers such as 4,8,12, or all") from error


def parse_levels(given: Sequence[str]) -> tuple[float, ...]:
    """The --levels flag: numbers.

    Raises:
      UserError: something else.
    """
    try:
        return tuple(values.number("--levels", level) for level in given)
    except UserError as error:
        raise UserError(f"--levels={','.join(given)}: give numbers between 0 (data) and 1 (noise)") from error


def times(process: Process, levels: Sequence[float]) -> jax.Array:
    """Noise levels in the process's own time (L,): fractions of a flow's [0, 1], or steps 0 .. T-1."""
    dtype = jax.eval_shape(lambda: process.sample_time(jax.random.key(0), 1)).dtype
    t = np.asarray(levels, np.float64) * process.time_extent
    if jnp.issubdtype(dtype, jnp.integer):
        t = np.minimum(np.floor(t + 1e-6), process.time_extent - 1)
    return jnp.asarray(t, dtype)


def make_extractor(
    model: TrainedModel, dataset: Dataset, settings: Settings, pool: bool
) -> Callable[[Params, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, jax.Array]]:
    """The pure function `extract(params, batch, indices) -> (x_t, features)`, to be jitted.

    Args:
      model: the trained model.
      dataset: gives `encode` and the empty caption.
      settings: which features.
      pool: average over tokens.

    Returns:
      A function of the parameters, a batch of examples and their numbers (B,), which seed their noise. It returns the
      noisy latents (B,L,H,W,C) and the features (B,L,K,N,D), or (B,L,K,D) with `pool`, for L levels and K blocks.
    """
    process, networks = config_lib.process_of(model.config), model.networks
    null = model.config.data.num_classes if dataset.null is None else dataset.null

    def extract(params: Params, batch: Mapping[str, jax.Array], indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.key(settings.seed)
        x0 = dataset.encode(batch, jax.random.fold_in(key, indices[0]))
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), x0.shape[1:]))(indices)
        y = told(batch) if settings.condition == "true" else without(told(batch), null)
        network = networks.model(params)

        def at(time: jax.Array) -> tuple[jax.Array, jax.Array]:
            t = jnp.full(len(x0), time)
            x_t = process.perturb(x0, noise, t)
            _, tokens = network(x_t, t, y, taps=settings.blocks, stop=settings.blocks[-1])
            return x_t, jnp.stack([x.mean(axis=1) if pool else x for x in tokens], axis=1)

        x_t, features = jax.lax.map(at, times(process, settings.levels))
        return jnp.moveaxis(x_t, 0, 1), jnp.moveaxis(features, 0, 1)

    return extract


class _Chosen:
    """Some examples of a source with their numbers, as grain reads them."""

    def __init__(self, source: ExampleSource, indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        index = int(self._indices[position])
        return {**self._source[index], "index": np.asarray(index, np.int32)}


class FeatureSet:
    """Features on disk: rows of (levels, blocks, D) and their labels.

    Attributes:
      labels: (rows,) int32.
      shape: (levels, blocks, D).
    """

    def __init__(self, folder: Path):
        self._paths = sorted(folder.glob("features_*.npy"))
        try:
            shards = [np.load(path, mmap_mode="r") for path in self._paths[:1]]
            labels = [np.load(path) for path in sorted(folder.glob("labels_*.npy"))]
            self.shape = shards[0].shape[1:]
            row_bytes = shards[0].itemsize * int(np.prod(self.shape))
            for path, part in zip(self._paths, labels, strict=True):
                if path.stat().st_size < len(part) * row_bytes:
                    raise ValueError(f"{path.name} is shorter than its {len(part)} labels")
            whole = row_bytes * sum(map(len, labels)) <= IN_MEMORY_BYTES
            self._whole = np.concatenate([np.load(path) for path in self._paths]) if whole else None
        except (OSError, ValueError, IndexError, EOFError) as error:
            raise UserError(f"the features in {folder} are damaged ({error}): delete this folder") from error
        self._starts = np.cumsum([0, *map(len, labels)])
        self.labels = np.concatenate(labels)
        # a mapped file counts as an open one: of a large set only some may be mapped at a time
        mapped = functools.lru_cache(maxsize=MAPPED_FILES)
        self._mapped = mapped(lambda shard: np.load(self._paths[shard], mmap_mode="r"))

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows `indices` (n,) as (n, levels, blocks, D) float32."""
        if self._whole is not None:
            return self._whole[indices]
        out = np.empty((len(indices), *self.shape), np.float32)
        where = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(where):
            chosen = where == shard
            out[chosen] = self._mapped(int(shard))[indices[chosen] - self._starts[shard]]
        return out


def extract_to_disk(
    model: TrainedModel, dataset: Dataset, indices: np.ndarray, settings: Settings, cache: Path, batch_size: int,
    name: str,
) -> FeatureSet:
    """Pooled features of examples `indices` of a dataset, from the cache as far as it has them.

    Args:
      model: the trained model.
      dataset: where the examples are.
      indices: their numbers.
      settings: which features.
      cache: folder of all features that are kept.
      batch_size: examples at a time over all devices.
      name: what the progress bar says.
    """
    manifest = {
        "checkpoint": model.fingerprint(), "settings": dataclasses.asdict(settings),
        "data": {k: v for k, v in model.config.data.to_dict().items() if k not in ("workers", "cache")},
        "examples": len(dataset.source), "indices": hashlib.sha256(np.asarray(indices, np.int64).tobytes()).hexdigest(),
    }  # fmt: skip
    text = json.dumps(manifest, indent=2, sort_keys=True)
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder, "choose another --cache"):
        _fill(folder, manifest, model, dataset, indices, settings, batch_size, name)
    return FeatureSet(folder)


def _fill(
    folder: Path, manifest: Mapping[str, Any], model: TrainedModel, dataset: Dataset, indices: np.ndarray,
    settings: Settings, batch_size: int, name: str,
) -> None:
    """Make the files of a folder of features that are not there yet."""
    batch_size = -(-batch_size // model.mesh.size) * model.mesh.size
    row_bytes = 4 * len(settings.levels) * len(settings.blocks) * model.config.model.width
    rows = batch_size * max(1, SHARD_BYTES // (row_bytes * batch_size))
    plan = {"rows_per_shard": rows, "of": manifest}
    if (folder / "manifest.json").exists():
        rows = _rows_per_shard(folder)  # the shards there may be of another batch size
    else:
        _write(folder / "manifest.json", lambda file: file.write(json.dumps(plan, indent=2).encode()))
    extract = jax.jit(make_extractor(model, dataset, settings, pool=True))
    with tqdm(total=len(indices), desc=name, unit="example", dynamic_ncols=True, leave=False) as bar:
        for shard, first in enumerate(range(0, len(indices), rows)):
            part = indices[first : first + rows]
            bar.update(len(part) if (folder / f"labels_{shard:05d}.npy").exists() else 0)
            if not (folder / f"labels_{shard:05d}.npy").exists():  # written after its features
                features, labels = _extract_shard(extract, model, dataset, part, batch_size, bar)
                _write(folder / f"features_{shard:05d}.npy", functools.partial(np.save, arr=features))
                _write(folder / f"labels_{shard:05d}.npy", functools.partial(np.save, arr=labels))


def _rows_per_shard(folder: Path) -> int:
    try:
        rows = json.loads((folder / "manifest.json").read_text())["rows_per_shard"]
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows_per_shard is {rows!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'manifest.json'} is damaged ({error!r}): delete this folder") from error
    return rows


def _extract_shard(
    extract: Callable[..., Any], model: TrainedModel, dataset: Dataset, indices: np.ndarray, batch_size: int, bar: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    padded = np.concatenate([indices, np.repeat(indices[:1], -len(indices) % batch_size)])
    stream = grain.MapDataset.source(_Chosen(dataset.source, padded)).batch(batch_size)
    features, labels = [], []
    for batch in stream.to_iter_dataset(grain.ReadOptions(num_threads=READ_THREADS)):
        put = sharding.put_rows({key: np.asarray(array) for key, array in batch.items()}, model.mesh)
        _, pooled = extract(model.params, put, put.pop("index"))
        features.append(sharding.gather(pooled))
        labels.append(np.asarray(batch["label"], np.int32))
        bar.update(min(batch_size, len(indices) - batch_size * (len(features) - 1)))
    return np.concatenate(features)[: len(indices)], np.concatenate(labels)[: len(indices)]


def _write(path: Path, write: Callable[[Any], Any]) -> None:
    with files.whole(path) as unfinished, unfinished.open("wb") as file:
        write(file)
