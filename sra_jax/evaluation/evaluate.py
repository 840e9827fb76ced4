"""All metrics of a stream of images in one pass: used by tools/fid.py and by the training loop."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from sra_jax.data import classes
from sra_jax.errors import UserError
from sra_jax.evaluation.features import Extractor, Features, extract_features
from sra_jax.evaluation.frechet import fid_infinity, frechet_distance
from sra_jax.evaluation.images import ImageBatch
from sra_jax.evaluation.inception_score import InceptionScore
from sra_jax.evaluation.kid import kernel_distance
from sra_jax.evaluation.precision_recall import NEIGHBOURS, precision_recall
from sra_jax.evaluation.reference import Reference
from sra_jax.evaluation.statistics import Moments

# name: (label in tables, which output of the extractor it needs, which part of the reference it needs)
METRICS: dict[str, tuple[str, str, str | None]] = {
    "fid": ("FID", "pool", "pool"),
    "sfid": ("sFID", "spatial", "spatial"),
    "inception_score": ("Inception score", "logits", None),
    "precision": ("Precision", "pool", "features"),
    "recall": ("Recall", "pool", "features"),
    "kid": ("KID", "pool", "features"),
    "fid_infinity": ("FID infinity", "pool", "pool"),
    "accuracy": ("Conditional accuracy", "logits", None),
}
NEEDS_FEATURES = frozenset(name for name, (_, _, part) in METRICS.items() if part == "features")
DEFAULT_METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
PARTS = ("pool", "spatial", "features")


def default_metrics(extractor: Extractor, *, labels: bool, parts: Collection[str] = PARTS) -> tuple[str, ...]:
    """ADM's five numbers as far as the extractor has outputs and the reference `parts` for them; accuracy if it knows
    classes."""
    chosen = tuple(
        name for name in DEFAULT_METRICS if METRICS[name][1] in extractor.outputs and METRICS[name][2] in (None, *parts)
    )
    return (*chosen, "accuracy") if extractor.predicts_labels and labels else chosen


def label_translation(
    extractor: Extractor, class_names: Sequence[str] | None, num_classes: int, what: str
) -> np.ndarray:
    """The samples' labels (num_classes,) in the numbering of a classifier's reference, by the classes' names.

    Raises:
      UserError: they do not compare; `what` names the samples.
    """
    return classes.translation(
        class_names, num_classes, extractor.class_names, extractor.num_classes, what, "the reference"
    )


def check_metrics(metrics: Collection[str], extractor: Extractor, *, labels: bool) -> None:
    """Refuses metrics that cannot be computed, before any work starts.

    Args:
      metrics: names, keys of METRICS.
      extractor: the network.
      labels: whether the samples come with labels.

    Raises:
      UserError: an unknown name, or a metric that this extractor or these samples cannot give.
    """
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}: expected some of {', '.join(METRICS)}")
        if METRICS[name][1] not in extractor.outputs:
            raise UserError(
                f"{name} needs {METRICS[name][1]} features, which the extractor {extractor.name} does not have"
            )
    if "accuracy" in metrics and not extractor.predicts_labels:
        raise UserError("accuracy needs a network that knows the data's classes: --extractor=classifier")
    if "accuracy" in metrics and not labels:
        raise UserError("accuracy needs the samples' labels: arr_1 in the npz, or one subfolder a class")


def check_comparable(reference: Reference, extractor: Extractor, image_size: tuple[int, int]) -> None:
    """Refuses to compare images with a reference of another extractor or size.

    Raises:
      UserError: as said.
    """
    if reference.extractor != extractor.identity:
        raise UserError(
            f"the reference {reference.name} was made with the extractor {reference.extractor}, this is "
            f"{extractor.identity}: their numbers do not compare"
        )
    check_sizes(reference.name, reference.image_size, image_size)


def check_sizes(name: str, expected: tuple[int, int] | None, image_size: tuple[int, int]) -> None:
    """Raises a `UserError` where samples of `image_size` (H,W) meet a reference, `name`, of another size."""
    if expected is not None and tuple(expected) != tuple(image_size):
        raise UserError(
            f"samples are {image_size[0]}x{image_size[1]}, the reference {name} is {expected[0]}x{expected[1]} "
            "(height x width): their numbers do not compare"
        )


def measure(
    batches: Iterable[ImageBatch],
    reference: Reference | None,
    extractor: Extractor,
    *,
    metrics: Collection[str],
    batch_size: int | None = None,
    total: int | None = None,
    seed: int = 0,
    progress: bool = True,
    translation: np.ndarray | None = None,
) -> dict[str, Any]:
    """Computes metrics of a stream of images.

    The host holds statistics and, for precision, recall, KID and FID infinity, the pool features: 8 kB an image. Images
    are forgotten as soon as they went through the network.

    Args:
      batches: pairs of images (B,H,W,C) uint8 and labels (B,) or None; any B, all of one size.
      reference: the set to compare with; None if no metric needs one.
      extractor: the network, the same that `reference` was made with.
      metrics: names, keys of METRICS.
      batch_size: images at a time, over all devices.
      total: number of images, for the progress bar.
      seed: of the subsets of KID and FID infinity.
      progress: whether there is a progress bar.
      translation: the samples' labels in the extractor's numbering, for accuracy (`label_translation`); None where they
        have the same.

    Returns:
      A dictionary of plain numbers and strings: the metrics by name (`kid_std` and `kid_subset_size` beside `kid`), and
      `num_samples`, `image_size` [H, W], `extractor`, `reference`, `reference_count`.

    Raises:
      UserError: a metric that cannot be computed from what is given, images that do not compare with the reference, or
        too few images.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise UserError("metrics need at least 2 images, got 0")
    features = extract_features(
        itertools.chain([first], batches), extractor, batch_size=batch_size, total=total, description="samples",
        progress=progress,
    )  # fmt: skip
    return measure_features(
        features, reference, extractor, metrics=metrics, image_size=first[0].shape[1:3], seed=seed,
        translation=translation,
    )  # fmt: skip


def check_measurable(metrics: Collection[str], reference: Reference | None, extractor: Extractor) -> None:
    """Refuses metrics for which the reference lacks what they need.

    Raises:
      UserError: which metric lacks what.
    """
    check_metrics(metrics, extractor, labels=True)
    for name in metrics:
        part = METRICS[name][2]
        if part and (reference is None or getattr(reference, part) is None):
            holder = "no reference is given" if reference is None else f"the reference {reference.name} holds none"
            raise UserError(f"{name} needs a reference's {part} features or statistics, and {holder}")


def measure_features(
    stream: Iterable[tuple[Features, np.ndarray | None]],
    reference: Reference | None,
    extractor: Extractor,
    *,
    metrics: Collection[str],
    image_size: tuple[int, int],
    seed: int = 0,
    translation: np.ndarray | None = None,
) -> dict[str, Any]:
    """As `measure`, from features that `extract_features` made of images of `image_size` (H,W)."""
    check_measurable(metrics, reference, extractor)
    if reference is not None:
        check_comparable(reference, extractor, image_size)
    pool, spatial = Moments(), Moments()
    score = InceptionScore()
    kept: list[np.ndarray] = []
    count = correct = 0

    for features, labels in stream:
        count += len(features["pool"])
        if "fid" in metrics:
            pool.update(features["pool"])
        if "sfid" in metrics:
            spatial.update(features["spatial"])
        if "inception_score" in metrics:
            score.update(features["logits"])
        if "accuracy" in metrics:
            if labels is None:
                raise UserError("accuracy needs the samples' labels")
            if translation is not None:
                labels = translation[labels]
            correct += int((features["logits"].argmax(axis=1) == labels).sum())
        if NEEDS_FEATURES & set(metrics) or "fid_infinity" in metrics:
            kept.append(features["pool"])
    if count < 2:
        raise UserError(f"metrics need at least 2 images, got {count}")

    computed: dict[str, Any] = {}
    if reference is not None:
        if "fid" in metrics:
            computed["fid"] = frechet_distance(pool.statistics(), reference.pool)
        if "sfid" in metrics and reference.spatial is not None:
            computed["sfid"] = frechet_distance(spatial.statistics(), reference.spatial)
        if kept:
            computed |= metrics_of_features(np.concatenate(kept), reference, metrics, seed=seed)
    if "inception_score" in metrics:
        computed["inception_score"] = score.result()
    if "accuracy" in metrics:
        computed["accuracy"] = correct / count
    described = {
        "num_samples": count,
        "image_size": list(image_size),
        "extractor": extractor.identity,
        "reference": None if reference is None else reference.name,
        "reference_count": None if reference is None else reference.count,
    }
    return _ordered(computed) | described


def metrics_of_features(
    features: np.ndarray, reference: Reference, metrics: Collection[str], *, seed: int = 0
) -> dict[str, float]:
    """Those of `metrics` that need the features (N,D) themselves: precision, recall, KID, FID infinity.

    Raises:
      UserError: too few features.
    """
    computed: dict[str, float] = {}
    stored = reference.features
    if stored is not None and {"precision", "recall"} & set(metrics):
        result = precision_recall(features, stored)
        computed |= {name: getattr(result, name) for name in ("precision", "recall") if name in metrics}
    if stored is not None and "kid" in metrics:
        distance = kernel_distance(features, stored, seed=seed)
        computed |= {"kid": distance.mean, "kid_std": distance.std, "kid_subset_size": distance.subset_size}
    if "fid_infinity" in metrics:
        computed["fid_infinity"] = fid_infinity(features, reference.pool, seed=seed)
    return computed


def least_samples(metrics: Collection[str]) -> int:
    """How many images these metrics need at least."""
    if "fid_infinity" in metrics:
        return 20
    return NEIGHBOURS + 1 if {"precision", "recall"} & set(metrics) else 2


def _ordered(computed: dict[str, Any]) -> dict[str, Any]:
    known = [name for metric in METRICS for name in (metric, f"{metric}_std", f"{metric}_subset_size")]
    return {name: computed[name] for name in known if name in computed}


def table(result: dict[str, Any]) -> str:
    """The result of `measure` as lines for a terminal."""
    lines = [
        f"{result['num_samples']} samples of {result['image_size'][0]}x{result['image_size'][1]} against "
        f"{result['reference'] or 'no reference'}, extractor {result['extractor']}"
    ]
    for name, (label, _, _) in METRICS.items():
        if name in result:
            spread = f" ± {result['kid_std']:.6f} (subsets of {result['kid_subset_size']})" if name == "kid" else ""
            lines.append(f"  {label:<22}{result[name]:>12.{6 if name == 'kid' else 4}f}{spread}")
    if result.get("labels") == "balanced" and result["extractor"].startswith("inception/"):
        lines.append(
            "  Every class is sampled equally often (--labels=balanced); published figures of DiT and SiT are of "
            "labels drawn at random (--labels=uniform)"
        )
    return "\n".join(lines)
