"""Measures generated images: FID, sFID, inception score, precision and recall, as ADM's evaluation suite defines them.

Also KID, FID extrapolated to infinitely many samples, and conditional accuracy. Runs on all devices of the machine.

  # The numbers papers quote, for ImageNet 256: 50,000 samples against ADM's reference file
  python tools/fid.py --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz

  # Statistics of a folder of images, once; then any number of sample sets against them
  python tools/fid.py --reference=photos/ --make_reference=photos_stats.npz
  python tools/fid.py --samples=samples/ --reference=photos_stats.npz

  # A small set without Inception weights: a classifier trained on the labelled reference images
  python tools/fid.py --samples=samples.npz --reference=digits.npz --extractor=classifier

  # Every metric there is; the result also as a file
  python tools/fid.py --samples=samples.npz --reference=photos_stats.npz --metrics=all --json=result.json

A table and a progress bar go to stderr, one line of JSON goes to stdout.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags

from sra_jax import cli
from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate
from sra_jax.evaluation.extractors import EXTRACTORS, build_extractor
from sra_jax.evaluation.features import Extractor
from sra_jax.evaluation.images import open_images
from sra_jax.evaluation.reference import (
    check_new_statistics_path,
    load_reference,
    reference_images,
    save_reference,
    stored_metadata,
)

FLAGS = flags.FLAGS

flags.DEFINE_string("samples", None, "images to measure: an npz with arr_0 (N,H,W,C) uint8, or a folder of png or jpg")
flags.DEFINE_string(
    "reference",
    None,
    "what to compare with: ADM's reference npz, a statistics file from --make_reference, an npz or a folder of images",
)
flags.DEFINE_string("make_reference", None, "write the statistics of --reference to this new npz file")
flags.DEFINE_enum(
    "extractor",
    "inception",
    EXTRACTORS,
    "the network whose features are compared. inception: the FID network with its published weights. inception_random: "
    "the same network with seeded random weights. classifier: a small network trained on the labelled reference images",
)
flags.DEFINE_string(
    "weights",
    None,
    "weights file of the extractor; by default the published Inception checkpoint from the cache or the network",
)
flags.DEFINE_list(
    "metrics",
    None,
    f"which metrics, of {', '.join(evaluate.METRICS)}; or all. By default {', '.join(evaluate.DEFAULT_METRICS)}, and "
    "accuracy for a classifier",
)
flags.DEFINE_integer("batch_size", None, "images at a time, over all devices; by default 32 a device", lower_bound=1)
flags.DEFINE_integer("seed", 0, "of the random subsets of KID and FID infinity", lower_bound=0)
flags.DEFINE_string("json", None, "write the result to this new file, too")


def _check_flags() -> None:
    if not FLAGS.samples and not FLAGS.make_reference:
        raise UserError(
            "nothing to do: give --samples to measure, or --reference and --make_reference to make statistics"
        )
    if FLAGS.make_reference:
        if not FLAGS.reference:
            raise UserError("--make_reference needs --reference: the images whose statistics to write")
        check_new_statistics_path(FLAGS.make_reference)
    if FLAGS.json and pathlib.Path(FLAGS.json).exists():
        raise UserError(f"--json={FLAGS.json} exists and is not overwritten: choose another name or delete it")


def _extractor() -> Extractor:
    data = identity = None
    if FLAGS.extractor == "classifier" and FLAGS.reference:
        data = reference_images(FLAGS.reference)
        identity = None if data else str(stored_metadata(FLAGS.reference)["extractor"])
    return build_extractor(FLAGS.extractor, weights=FLAGS.weights, data=data, identity=identity)


def _metrics(extractor: Extractor, *, labels: bool) -> tuple[str, ...]:
    if FLAGS.metrics is None:
        metrics = evaluate.default_metrics(extractor, labels=labels)
    elif FLAGS.metrics == ["all"]:
        known = extractor.predicts_labels and labels
        metrics = tuple(
            name
            for name, (_, output, _) in evaluate.METRICS.items()
            if output in extractor.outputs and (known or name != "accuracy")
        )
    else:
        metrics = tuple(FLAGS.metrics)
    evaluate.check_metrics(metrics, extractor, labels=labels)
    return metrics


def main() -> None:
    _check_flags()
    samples = open_images(FLAGS.samples) if FLAGS.samples else None
    if FLAGS.reference:
        stored_metadata(FLAGS.reference)
    extractor = _extractor()
    metrics = _metrics(extractor, labels=samples.labels is not None) if samples else ()
    if samples and len(samples) < evaluate.least_samples(metrics):
        raise UserError(
            f"{FLAGS.samples} has {len(samples)} images; {', '.join(metrics)} need at least "
            f"{evaluate.least_samples(metrics)}"
        )
    needed = [name for name in metrics if evaluate.METRICS[name][2]]
    if needed and not FLAGS.reference:
        raise UserError(f"{', '.join(needed)} need --reference; without one choose --metrics=inception_score")

    reference = None
    if FLAGS.reference and (needed or FLAGS.make_reference):
        with_features = bool(FLAGS.make_reference or evaluate.NEEDS_FEATURES & set(metrics))
        reference = load_reference(FLAGS.reference, extractor, with_features=with_features, batch_size=FLAGS.batch_size)
    if FLAGS.make_reference:
        save_reference(reference, FLAGS.make_reference)
        print(f"wrote {FLAGS.make_reference}", file=sys.stderr)
    if samples is None:
        return
    result = evaluate.measure(
        samples.batches(256),
        reference,
        extractor,
        metrics=metrics,
        batch_size=FLAGS.batch_size,
        total=len(samples),
        seed=FLAGS.seed,
    )
    result = {"samples": FLAGS.samples, **result}
    print(evaluate.table(result), file=sys.stderr)
    line = json.dumps(result)
    print(line)
    if FLAGS.json:
        unfinished = f"{FLAGS.json}.{os.getpid()}.unfinished"
        pathlib.Path(unfinished).write_text(line + "\n")
        os.replace(unfinished, FLAGS.json)


if __name__ == "__main__":
    cli.run(main)
