"""A classifier trained on the reference data itself: features for sets that the FID Inception knows nothing of."""

import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sra_jax.errors import UserError
from sra_jax.evaluation.images import ImageSet
from sra_jax.interop.safetensors_tree import read_safetensors, write_safetensors
from sra_jax.models.classifier import LARGEST_SIDE, Classifier

STEPS = 1500
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
HELD_OUT = 10  # one image in so many is not trained on
MOST_CLASSES = 100_000


class TrainedClassifier(NamedTuple):
    """Parameters of `sra_jax.models.classifier.Classifier` and what they were trained on.

    Attributes:
      parameters: nested dictionary of float32 arrays.
      image_shape: (H,W,C).
      num_classes: labels are 0 to num_classes - 1.
      fingerprint: 16 hexadecimal digits, a hash of images and labels.
      accuracy: on the images that were held out.
    """

    parameters: Any
    image_shape: tuple[int, int, int]
    num_classes: int
    fingerprint: str
    accuracy: float


@functools.cache
def split_abstract(image_shape: tuple[int, int, int], num_classes: int) -> tuple[Any, dict[str, Any]]:
    """(graphdef, tree of shapes): the classifier is `nnx.merge(graphdef, parameters)`."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Classifier(image_shape, num_classes, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def check_labelled(data: ImageSet) -> np.ndarray:
    """Refuses a set that no classifier can be trained on, before any image is read.

    Returns:
      The labels (N,).

    Raises:
      UserError: no labels, images larger than LARGEST_SIDE, fewer than two classes or 20 images.
    """
    if data.labels is None:
        raise UserError(
            f"the classifier is trained on labelled images, and {data.name} has no labels: give an npz with arr_1, or "
            "a folder with one subfolder a class"
        )
    if max(data.shape[1:3]) > LARGEST_SIDE:
        raise UserError(
            f"the classifier is for images up to {LARGEST_SIDE}x{LARGEST_SIDE}, {data.name} has "
            f"{data.shape[1]}x{data.shape[2]}: use --extractor=inception"
        )
    lowest, highest = data.labels.min(), data.labels.max()
    if lowest < 0 or not 1 <= highest < MOST_CLASSES or len(data) < 2 * HELD_OUT:
        raise UserError(
            f"{data.name} has {len(data)} images with labels {lowest} to {highest}; the classifier needs at least "
            f"{2 * HELD_OUT} images of two classes, numbered from 0 to at most {MOST_CLASSES - 1}"
        )
    return data.labels


def load_labelled(data: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    """All images (N,H,W,C) and labels (N,) of a set; see `check_labelled`."""
    labels = check_labelled(data)
    return np.concatenate([images for images, _ in data.batches(1024)]), labels


def fingerprint(images: np.ndarray, labels: np.ndarray) -> str:
    """16 hexadecimal digits that stand for these images and labels."""
    digest = hashlib.sha256(f"{images.shape} {images.dtype}".encode())
    digest.update(np.ascontiguousarray(images).tobytes())
    digest.update(np.ascontiguousarray(labels, np.int64).tobytes())
    return digest.hexdigest()[:16]


def train_classifier(
    images: np.ndarray, labels: np.ndarray, *, steps: int | None = None, progress: bool = True
) -> TrainedClassifier:
    """Trains with Adam on cross-entropy, the same way every time: same data, machine and versions, same weights.

    Args:
      images: (N,H,W,C) uint8.
      labels: (N,) integers from 0.
      steps: optimiser steps, of BATCH_SIZE images each; None takes STEPS.
      progress: whether there is a progress bar.
    """
    steps = STEPS if steps is None else steps
    image_shape, num_classes = images.shape[1:], int(labels.max()) + 1
    held_out = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    train_images, train_labels = images[~held_out], labels[~held_out]
    model = Classifier(image_shape, num_classes, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    parameters = nnx.to_pure_dict(state)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, optimizer_state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(parameters: Any) -> jax.Array:
            _, logits = nnx.merge(graphdef, parameters)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, optimizer_state = optimizer.update(jax.grad(loss)(parameters), optimizer_state)
        return optax.apply_updates(parameters, updates), optimizer_state

    optimizer_state = optimizer.init(parameters)
    generator = np.random.default_rng(0)
    batch_size = min(BATCH_SIZE, len(train_images))
    order = np.empty(0, np.int64)
    for _ in tqdm(range(steps), desc="classifier", unit="step", disable=not progress):
        if len(order) < batch_size:
            order = generator.permutation(len(train_images))
        chosen, order = order[:batch_size], order[batch_size:]
        parameters, optimizer_state = step(
            parameters, optimizer_state, train_images[chosen], train_labels[chosen].astype(np.int32)
        )

    @jax.jit
    def predict(parameters: Any, images: jax.Array) -> jax.Array:
        return jnp.argmax(nnx.merge(graphdef, parameters)(images)[1], axis=-1)

    test_images, test_labels = images[held_out], labels[held_out]
    blocks = range(0, len(test_images), 1000)
    predicted = np.concatenate([np.asarray(predict(parameters, test_images[at : at + 1000])) for at in blocks])
    accuracy = float((predicted == test_labels).mean())
    parameters = jax.tree.map(np.asarray, parameters)
    return TrainedClassifier(parameters, image_shape, num_classes, fingerprint(images, labels), accuracy)


def save_classifier(classifier: TrainedClassifier, path: Path) -> None:
    """Writes a safetensors file that `load_classifier` reads."""
    metadata = {
        "image_shape": " ".join(map(str, classifier.image_shape)),
        "num_classes": str(classifier.num_classes),
        "fingerprint": classifier.fingerprint,
        "accuracy": str(classifier.accuracy),
    }
    write_safetensors(path, classifier.parameters, metadata)


def load_classifier(path: Path) -> TrainedClassifier:
    """Reads what `save_classifier` wrote.

    Raises:
      UserError: the file is missing, damaged or holds something else.
    """
    parameters, metadata = read_safetensors(path)
    try:
        height, width, channels = map(int, metadata["image_shape"].split())
        num_classes, trained_on = int(metadata["num_classes"]), metadata["fingerprint"]
        accuracy = float(metadata["accuracy"])
        _, expected = split_abstract((height, width, channels), num_classes)
        if jax.tree.map(np.shape, parameters) != jax.tree.map(np.shape, expected):
            raise ValueError("shapes differ")
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} holds no classifier that was trained for evaluation") from error
    return TrainedClassifier(parameters, (height, width, channels), num_classes, trained_on, accuracy)
