"""Runs a feature extractor over any number of images, split over all devices of this process."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from sra_jax.errors import UserError
from sra_jax.evaluation.devices import batch_shardings, pad_rows
from sra_jax.evaluation.images import ImageBatch, check_images

IMAGES_PER_DEVICE = 32

Features = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A network that turns images into features, and a name for what it is.

    Attributes:
      name: as on the command line.
      identity: name and checksum of the weights. Numbers compare only where it is equal.
      outputs: which of `pool` (N,D), `logits` (N,C), `spatial` (N,S) `apply` returns.
      apply: `apply(parameters, images)`, a pure function of images (N,H,W,C) uint8, returns a dictionary of float32
        arrays named as in `outputs`.
      parameters: of the network, a tree of arrays.
      image_shape: (H,W,C) that the network insists on, or None for any.
      published: whether its numbers compare with published FIDs: the official weights of the FID Inception.
      resize: how it brings images to its size, one of `sra_jax.models.inception.RESIZES`.
      predicts_labels: whether `logits` are scores of the data's own classes.
      num_classes: how many these are.
      class_names: their names, or None where they only have numbers.
    """

    name: str
    identity: str
    outputs: frozenset[str]
    apply: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
    parameters: Any
    image_shape: tuple[int, int, int] | None = None
    published: bool = False
    resize: str = "tf1"
    predicts_labels: bool = False
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None


def rebatch(batches: Iterable[ImageBatch], batch_size: int) -> Iterator[ImageBatch]:
    """Cuts and joins batches to `batch_size` images each; the last one is shorter.

    Raises:
      UserError: some batches have labels and others do not, or images are of different shapes.
    """
    waiting: collections.deque[ImageBatch] = collections.deque()

    def take(count: int) -> ImageBatch:
        parts: list[ImageBatch] = []
        while count:
            images, labels = waiting.popleft()
            if len(images) > count:
                waiting.appendleft((images[count:], None if labels is None else labels[count:]))
                images, labels = images[:count], None if labels is None else labels[:count]
            parts.append((images, labels))
            count -= len(images)
        shape = parts[0][0].shape[1:]
        for images, _ in parts:
            if images.shape[1:] != shape:
                raise UserError(f"images of {images.shape[1:]}, expected {shape} (height, width, channels)")
        known = [labels for _, labels in parts if labels is not None]
        if known and len(known) < len(parts):
            raise UserError("some images have labels and others do not")
        return np.concatenate([images for images, _ in parts]), np.concatenate(known) if known else None

    available = 0
    for images, labels in batches:
        waiting.append((images, labels))
        available += len(images)
        while available >= batch_size:
            yield take(batch_size)
            available -= batch_size
    if available:
        yield take(available)


def extract_features(
    batches: Iterable[ImageBatch],
    extractor: Extractor,
    *,
    batch_size: int | None = None,
    total: int | None = None,
    description: str = "images",
    progress: bool = True,
) -> Iterator[tuple[Features, np.ndarray | None]]:
    """Yields the features of all images, batch by batch, in order, and their labels.

    Batches are cut to one size, the last one is padded and its padding removed again, so every image counts and one
    program is compiled. The next batch is on its way to the devices while the last one's features are read.

    Args:
      batches: pairs of images (B,H,W,C) uint8, any B, all of one size, and labels (B,) or None.
      extractor: the network.
      batch_size: images at a time, over all devices; rounded up to a multiple of their number. None takes
        IMAGES_PER_DEVICE for each.
      total: number of images, for the progress bar.
      description: what the progress bar says.
      progress: whether there is a progress bar (on stderr).

    Raises:
      UserError: images of a wrong type or shape, or features that are not finite.
    """
    devices = jax.local_device_count()
    batch_size = -(-(batch_size or IMAGES_PER_DEVICE * devices) // devices) * devices
    shared, split = batch_shardings()
    parameters = jax.device_put(extractor.parameters, shared)
    run = jax.jit(extractor.apply)

    def fetch(
        outputs: Mapping[str, jax.Array], count: int, labels: np.ndarray | None
    ) -> tuple[Features, np.ndarray | None]:
        features = {name: np.asarray(values)[:count] for name, values in outputs.items()}
        for name, values in features.items():
            if not np.isfinite(values).all():
                raise UserError(f"{extractor.name} gives {name} features that are not finite: its weights are damaged")
        bar.update(count)
        return features, labels

    waiting = None
    with tqdm(total=total, desc=description, unit="image", disable=not progress) as bar:
        shape = extractor.image_shape
        for images, labels in rebatch(batches, batch_size):
            check_images(images, "a batch of images")
            shape = shape or images.shape[1:]
            if images.shape[1:] != tuple(shape):
                raise UserError(f"images of {images.shape[1:]}, expected {tuple(shape)} (height, width, channels)")
            outputs = run(parameters, jax.device_put(pad_rows(images, batch_size), split))
            if waiting is not None:
                yield fetch(*waiting)
            waiting = outputs, len(images), labels
        if waiting is not None:
            yield fetch(*waiting)
