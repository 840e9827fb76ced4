"""The metrics of a run's own samples: generated, decoded and measured in one go, and resumed where it was killed.

Features of finished chunks lie in <workdir>/evaluation/unfinished_*/ until the result is written; a chunk's name holds
the numbers of its samples, and the folder's name everything that the samples depend on.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from sra_jax import files, remote
from sra_jax.errors import RunError, UserError
from sra_jax.evaluation.classifier import check_labelled
from sra_jax.evaluation.datasets import OWN, dataset_images, is_dataset, named_images
from sra_jax.evaluation.extractors import build_extractor
from sra_jax.evaluation.features import Extractor, Features, extract_features
from sra_jax.evaluation.images import ImageSet, npz_names, read_npz
from sra_jax.evaluation.reference import reference_images, refuse_inception_statistics, stored_metadata
from sra_jax.sampling.generation import Asked, Generator

FOLDER = "evaluation"
CHUNK = 1000
SEED = 0


def open_reference(
    name: str, data: ConfigDict, *, labelled: bool = True, data_dir: str | None = None
) -> str | ImageSet:
    """What `load_reference` takes, of a reference as users name it for a run with this `data` section.

    Args:
      name: the reference.
      data: the run's.
      labelled: whether labels are needed.
      data_dir: for tfds, the folder of its sets.

    Raises:
      UserError: there is no such set, or it does not come in the size of the run's images.
    """
    if name == OWN:
        return dataset_images(data, labelled=labelled)
    if is_dataset(name):
        return named_images(name, data.image_size, data.channels, labelled=labelled, data_dir=data_dir)
    stored_metadata(name)  # it is there
    return name


def extractor_for(
    name: str, weights: str | None, reference: str | ImageSet | None, resize: str = "tf1"
) -> tuple[Extractor, str | ImageSet | None]:
    """The extractor of that name; a classifier is trained on the reference's images, or is the one that made it.

    Returns:
      The extractor, which knows the classes' names where the reference does; and the reference, its images in memory
      where they had to be read for the classifier.
    """
    if name != "classifier" or reference is None:
        return build_extractor(name, weights=weights, resize=resize), reference
    if resize != "tf1":
        build_extractor(name, resize=resize)  # refuses it
    stored = stored_metadata(reference)
    if stored is not None:
        extractor = build_extractor(name, weights=weights, identity=stored.extractor)
        return dataclasses.replace(extractor, class_names=stored.class_names), reference
    refuse_inception_statistics(reference, name)
    images = reference_images(reference)
    if images is None:
        raise UserError(f"--extractor={name} is trained on a reference's images, and {reference} holds none")
    if weights is None:
        check_labelled(images)
        images = images.in_memory()
    extractor = build_extractor(name, weights=weights, data=images)
    return dataclasses.replace(extractor, class_names=images.class_names), images


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
    params: dict[str, Any]
    count: int
    labels: Asked
    extractor: Extractor
    folder: Path | None
    keep_images: bool = False

    def kept(self) -> int:
        """How many samples an earlier attempt left, which need not be made again."""
        bounds = [(start, min(start + CHUNK, self.count)) for start in range(0, self.count, CHUNK)]
        return sum(stop - start for start, stop in bounds if self.folder and files.exists(self._path(start, stop)))

    def features(self, description: str = "samples") -> Iterator[tuple[Features, np.ndarray]]:
        """Features and labels of all samples in order; whole chunks of an earlier attempt are read, not made."""
        with tqdm(total=self.count, desc=description, unit="image", dynamic_ncols=True) as bar:
            for start in range(0, self.count, CHUNK):
                stop = min(start + CHUNK, self.count)
                chunk = self._kept(start, stop)
                if chunk is not None:
                    bar.initial += stop - start  # time left is that of the samples still to be made
                    bar.update(stop - start)
                else:
                    chunk = self._make(start, stop, bar)
                yield {k: v for k, v in chunk.items() if k not in ("labels", "images")}, chunk["labels"]

    def _kept(self, start: int, stop: int) -> dict[str, np.ndarray] | None:
        """A chunk of an earlier attempt; None where there is none, or a damaged one, which is made anew."""
        path = self.folder and self._path(start, stop)
        if not path or not files.exists(path):
            return None
        try:
            copy = files.local(path)
            chunk = read_npz(copy, npz_names(copy))
            if {len(values) for values in chunk.values()} != {stop - start} or not {"pool", "labels"} <= chunk.keys():
                raise UserError(f"{path} does not hold {stop - start} samples")
        except UserError as error:
            tqdm.write(f"{error} These samples are made again.", file=sys.stderr)
            return None
        return chunk

    def locked(self) -> contextlib.AbstractContextManager[Any]:
        """Be the only process that makes these samples for as long as the block runs."""
        if self.folder is None:
            return contextlib.nullcontext()
        return files.locked_output(self.folder, "choose other samples, such as another --seed")

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
            try:
                files.write_npz(self._path(start, stop), chunk)
            except OSError as error:
                raise RunError(
                    f"{self.folder} cannot be written ({error}): {start} samples are kept there; make room, and the "
                    "same command goes on with the next"
                ) from error
        return chunk

    def _path(self, start: int, stop: int) -> Path:
        assert self.folder is not None, "only what is kept has a path"
        return self.folder / f"{start:07d}_{stop:07d}.npz"

    def write_npz(self, path: Path, class_names: Sequence[str] | None = None) -> None:
        """The kept images and labels as ADM's suite reads them; memory holds one chunk. After all chunks are made.

        Args:
          path: the file.
          class_names: kept beside, as `class_names`, where they are known.
        """
        chunks = [self._path(start, min(start + CHUNK, self.count)) for start in range(0, self.count, CHUNK)]
        first = read_npz(files.local(chunks[0]), ["images"])["images"]
        labels = []
        with (
            files.whole(path) as unfinished,
            zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *first.shape[1:])}
                np.lib.format.write_array_header_2_0(member, header)
                for path_of_chunk in chunks:
                    chunk = read_npz(files.local(path_of_chunk), ["images", "labels"])
                    member.write(chunk["images"].tobytes())
                    labels.append(chunk["labels"])
            with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate(labels).astype(np.int64))
            if class_names is not None:
                with archive.open("class_names.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(class_names))

    def forget(self) -> None:
        """Delete the kept chunks."""
        if self.folder is not None:
            files.remove_folder(self.folder)


def unfinished_folder(workdir: Path, dependencies: Mapping[str, Any]) -> Path:
    """Where chunks of samples are kept that depend on exactly these values."""
    text = json.dumps(dependencies, sort_keys=True, default=str)
    return remote.path(workdir) / FOLDER / f"unfinished_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def write_result(workdir: Path, step: int, result: Mapping[str, Any]) -> Path:
    """<workdir>/evaluation/step_*.json; a second result of the same step gets a number, none is replaced."""
    folder = remote.path(workdir) / FOLDER
    path = folder / f"step_{step:07d}.json"
    copies = 1
    while files.exists(path):
        copies += 1
        path = folder / f"step_{step:07d}_{copies}.json"
    files.write_results({path: lambda path: files.write_text(path, json.dumps(result, indent=2) + "\n")})
    return path
