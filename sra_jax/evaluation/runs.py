"""The metrics of a run's own samples: generated, decoded and measured in one go, and resumed where it was killed.

Features of finished chunks lie in <workdir>/evaluation/unfinished_*/ until the result is written; a chunk's name holds
the numbers of its samples, and the folder's name everything that the samples depend on.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from sra_jax import whole_files
from sra_jax.data import registry as datasets
from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate
from sra_jax.evaluation.datasets import OWN, dataset_images, is_dataset, named_images
from sra_jax.evaluation.extractors import build_extractor
from sra_jax.evaluation.features import Extractor, Features, extract_features
from sra_jax.evaluation.generation import Generator
from sra_jax.evaluation.images import ImageSet
from sra_jax.evaluation.reference import Reference, load_reference, reference_images, stored_metadata

FOLDER = "evaluation"
CHUNK = 1000
SEED = 0


def open_reference(name: str, data: ConfigDict) -> str | ImageSet:
    """What `load_reference` takes, of a reference as users name it for a run with this `data` section.

    Raises:
      UserError: there is no such set, or it does not come in the size of the run's images.
    """
    if name == OWN:
        return dataset_images(data)
    if is_dataset(name):
        return named_images(name, data.image_size, data.channels)
    return name


def extractor_for(name: str, weights: str | None, reference: str | ImageSet | None) -> Extractor:
    """The extractor of that name; a classifier is trained on the reference's images, or is the one that made it."""
    data = identity = None
    if name == "classifier" and reference is not None:
        data = reference_images(reference)
        identity = None if data else str(stored_metadata(reference)["extractor"])
    return build_extractor(name, weights=weights, data=data, identity=identity)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of one checkpoint, as a stream of features that survives a kill.

    Attributes:
      generator: makes the images.
      params: {"model": ...}.
      count: how many samples.
      labels: as `generation.labels_for` takes them.
      extractor: what they are shown to.
      folder: where finished chunks are kept until `forget`; None keeps none.
      keep_images: whether the images are kept with the features, for `write_npz`.
    """

    generator: Generator
    params: Mapping[str, Any]
    count: int
    labels: str | Sequence[int]
    extractor: Extractor
    folder: Path | None
    keep_images: bool = False

    def kept(self) -> int:
        """How many samples an earlier attempt left, which need not be made again."""
        bounds = [(start, min(start + CHUNK, self.count)) for start in range(0, self.count, CHUNK)]
        return sum(stop - start for start, stop in bounds if self.folder and self._path(start, stop).exists())

    def features(self, description: str = "samples") -> Iterator[tuple[Features, np.ndarray]]:
        """Features and labels of all samples in order; whole chunks of an earlier attempt are read, not made."""
        with tqdm(total=self.count, desc=description, unit="image", dynamic_ncols=True) as bar:
            for start in range(0, self.count, CHUNK):
                stop = min(start + CHUNK, self.count)
                if self.folder is not None and (path := self._path(start, stop)).exists():
                    chunk = _read(path)
                    bar.initial += stop - start  # time left is that of the samples still to be made
                    bar.update(stop - start)
                else:
                    chunk = self._make(start, stop, bar)
                yield {k: v for k, v in chunk.items() if k not in ("labels", "images")}, chunk["labels"]

    def _make(self, start: int, stop: int, bar: tqdm) -> dict[str, np.ndarray]:
        kept: list[np.ndarray] = []

        def images() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch, labels in self.generator.images(self.params, stop, self.labels, start=start):
                if self.keep_images:
                    kept.append(batch)
                bar.update(len(batch))
                yield batch, labels

        stream = extract_features(images(), self.extractor, progress=False)
        parts = [{**features, "labels": labels} for features, labels in stream]
        chunk = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if self.keep_images:
            chunk["images"] = np.concatenate(kept)
        if self.folder is not None:
            _write(self._path(start, stop), chunk)
        return chunk

    def _path(self, start: int, stop: int) -> Path:
        return self.folder / f"{start:07d}_{stop:07d}.npz"

    def write_npz(self, path: Path) -> None:
        """The kept images and labels as ADM's suite reads them; memory holds one chunk. After all chunks are made."""
        chunks = [self._path(start, min(start + CHUNK, self.count)) for start in range(0, self.count, CHUNK)]
        first = _read(chunks[0])["images"]
        part = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = []
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *first.shape[1:])}
                np.lib.format.write_array_header_2_0(member, header)
                for chunk in map(_read, chunks):
                    member.write(chunk["images"].tobytes())
                    labels.append(chunk["labels"])
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(labels).astype(np.int64))
        os.replace(part, path)

    def forget(self) -> None:
        """Delete the kept chunks."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def _write(path: Path, chunk: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        np.savez(file, **chunk)
    os.replace(part, path)


def unfinished_folder(workdir: Path, dependencies: Mapping[str, Any]) -> Path:
    """Where chunks of samples are kept that depend on exactly these values."""
    text = json.dumps(dependencies, sort_keys=True, default=str)
    return Path(workdir) / FOLDER / f"unfinished_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def write_result(workdir: Path, step: int, result: Mapping[str, Any]) -> Path:
    """<workdir>/evaluation/step_*.json; a second result of the same step gets a number, none is replaced."""
    folder = Path(workdir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:07d}.json"
    copies = 1
    while path.exists():
        copies += 1
        path = folder / f"step_{step:07d}_{copies}.json"
    whole_files.write_text(path, json.dumps(result, indent=2) + "\n")
    return path


class TrainingEvaluation:
    """Metrics of the EMA while training (`config.evaluation`), with the code of tools/fid.py.

    Args:
      config: the run's.
      mesh: its devices.
      workdir: its folder.

    Raises:
      UserError: weights or reference are missing, or too few samples are asked for.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, workdir: Path):
        settings = config.evaluation
        self._count, self._workdir = settings.num_samples, Path(workdir)
        self._generator = Generator(config, mesh, datasets.decoder(config.data), settings.batch_size, SEED)
        self._leads = jax.process_index() == 0
        if not self._leads:
            return
        reference = open_reference(settings.reference, config.data)
        self._extractor = extractor_for(settings.extractor, settings.weights or None, reference)
        self._metrics = evaluate.default_metrics(self._extractor, labels=True)
        if self._count < evaluate.least_samples(self._metrics):
            raise UserError(
                f"evaluation.num_samples={self._count}: {', '.join(self._metrics)} need at least "
                f"{evaluate.least_samples(self._metrics)}"
            )
        self._reference: Reference = load_reference(reference, self._extractor)

    def measure(self, ema: Mapping[str, Any], step: int) -> dict[str, float]:
        """The metrics of the EMA at this step, also written to evaluation/step_*.json. Empty but on process 0."""
        params = {"model": ema["model"]}
        if not self._leads:  # generating is everybody's work, measuring process 0's
            for _ in self._generator.images(params, self._count):
                pass
            return {}
        samples = Samples(self._generator, params, self._count, "balanced", self._extractor, folder=None)
        result = evaluate.measure_features(
            samples.features(f"evaluating step {step}"), self._reference, self._extractor, metrics=self._metrics,
            image_size=self._generator.image_size(),
        )  # fmt: skip
        write_result(self._workdir, step, {"step": step, "sampling": self._generator.describe(), **result})
        return {name: float(result[name]) for name in self._metrics}
