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

    # A result once more, here and now, by all that its record says: does it agree, and what is otherwise?
    python tools/fid.py --again=result.json
    python tools/fid.py --again=W/evaluation/step_0400000.json --guidance_scale=1.9
"""

import contextlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sra_jax import heap

if __name__ == "__main__":
    heap.tune()

import numpy as np
from absl import flags

from sra_jax import cli, files, remote, values
from sra_jax import config as config_lib
from sra_jax.data import classes
from sra_jax.distributed import compilation_cache
from sra_jax.distributed.devices import check_devices
from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate, judge, record
from sra_jax.evaluation import samples as runs
from sra_jax.evaluation.datasets import OWN, is_dataset, named_images
from sra_jax.evaluation.extractors import EXTRACTORS
from sra_jax.evaluation.features import Extractor
from sra_jax.evaluation.images import Digest, ImageSet, open_images
from sra_jax.evaluation.reference import (
    Reference,
    check_statistics_path,
    holds_inception_statistics,
    image_size_of,
    load_reference,
    parts_of,
    save_reference,
    stored_metadata,
)
from sra_jax.models.inception import RESIZES
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling.generation import Generator, generator_of, labels_for
from sra_jax.sampling.options import asked, define_label_flags, define_sampling_flags, sampling_overrides

FLAGS = flags.FLAGS

cli.path_flag("samples", None, "images to measure: an npz with arr_0 (N,H,W,C) uint8, or a folder of png or jpg")
cli.source_flag(
    "reference",
    None,
    "what to compare with: ADM's reference npz, a statistics file from --make_reference, an npz or a folder of images, "
    "a dataset (digits, idx:DIR, imagefolder:DIR, tfds:NAME), or 'dataset', the training set of --workdir",
)
cli.path_flag("data_dir", None, "folder of TFDS's sets, for --reference=tfds:NAME; by default TFDS's own", local=True)
cli.path_flag("workdir", None, "measure samples of this run's checkpoint in place of --samples")
cli.whole_flag("step", None, "with --workdir: which checkpoint; by default the newest", 0, values.COUNT_LIMIT)
flags.DEFINE_enum("tree", "ema", ["ema", "params"], "with --workdir: which of the two parameter trees")
cli.whole_flag("num_samples", 50_000, "with --workdir: how many samples", 2, values.COUNT_LIMIT)
cli.whole_flag("sampling_batch_size", 250, "with --workdir: samples at a time, over all devices", 1, values.BATCH_LIMIT)
cli.path_flag("save_samples", None, "with --workdir: write the samples to this new npz file, for ADM's suite")
define_label_flags()
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
flags.DEFINE_enum(
    "resize",
    "tf1",
    RESIZES,
    "how images come to Inception's 299 pixels. tf1: as ADM's suite, to which ImageNet's figures refer. pytorch: as "
    "pytorch-fid, to which COCO's refer",
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
cli.path_flag("again", None, "measure once more what this file holds, a result, and say whether the two agree")
REPEATED = (
    "workdir", "samples", "step", "tree", "ema", "num_samples", "labels", "prompt", "prompts", "sampling_batch_size",
    "reference", "data_dir", "extractor", "weights", "resize", "batch_size", "seed",
)  # fmt: skip
"""Flags that are kept with a result as they were given; those of the sampler and the metrics as they turned out."""


def _repeat() -> dict[str, object] | None:
    """What --again names; flags that are not on the command line are set as they were for it."""
    if not FLAGS.again:
        return None
    old = record.read(FLAGS.again)
    for name, value in old[record.NAME]["given"].items():
        if name in FLAGS and not FLAGS[name].present and value not in (None, [], ""):
            FLAGS[name].parse(value)
    return old


def _given(metrics: tuple[str, ...], **resolved: object) -> dict[str, object]:
    """The flags that repeat this result."""
    return {name: FLAGS[name].value for name in REPEATED} | {"metrics": list(metrics), **resolved}


def _record_of_run(model: TrainedModel, generator: Generator, metrics: tuple[str, ...]) -> dict[str, object]:
    """What of a run shapes its result."""
    sampling = record.given_sampling(generator.describe())
    return {
        "given": _given(metrics, step=model.step, **sampling),
        **record.of_model(model.config, model.step, model.weights, record.params_checksum(model.params), generator),
    }


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
    """The reference: its images as a set that is open, statistics as their path."""
    name, labelled = FLAGS.reference, FLAGS.extractor == "classifier"
    if name and FLAGS.data_dir and not name.startswith("tfds:"):
        raise UserError(f"--data_dir={FLAGS.data_dir} is for --reference=tfds:NAME, this is --reference={name}")
    if model and name:
        reference = runs.open_reference(name, model.config.data, labelled=labelled, data_dir=FLAGS.data_dir)
    elif not name or not is_dataset(name):
        reference = name
    elif name == OWN:
        raise UserError("--reference=dataset is the training set of a run: it needs --workdir")
    elif samples is None and name != "digits":
        raise UserError(f"--reference={name} comes in the samples' size: give --samples or --workdir, too")
    else:
        shape = samples.shape if samples is not None else (0, 8, 8, 1)
        reference = named_images(name, shape[1], shape[3], labelled=labelled, data_dir=FLAGS.data_dir)
    if isinstance(reference, str) and not stored_metadata(reference) and not holds_inception_statistics(reference):
        return open_images(reference)
    return reference


def _say_what_is_there(what: str, images: ImageSet) -> None:
    if images.class_names is not None:
        said = classes.described(len(images.class_names), images.class_names)
        print(f"{what} {images.name}: {said}", file=sys.stderr)
    if images.left_out:
        print(f"{what} {images.name}: left out {images.left_out}", file=sys.stderr)


def _metrics(extractor: Extractor, parts: frozenset[str], *, labels: bool) -> tuple[str, ...]:
    """Those asked for; by default those that extractor and reference can give, and a word on the others."""
    if FLAGS.metrics is None or FLAGS.metrics == ["all"]:
        metrics = evaluate.default_metrics(extractor, labels=labels, parts=parts)
        wanted = evaluate.default_metrics(extractor, labels=labels)
        if FLAGS.metrics is not None:
            wanted = tuple(
                name for name, (_, output, _) in evaluate.METRICS.items()
                if output in extractor.outputs and (name != "accuracy" or name in wanted)
            )  # fmt: skip
            metrics = tuple(name for name in wanted if evaluate.METRICS[name][2] in (None, *parts))
        if left := [name for name in wanted if name not in metrics]:
            print(f"left out: {', '.join(left)}, which {FLAGS.reference} holds nothing for", file=sys.stderr)
    else:
        metrics = tuple(FLAGS.metrics)
    evaluate.check_metrics(metrics, extractor, labels=labels)
    return metrics


def _check_reference(source: str | ImageSet | None, parts: frozenset[str], metrics: tuple[str, ...]) -> None:
    """What the metrics need of the reference is there."""
    needed = [name for name in metrics if evaluate.METRICS[name][2]]
    if needed and source is None:
        raise UserError(f"{', '.join(needed)} need --reference; without one choose --metrics=inception_score")
    if lacking := [name for name in needed if evaluate.METRICS[name][2] not in parts]:
        raise UserError(
            f"--metrics={','.join(lacking)}: {FLAGS.reference} holds {', '.join(sorted(parts))} statistics only; leave "
            "these out, or give ADM's file or the images"
        )
    if source is not None and isinstance(source, str) and "features" not in parts and not stored_metadata(source):
        print(
            f"{source} holds mu and sigma only, and does not say of what: pytorch-fid and clean-fid resize images in "
            f"other ways than ADM's suite. This is --resize={FLAGS.resize}; pytorch-fid's needs --resize=pytorch",
            file=sys.stderr,
        )


def _label_translation(
    extractor: Extractor, metrics: tuple[str, ...], model: TrainedModel | None, samples: ImageSet | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """How the samples' labels are numbered by the classifier, by the names of classes; the metrics that can be had."""
    if "accuracy" not in metrics:
        return None, metrics
    try:
        if model is not None:
            names, count = model.class_names, model.config.data.num_classes
        else:
            assert samples is not None and samples.labels is not None, "accuracy is asked of labelled samples only"
            if samples.labels.min() < 0:
                raise UserError(f"labels of {FLAGS.samples} run from {samples.labels.min()}, and must be from 0")
            names, count = samples.class_names, int(samples.labels.max()) + 1
            count = count if names is None else len(names)
        return evaluate.label_translation(extractor, names, count, FLAGS.samples or FLAGS.workdir), metrics
    except UserError as error:
        if FLAGS.metrics is not None and "accuracy" in FLAGS.metrics:
            raise
        print(f"accuracy is left out: {error}", file=sys.stderr)
        return None, tuple(name for name in metrics if name != "accuracy")


def _made(model: TrainedModel, generator: Generator) -> dict[str, object]:
    """How the samples are made, for the result."""
    if config_lib.tells_captions(model.config):
        shown = {"prompts": FLAGS.prompts or list(FLAGS.prompt)}
    else:
        shown = {"labels": FLAGS.labels}
    return {"step": model.step, "tree": model.weights, **shown, "sampling": generator.describe()}


def _judge_run(model: TrainedModel, generator: Generator) -> dict[str, object]:
    """The share of samples that show what was asked for, where a judge can tell."""
    if FLAGS.reference or FLAGS.metrics or FLAGS.make_reference:
        raise UserError(
            f"--prompts={FLAGS.prompts} asks the judge of whole canvases, which needs no --reference, --metrics or "
            "--make_reference; for the other metrics write the captions into a file and give its name"
        )
    found, images = judge.measure(generator, model.params, FLAGS.prompts, FLAGS.num_samples, FLAGS.seed)
    result = {"samples": f"{FLAGS.workdir} step {model.step}", **_made(model, generator), **found}
    result[record.NAME] = {**_record_of_run(model, generator, ()), "environment": record.environment_now()}
    path = runs.write_result(remote.path(FLAGS.workdir), model.step, result)
    print(f"wrote {path}", file=sys.stderr)
    if FLAGS.save_samples:
        files.write_results({remote.path(FLAGS.save_samples): lambda path: files.write_npz(path, {"arr_0": images})})
    return result


def _measure_run(
    model: TrainedModel, generator: Generator, reference: Reference | None, extractor: Extractor,
    metrics: tuple[str, ...], translation: np.ndarray | None,
) -> dict[str, object]:
    """Generate, measure, keep the result in the workdir."""
    workdir, labels = remote.path(FLAGS.workdir), asked(model, FLAGS.num_samples, FLAGS.seed)
    made = _made(model, generator)
    samples = runs.Samples(
        generator, model.params, FLAGS.num_samples, labels, extractor, keep_images=bool(FLAGS.save_samples),
        folder=runs.unfinished_folder(
            workdir,
            {**made, "extractor": extractor.identity, "images": bool(FLAGS.save_samples), "shown": labels},
        ),
    )  # fmt: skip
    with samples.locked():
        if kept := samples.kept():
            print(f"{kept} of {FLAGS.num_samples} samples are kept from an earlier attempt", file=sys.stderr)
        result = evaluate.measure_features(
            samples.features(f"samples of step {model.step}"), reference, extractor, metrics=metrics,
            image_size=generator.image_size(), seed=FLAGS.seed, translation=translation,
        )  # fmt: skip
        result = {"samples": f"{FLAGS.workdir} step {model.step}", **made, **result}
        result[record.NAME] = {
            **_record_of_run(model, generator, metrics), **record.of_measurement(extractor, reference)
        }  # fmt: skip
        path = runs.write_result(workdir, model.step, result)
        if FLAGS.save_samples:
            files.write_results(
                {remote.path(FLAGS.save_samples): lambda path: samples.write_npz(path, model.class_names)}
            )
        samples.forget()
    print(f"wrote {path}", file=sys.stderr)
    return result


def _measure_files(
    samples: ImageSet, reference: Reference | None, extractor: Extractor, metrics: tuple[str, ...],
    translation: np.ndarray | None,
) -> dict[str, object]:
    """Measure; how often each class is among the samples belongs to the result."""
    digest = Digest()
    result = evaluate.measure(
        digest.watched(samples.batches(256)), reference, extractor, metrics=metrics, batch_size=FLAGS.batch_size,
        total=len(samples), seed=FLAGS.seed, translation=translation,
    )  # fmt: skip
    if samples.labels is not None:
        counts = np.unique(samples.labels, return_counts=True)[1]
        result["samples_per_class"] = [int(counts.min()), int(counts.max())]
    result[record.NAME] = {
        "given": _given(metrics), "samples": digest.text, **record.of_measurement(extractor, reference)
    }  # fmt: skip
    return {"samples": FLAGS.samples, **result}


def main() -> int | None:
    """Measure; with --again also compare, and return 1 where the results do not agree."""
    old = _repeat()
    _check_flags()
    result = _measured()
    if old is None or result is None:
        return None
    agrees, lines = record.compare(old, record.plain(result))
    print(f"{FLAGS.again}: " + "\n".join(lines), file=sys.stderr)
    return None if agrees else 1


def _measured() -> dict[str, object] | None:
    """Open everything, refuse what cannot work, then measure; the result, if there is one."""
    check_devices()
    compilation_cache.use()
    model = generator = samples = None
    if FLAGS.workdir:
        files.check_output("--workdir", remote.path(FLAGS.workdir) / runs.FOLDER, folder=True)
        model = TrainedModel(remote.path(FLAGS.workdir), FLAGS.step, FLAGS.tree, sampling_overrides(), FLAGS.ema)
        chosen = asked(model, 1, FLAGS.seed)  # refuses what does not go with the run
        if not config_lib.tells_captions(model.config):
            labels_for(np.zeros(1, np.int64), chosen, model.config.data.num_classes, FLAGS.seed)  # these classes exist
        generator = generator_of(model, FLAGS.sampling_batch_size, FLAGS.seed)  # finds the decoder's weights
        if judge.can_tell(model.config.data, FLAGS.prompts):
            result = _judge_run(model, generator)
            _report(result, judge.table(result))
            return result
    if FLAGS.samples:
        samples = open_images(FLAGS.samples)
        _say_what_is_there("samples", samples)
    source = _open_reference(model, samples)
    if isinstance(source, ImageSet):
        _say_what_is_there("reference", source)
    if source is not None and samples is not None:
        evaluate.check_sizes(FLAGS.reference, image_size_of(source), samples.shape[1:3])
    elif source is not None and generator is not None:
        evaluate.check_sizes(FLAGS.reference, image_size_of(source), generator.image_size())
    extractor, source = runs.extractor_for(FLAGS.extractor, FLAGS.weights, source, FLAGS.resize)
    parts = frozenset() if source is None else parts_of(source, extractor)
    metrics: tuple[str, ...] = ()
    if model or samples is not None:
        if model:
            labels = not config_lib.tells_captions(model.config)
        else:
            labels = samples is not None and samples.labels is not None
        metrics = _metrics(extractor, parts if source is not None else frozenset(evaluate.PARTS), labels=labels)
    count = len(samples) if samples is not None else FLAGS.num_samples
    if metrics and count < evaluate.least_samples(metrics):
        raise UserError(
            f"{FLAGS.samples or 'the run'} has {count} images; {', '.join(metrics)} need at least "
            f"{evaluate.least_samples(metrics)}"
        )
    _check_reference(source, parts, metrics)
    translation, metrics = _label_translation(extractor, metrics, model, samples)

    with contextlib.ExitStack() as locks:
        for flag in ("save_samples", "make_reference", "json"):
            if path := FLAGS[flag].value:
                locks.enter_context(files.locked_output(path, f"choose another --{flag}"))
        return _work(model, generator, samples, source, extractor, metrics, translation)


def _work(
    model: TrainedModel | None, generator: Generator | None, samples: ImageSet | None, source: str | ImageSet | None,
    extractor: Extractor, metrics: tuple[str, ...], translation: np.ndarray | None,
) -> dict[str, object] | None:
    """Load the reference, measure, report; the result, if there is one."""
    reference = None
    if source is not None and (FLAGS.make_reference or any(evaluate.METRICS[name][2] for name in metrics)):
        with_features = bool(FLAGS.make_reference or evaluate.NEEDS_FEATURES & set(metrics))
        reference = load_reference(source, extractor, with_features=with_features, batch_size=FLAGS.batch_size)
    if FLAGS.make_reference and reference is not None:
        files.write_results({remote.path(FLAGS.make_reference): lambda path: save_reference(reference, path)})
        print(f"wrote {FLAGS.make_reference}", file=sys.stderr)
    if model is not None and generator is not None:
        result = _measure_run(model, generator, reference, extractor, metrics, translation)
    elif samples is not None:
        result = _measure_files(samples, reference, extractor, metrics, translation)
    else:
        return None
    _report(result, evaluate.table(result))
    return result


def _report(result: dict[str, object], table: str) -> None:
    """A table for people, one line for programs."""
    print(table, file=sys.stderr)
    line = json.dumps(result)
    print(line)
    if FLAGS.json:
        files.write_results({remote.path(FLAGS.json): lambda path: files.write_text(path, line + "\n")})


if __name__ == "__main__":
    cli.run(main)
