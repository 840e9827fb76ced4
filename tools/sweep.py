"""Finds how to sample from a checkpoint: FID over guidance scale x interval x EMA x steps of the sampler.

Every combination is measured on samples from the same noise and of the same classes; without guidance the interval
makes no difference and is not varied. Each setting is one file in --output/settings; of these are made the table
(sweep.md, the best setting first, with standard errors of FID and of the difference to the best), all numbers
(sweep.json) and a heat map (sweep.png). The same command goes on where it was killed, and more values add what is
missing. What wins here wins on these samples: quote the FID of the winner with another --seed of tools/fid.py.

Exit codes: 0 done, 1 made but not written (kept elsewhere, the message says where), 2 bad input.

Examples:

    python tools/sweep.py --workdir=runs/digits --guidance_scales=1,1.5,2,3 --num_samples=2000 --reference=dataset \\
        --extractor=classifier --output=sweep
    python tools/sweep.py --workdir=W --guidance_scales=1,1.4,1.8,2.2 --guidance_intervals=0:1,0:0.7 \\
        --emas=teacher,power:0.05,power:0.1 --num_samples=10000 --reference=VIRTUAL_imagenet256_labeled.npz \\
        --output=sweep
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from sra_jax import heap

if __name__ == "__main__":
    heap.tune()

from absl import flags

from sra_jax import cli, files, values
from sra_jax import config as config_lib
from sra_jax.benchmarks import sweep
from sra_jax.distributed import compilation_cache
from sra_jax.distributed.devices import check_devices
from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate
from sra_jax.evaluation import samples as runs
from sra_jax.evaluation.extractors import EXTRACTORS
from sra_jax.evaluation.reference import image_size_of, load_reference, parts_of
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling.generation import generator_of
from sra_jax.sampling.options import LABELS_HELP, parse_labels

FLAGS = flags.FLAGS

cli.path_flag("workdir", None, "Folder of the run.", local=True, required=True)
cli.path_flag("output", None, "Folder of the sweep.", local=True, required=True)
cli.whole_flag("step", None, "Checkpoint to read; by default the newest.", 0, values.COUNT_LIMIT)
flags.DEFINE_list("guidance_scales", ["1", "1.25", "1.5", "1.75", "2"], "Scales of guidance; 1 turns it off.")
flags.DEFINE_list("guidance_intervals", None, "LOW:HIGH each, fractions of the time range; default: the run's.")
flags.DEFINE_list("emas", None, "EMAs, as --ema of the other tools takes them; default: the run's ema.sampled.")
flags.DEFINE_list("steps", None, "Numbers of the sampler's steps; default: the run's.")
flags.DEFINE_string("sampler", None, "Sampler of the run's family; default: the run's.")
flags.DEFINE_string("labels", "balanced", LABELS_HELP)
cli.whole_flag("num_samples", 5000, "Samples of each setting.", 2, values.COUNT_LIMIT)
cli.whole_flag("sampling_batch_size", 250, "Samples at a time, over all devices.", 1, values.BATCH_LIMIT)
cli.whole_flag("seed", 0, "Of the noise.", 0, values.SEED_LIMIT)
cli.source_flag("reference", "dataset", "What to compare with, as tools/fid.py takes it.")
cli.path_flag("data_dir", None, "Folder of TFDS's sets, for --reference=tfds:NAME; by default TFDS's own.", local=True)
flags.DEFINE_enum("extractor", "inception", EXTRACTORS, "The network whose features are compared.")
cli.path_flag("weights", None, "Weights file of the extractor.")
flags.DEFINE_list("metrics", [], "Others beside FID, as tools/fid.py takes them.")
cli.whole_flag("folds", 10, "Parts of the samples from which errors are estimated; 1: no errors.", 1, 100)


def main() -> None:
    """Open everything, refuse what cannot work, measure, report."""
    check_devices()
    compilation_cache.use()
    workdir, output = pathlib.Path(FLAGS.workdir), files.check_output("--output", FLAGS.output, folder=True)
    sampling = {"sampler": FLAGS.sampler} if FLAGS.sampler else {}
    plain = TrainedModel(workdir, FLAGS.step, sampling=sampling)
    labels = parse_labels(FLAGS.labels, plain.class_names)
    own_interval, own_steps = sweep.sampling_of(plain.config)
    settings = sweep.settings_of(
        [values.number("--guidance_scales", scale, 1.0, 1000.0) for scale in FLAGS.guidance_scales],
        [_interval(text) for text in FLAGS.guidance_intervals] if FLAGS.guidance_intervals else [own_interval],
        FLAGS.emas or [plain.config.ema.sampled],
        [_steps(text) for text in FLAGS.steps] if FLAGS.steps else [own_steps],
    )  # fmt: skip
    named = runs.open_reference(
        FLAGS.reference, plain.config.data, labelled=FLAGS.extractor == "classifier", data_dir=FLAGS.data_dir
    )
    evaluate.check_sizes(
        FLAGS.reference, image_size_of(named), generator_of(plain, 1, FLAGS.seed).image_size()
    )
    extractor, source = runs.extractor_for(FLAGS.extractor, FLAGS.weights, named)
    assert source is not None, "a reference was opened"
    metrics = tuple(name for name in FLAGS.metrics if name != "fid")
    evaluate.check_metrics(metrics, extractor, labels=True)
    parts = parts_of(source, extractor)
    if lacking := [name for name in metrics if evaluate.METRICS[name][2] not in (None, *parts)]:
        raise UserError(f"--metrics={','.join(lacking)}: {FLAGS.reference} holds nothing for them")
    if FLAGS.num_samples < (least := max(2 * FLAGS.folds, evaluate.least_samples(metrics))):
        raise UserError(f"--num_samples={FLAGS.num_samples}: these metrics and --folds={FLAGS.folds} need {least}")
    translation = None
    if "accuracy" in metrics:
        translation = evaluate.label_translation(
            extractor, plain.class_names, plain.config.data.num_classes, FLAGS.workdir
        )
    plan = sweep.Plan(
        sweep.Weights(plain, sampling), FLAGS.num_samples, labels, FLAGS.sampling_batch_size, FLAGS.seed, metrics,
        FLAGS.folds,
    )  # fmt: skip
    for setting in settings:
        plan.weights.model(setting)  # refuses an EMA or a sampler that cannot be, before any work
    reference = load_reference(source, extractor, with_features=bool(evaluate.NEEDS_FEATURES & set(metrics)))
    with files.locked_output(output / sweep.SUMMARY, "choose another --output"):
        for setting in settings:
            sweep.check_found(output, plan, setting, extractor, reference)
        print(sweep.run(output, plan, settings, extractor, reference, translation).read_text(), end="")


def _interval(text: str) -> tuple[float, float]:
    return config_lib.guidance_interval("--guidance_intervals", text.replace(":", ","))


def _steps(text: str) -> int | str:
    return values.whole("--steps", text, 1) if values.INTEGER.fullmatch(text) else text


if __name__ == "__main__":
    cli.run(main)
