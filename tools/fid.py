"""Measures generated images: FID, sFID, inception score, precision and recall, as ADM's evaluation suite defines them.

Also KID, FID extrapolated to infinitely many samples, and conditional accuracy. Runs on all devices of the machine.

A table and a progress bar go to stderr, one line of JSON goes to stdout; with --workdir also to
evaluation/step_*.json there. Exit codes: 0 done, 1 made but not written (kept elsewhere, the message says where), 2 bad
input.

Examples:

    # The numbers papers quote, for ImageNet 256: 50,000 samples against ADM's reference file
    python tools/fid.py --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz

    # The same of a run's EMA: generated, decoded and measured without writing images; goes on where it was killed
    python tools/fid.py --workdir=W --num_samples=50000 --reference=VIRTUAL_imagenet256_labeled.npz

    # The demo: a classifier trained on the run's own training set
    python tools/fid.py --workdir=runs/digits --num_samples=2000 --reference=dataset --extractor=classifier

    # Statistics of a folder of images, once; then any number of sample sets against them
    python tools/fid.py --reference=photos/ --make_reference=photos_stats.npz
    python tools/fid.py --samples=samples/ --reference=photos_stats.npz

    # A small set without Inception weights: a classifier trained on the labelled reference images
    python tools/fid.py --samples=samples.npz --reference=digits.npz --extractor=classifier

    # Every metric there is; the result also as a file
    python tools/fid.py --samples=samples.npz --reference=photos_stats.npz --metrics=all --json=result.json
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sra_jax import memory_pages

if __name__ == "__main__":
    memory_pages.use_large_pages()

from absl import flags

from sra_jax import cli, files, values
from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate
from sra_jax.evaluation import samples as runs
from sra_jax.evaluation.datasets import OWN, is_dataset, named_images
from sra_jax.evaluation.extractors import EXTRACTORS
from sra_jax.evaluation.features import Extractor
from sra_jax.evaluation.images import ImageSet, open_images
from sra_jax.evaluation.reference import (
    Reference,
    check_statistics_path,
    load_reference,
    save_reference,
    stored_metadata,
)
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling.generation import generator_of
from sra_jax.sampling.options import define_sampling_flags, parse_labels, sampling_overrides

FLAGS = flags.FLAGS

cli.path_flag("samples", None, "images to measure: an npz with arr_0 (N,H,W,C) uint8, or a folder of png or jpg")
cli.source_flag(
    "reference",
    None,
    "what to compare with: ADM's reference npz, a statistics file from --make_reference, an npz or a folder of images, "
    "a dataset (digits, idx:DIR, imagefolder:DIR, tfds:NAME), or 'dataset', the training set of --workdir",
)
cli.path_flag("workdir", None, "measure samples of this run's checkpoint in place of --samples")
cli.whole_flag("step", None, "with --workdir: which checkpoint; by default the newest", 0, values.COUNT_LIMIT)
flags.DEFINE_enum("tree", "ema", ["ema", "params"], "with --workdir: which of the two parameter trees")
cli.whole_flag("num_samples", 50_000, "with --workdir: how many samples", 2, values.COUNT_LIMIT)
flags.DEFINE_string("labels", "balanced", "with --workdir: balanced, uniform, or class numbers, taken in turn")
cli.whole_flag("sampling_batch_size", 250, "with --workdir: samples at a time, over all devices", 1, values.BATCH_LIMIT)
cli.path_flag("save_samples", None, "with --workdir: write the samples to this new npz file, for ADM's suite")
define_sampling_flags()
cli.path_flag("make_reference", None, "write the statistics of --reference to this new npz file")
flags.DEFINE_enum(
    "extractor",
    "inception",
    EXTRACTORS,
    "the network whose features are compared. inception: the FID network with its published weights. inception_random: "
    "the same network with seeded random weights. classifier: a small network trained on the labelled reference images",
)
cli.path_flag(
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
cli.whole_flag("batch_size", None, "images at a time, over all devices; by default 32 a device", 1, values.BATCH_LIMIT)
cli.whole_flag("seed", 0, "of the random subsets of KID and FID infinity", 0, values.SEED_LIMIT)
cli.path_flag("json", None, "write the result to this new file, too")


def _check_flags() -> None:
    if FLAGS.samples and FLAGS.workdir:
        raise UserError("--samples and --workdir are both given: measure files or a run's own samples, one at a time")
    if not FLAGS.samples and not FLAGS.workdir and not FLAGS.make_reference:
        raise UserError(
            "nothing to do: give --samples or --workdir to measure, or --reference and --make_reference to make "
            "statistics"
        )
    if FLAGS.save_samples:
        if not FLAGS.workdir:
            raise UserError("--save_samples needs --workdir: it writes the samples that are generated")
        files.check_output("--save_samples", FLAGS.save_samples)
    if FLAGS.make_reference:
        if not FLAGS.reference:
            raise UserError("--make_reference needs --reference: the images whose statistics to write")
        check_statistics_path("--make_reference", FLAGS.make_reference)
    if FLAGS.json:
        files.check_output("--json", FLAGS.json)
    files.check_outputs_differ(
        save_samples=FLAGS.save_samples, make_reference=FLAGS.make_reference, json=FLAGS.json
    )  # fmt: skip


def _open_reference(model: TrainedModel | None, samples: ImageSet | None) -> str | ImageSet | None:
    """The reference as it is named, or its images where that is a dataset."""
    if model and FLAGS.reference:
        return runs.open_reference(FLAGS.reference, model.config.data)
    if not FLAGS.reference or not is_dataset(FLAGS.reference):
        return FLAGS.reference
    if FLAGS.reference == OWN:
        raise UserError("--reference=dataset is the training set of a run: it needs --workdir")
    if samples is None and FLAGS.reference != "digits":
        raise UserError(f"--reference={FLAGS.reference} comes in the samples' size: give --samples or --workdir, too")
    shape = samples.shape if samples else (0, 8, 8, 1)
    return named_images(FLAGS.reference, shape[1], shape[3])


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


def _measure_run(
    model: TrainedModel, reference: Reference | None, extractor: Extractor, metrics: tuple[str, ...]
) -> dict[str, object]:
    """Generate, measure, keep the result in the workdir."""
    workdir, labels = pathlib.Path(FLAGS.workdir), parse_labels(FLAGS.labels)
    generator = generator_of(model, FLAGS.sampling_batch_size, FLAGS.seed)
    made = {"step": model.step, "tree": FLAGS.tree, "labels": FLAGS.labels, "sampling": generator.describe()}
    samples = runs.Samples(
        generator, model.params, FLAGS.num_samples, labels, extractor, keep_images=bool(FLAGS.save_samples),
        folder=runs.unfinished_folder(
            workdir, {**made, "extractor": extractor.identity, "images": bool(FLAGS.save_samples)}
        ),
    )  # fmt: skip
    if kept := samples.kept():
        print(f"{kept} of {FLAGS.num_samples} samples are kept from an earlier attempt", file=sys.stderr)
    result = evaluate.measure_features(
        samples.features(f"samples of step {model.step}"), reference, extractor, metrics=metrics,
        image_size=generator.image_size(), seed=FLAGS.seed,
    )  # fmt: skip
    if FLAGS.save_samples:
        samples.write_npz(pathlib.Path(FLAGS.save_samples))
    result = {"samples": f"{FLAGS.workdir} step {model.step}", **made, **result}
    path = runs.write_result(workdir, model.step, result)
    samples.forget()
    print(f"wrote {path}", file=sys.stderr)
    return result


def main() -> None:
    """Open everything, refuse what cannot work, measure, report."""
    _check_flags()
    model = None
    if FLAGS.workdir:
        model = TrainedModel(pathlib.Path(FLAGS.workdir), FLAGS.step, FLAGS.tree, sampling_overrides())
    samples = open_images(FLAGS.samples) if FLAGS.samples else None
    source = _open_reference(model, samples)
    if source is not None:
        stored_metadata(source)
    extractor = runs.extractor_for(FLAGS.extractor, FLAGS.weights, source)
    count = len(samples) if samples else FLAGS.num_samples
    metrics = _metrics(extractor, labels=samples.labels is not None if samples else True) if samples or model else ()
    if metrics and count < evaluate.least_samples(metrics):
        raise UserError(
            f"{FLAGS.samples or 'the run'} has {count} images; {', '.join(metrics)} need at least "
            f"{evaluate.least_samples(metrics)}"
        )
    needed = [name for name in metrics if evaluate.METRICS[name][2]]
    if needed and not FLAGS.reference:
        raise UserError(f"{', '.join(needed)} need --reference; without one choose --metrics=inception_score")

    reference = None
    if source is not None and (needed or FLAGS.make_reference):
        with_features = bool(FLAGS.make_reference or evaluate.NEEDS_FEATURES & set(metrics))
        reference = load_reference(source, extractor, with_features=with_features, batch_size=FLAGS.batch_size)
    if FLAGS.make_reference:
        files.write_results({pathlib.Path(FLAGS.make_reference): lambda path: save_reference(reference, path)})
        print(f"wrote {FLAGS.make_reference}", file=sys.stderr)
    if model:
        result = _measure_run(model, reference, extractor, metrics)
    elif samples:
        result = evaluate.measure(
            samples.batches(256), reference, extractor, metrics=metrics, batch_size=FLAGS.batch_size, total=count,
            seed=FLAGS.seed,
        )  # fmt: skip
        result = {"samples": FLAGS.samples, **result}
    else:
        return
    print(evaluate.table(result), file=sys.stderr)
    line = json.dumps(result)
    print(line)
    if FLAGS.json:
        files.write_results({pathlib.Path(FLAGS.json): lambda path: files.write_text(path, line + "\n")})


if __name__ == "__main__":
    cli.run(main)
