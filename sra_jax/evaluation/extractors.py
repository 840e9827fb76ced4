"""Feature extractors by name: `inception`, `inception_random`, `classifier`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax.errors import UserError
from sra_jax.evaluation.classifier import (
    TrainedClassifier,
    fingerprint,
    load_classifier,
    load_labelled,
    save_classifier,
    split_abstract,
    train_classifier,
)
from sra_jax.evaluation.features import Extractor
from sra_jax.evaluation.images import ImageSet
from sra_jax.files import cache_folder
from sra_jax.interop.inception import InceptionWeights, load_weights, random_weights
from sra_jax.interop.safetensors_tree import checksum
from sra_jax.models.inception import Inception

EXTRACTORS = ("inception", "inception_random", "classifier")


def inception_extractor(name: str, weights: InceptionWeights, resize: str = "tf1") -> Extractor:
    """The FID Inception network with given weights: pool (N,2048), logits (N,1008), spatial (N,2023).

    Greyscale images are repeated to three channels; `resize` is one of `sra_jax.models.inception.RESIZES`.
    """
    graphdef, _ = nnx.split(nnx.eval_shape(Inception))

    def apply(parameters: Any, images: jax.Array) -> Mapping[str, jax.Array]:
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
        return nnx.merge(graphdef, parameters)(images, resize)._asdict()

    return Extractor(
        name=name,
        identity=f"{name}/{weights.checksum}" + ("" if resize == "tf1" else f"/{resize}_resize"),
        outputs=frozenset({"pool", "logits", "spatial"}),
        apply=apply,
        parameters=weights.parameters,
        published=weights.published,
        resize=resize,
    )


def classifier_extractor(classifier: TrainedClassifier) -> Extractor:
    """The trained classifier: pool (N,128) is its last hidden layer, logits (N,K) are scores of the data's classes."""
    graphdef, _ = split_abstract(classifier.image_shape, classifier.num_classes)

    def apply(parameters: Any, images: jax.Array) -> Mapping[str, jax.Array]:
        features, logits = nnx.merge(graphdef, parameters)(images)
        return {"pool": features, "logits": logits}

    return Extractor(
        name="classifier",
        identity=classifier_identity(classifier),
        outputs=frozenset({"pool", "logits"}),
        apply=apply,
        parameters=classifier.parameters,
        image_shape=classifier.image_shape,
        predicts_labels=True,
        num_classes=classifier.num_classes,
    )


def classifier_identity(classifier: TrainedClassifier) -> str:
    """`classifier/<fingerprint of the data>/<checksum of the weights>`."""
    return f"classifier/{classifier.fingerprint}/{checksum(classifier.parameters)}"


def classifier_path(data_fingerprint: str) -> Path:
    """Where a classifier trained on that data is kept."""
    return cache_folder() / f"classifier-{data_fingerprint}.safetensors"


def trained_on(data: ImageSet, *, progress: bool = True) -> TrainedClassifier:
    """The classifier of this data: from the cache, or trained now and kept there.

    Raises:
      UserError: `data` has no labels or large images; see `load_labelled`.
    """
    images, labels = load_labelled(data)
    path = classifier_path(fingerprint(images, labels))
    if not path.exists():
        save_classifier(train_classifier(images, labels, progress=progress), path)
    return load_classifier(path)


def build_extractor(
    name: str,
    *,
    weights: str | Path | None = None,
    data: ImageSet | None = None,
    identity: str | None = None,
    progress: bool = True,
    resize: str = "tf1",
) -> Extractor:
    """The extractor of that name.

    Args:
      name: one of EXTRACTORS.
      weights: `inception`: the published checkpoint or the safetensors file made of it, None for the cache or the
        network. `classifier`: a file that was kept in the cache. `inception_random` has no file.
      data: `classifier`: the labelled reference images, to train on where neither `weights` nor the cache has it.
      identity: `classifier`: the identity that a statistics file asks for, where there are no reference images.
      progress: whether training shows a progress bar.
      resize: of `inception` and `inception_random`, one of `sra_jax.models.inception.RESIZES`.

    Raises:
      UserError: unknown name, missing or damaged weights, nothing to train on.
    """
    if resize != "tf1" and not name.startswith("inception"):
        raise UserError(f"--resize={resize} is a way to the Inception network; --extractor={name} resizes nothing")
    if name == "inception":
        return inception_extractor(name, load_weights(weights), resize)
    if name == "inception_random":
        if weights is not None:
            raise UserError("--extractor=inception_random makes its own weights; leave --weights out")
        return inception_extractor(name, random_weights(), resize)
    if name == "classifier":
        if weights is not None:
            return classifier_extractor(load_classifier(Path(weights)))
        if data is not None:
            return classifier_extractor(trained_on(data, progress=progress))
        return classifier_extractor(_cached_classifier(identity))
    raise UserError(f"unknown extractor {name!r}: expected one of {', '.join(EXTRACTORS)}")


def _cached_classifier(identity: str | None) -> TrainedClassifier:
    parts = (identity or "").split("/")
    if len(parts) != 3 or parts[0] != "classifier":
        raise UserError(
            "--extractor=classifier needs labelled reference images to train on, or a statistics file made with that "
            "extractor, or --weights"
        )
    path = classifier_path(parts[1])
    if not path.exists():
        raise UserError(
            f"the reference was made with the classifier {identity}, which is not in {path.parent}: copy {path.name} "
            "from the machine that made it and give it with --weights, or give the reference's images instead"
        )
    return load_classifier(path)
