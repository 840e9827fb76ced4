"""How well a linear classifier reads the class off a model's tokens: by block and by noise level.

The protocol of SRA's section C: the frozen EMA, tokens after each block averaged, normalised per channel without affine
part, one linear layer, 80 epochs of batches of 4,096, Adam with a learning rate from 1e-3 to 0 along a cosine. The
network sees the null label (--condition=true shows it the class, which makes it a test of something else). Each example
has one noise, the same at every level. All blocks and levels come from one pass over the data, kept in --cache; all
probes are trained at once. --test_path names data that was held out; without it a fifth of the run's own examples,
always the same, is left out of the probe's training (the diffusion model has seen it).

--output is a folder: probe.json, probe.csv and probe.png with two panels, accuracy by block at the noise level of the
highest mean accuracy and accuracy by noise level at each name's best block there. Runs of one name become a line, their
mean, with a band from the lowest to the highest.

Exit codes: 0 done, 1 made but not written (kept elsewhere, the message says where), 2 bad input.

Examples:

    python tools/linear_probe.py --workdir=runs/digits --output=probe
    python tools/linear_probe.py --workdir=runs/sra_0,runs/sra_1,runs/base_0,runs/base_1 \\
        --names=SRA,SRA,baseline,baseline --levels=0,0.25,0.5 --output=probe
    python tools/linear_probe.py --workdir=W --path=LATENTS --test_path=MORE_LATENTS --blocks=4,8,12 --output=probe
"""

import csv
import io
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
from sra_jax.errors import UserError
from sra_jax.inspection import plots
from sra_jax.inspection.held_out import probe_run
from sra_jax.inspection.probe import Schedule
from sra_jax.inspection.tokens import Settings, check_condition, parse_blocks, parse_levels
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling.options import define_ema_flag

FLAGS = flags.FLAGS
FILES = ("probe.json", "probe.csv", "probe.png")

cli.paths_flag("workdir", None, "Folders of runs.", required=True)
flags.DEFINE_list("names", None, "What the figure calls them; runs of one name are averaged. Default: the folders'.")
cli.path_flag("output", None, "Folder to write to.", required=True)
cli.whole_flag("step", None, "Checkpoint to read; by default the newest.", 0, values.COUNT_LIMIT)
flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Which of the two parameter trees.")
define_ema_flag()
flags.DEFINE_list("blocks", ["all"], "Blocks, counted from 1, or all.")
flags.DEFINE_list("levels", ["0", "0.2", "0.4", "0.6", "0.8"], "Noise levels from 0 (data) to 1 (noise).")
flags.DEFINE_enum("condition", "null", ["null", "true"], "The label that the network sees.")
cli.source_flag("path", None, "data.path of the training set; default: the run's.")
cli.source_flag("test_path", None, "data.path of a held-out set; default: a fifth of the training set.")
cli.whole_flag("num_examples", 0, "Use so many examples of the training set; 0 uses all.", 0, values.COUNT_LIMIT)
cli.whole_flag("epochs", 80, "Passes of the probe over the training set.", 1, 100_000)
cli.whole_flag("batch_size", 4096, "Of the probe; at most a tenth of the training set.", 1, values.BATCH_LIMIT)
cli.number_flag("learning_rate", 1e-3, "Of the probe at its first step.", 0.0, 1000.0)
cli.whole_flag("extraction_batch_size", 256, "Examples through the network at a time.", 1, values.BATCH_LIMIT)
cli.whole_flag("seed", 0, "Of the noise and of the probe's order of examples.", 0, values.SEED_LIMIT)
cli.path_flag("cache", None, "Folder in which features are kept; default: features/ in each workdir.", local=True)
flags.DEFINE_bool("overwrite", False, "Replace the files in --output where they exist.")


def main() -> None:
    """Extract, train, write."""
    output = remote.path(FLAGS.output)
    for name in FILES:
        files.check_output("--output", output / name, FLAGS.overwrite)
    if FLAGS.cache:
        files.check_output("--cache", FLAGS.cache, folder=True)
    names = FLAGS.names or [remote.path(workdir).name for workdir in FLAGS.workdir]
    if len(names) != len(FLAGS.workdir):
        raise UserError(f"--names gives {len(names)} names for {len(FLAGS.workdir)} workdirs; give one a workdir")
    models = [
        TrainedModel(remote.path(workdir), FLAGS.step, FLAGS.weights, ema=FLAGS.ema) for workdir in FLAGS.workdir
    ]
    depths = {model.config.model.depth for model in models}
    if len(depths) > 1:
        raise UserError(f"runs of {sorted(depths)} blocks cannot share a figure; probe each depth by itself")
    settings = Settings(
        parse_blocks(FLAGS.blocks, min(depths)), parse_levels(FLAGS.levels), FLAGS.condition, FLAGS.seed
    )
    settings.check(min(depths))
    for model in models:
        check_condition(settings.condition, model.config)
    with files.locked_output(output / FILES[0], "choose another --output"):
        probe_all(output, names, models, settings)


def probe_all(output: pathlib.Path, names: list[str], models: list[TrainedModel], settings: Settings) -> None:
    """Probe each run and write the files."""
    records = []
    for name, workdir, model in zip(names, FLAGS.workdir, models, strict=True):
        accuracy = probe_one(model, remote.path(workdir), settings)
        records.append({
            "name": name, "workdir": workdir, "step": model.step, "weights": model.weights,
            "accuracy": accuracy.tolist(),
        })  # fmt: skip
        level, block = np.unravel_index(accuracy.argmax(), accuracy.shape)
        print(
            f"{name} ({workdir}, step {model.step}, {model.weights}): best {accuracy.max():.2%} after block "
            f"{settings.blocks[block]} at noise level {settings.levels[level]:g}"
        )
    write(output, records, settings)


def probe_one(model: TrainedModel, workdir: pathlib.Path, settings: Settings) -> np.ndarray:
    """Accuracies (levels, blocks) of one run."""
    return probe_run(
        model, pathlib.Path(FLAGS.cache) if FLAGS.cache else features_folder(workdir), settings,
        Schedule(FLAGS.epochs, FLAGS.batch_size, FLAGS.learning_rate, FLAGS.seed), path=FLAGS.path,
        test_path=FLAGS.test_path, num_examples=FLAGS.num_examples, batch_size=FLAGS.extraction_batch_size,
        name=str(workdir),
    )  # fmt: skip


def features_folder(workdir: pathlib.Path) -> pathlib.Path:
    """Where a run's features are kept: in its folder, and of a run at an address in the folder of copies."""
    if remote.is_address(workdir):
        return files.cache_folder() / "features" / remote.place(workdir)
    return workdir / "features"


def write(output: pathlib.Path, records: list[dict], settings: Settings) -> None:
    """The three files."""
    result = {
        "blocks": settings.blocks, "levels": settings.levels, "condition": settings.condition,
        "epochs": FLAGS.epochs, "seed": FLAGS.seed, "runs": records,
    }  # fmt: skip
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["name", "workdir", "step", "level", "block", "accuracy"])
    for record in records:
        for level, accuracies in zip(settings.levels, record["accuracy"], strict=True):
            for block, accuracy in zip(settings.blocks, accuracies, strict=True):
                rows.writerow([record["name"], record["workdir"], record["step"], level, block, f"{accuracy:.6f}"])
    groups = {
        name: np.array([record["accuracy"] for record in records if record["name"] == name])
        for name in dict.fromkeys(record["name"] for record in records)
    }
    level = int(np.mean([runs.mean(axis=(0, 2)) for runs in groups.values()], axis=0).argmax())
    files.write_results({
        output / "probe.json": lambda path: files.write_text(path, json.dumps(result, indent=2) + "\n"),
        output / "probe.csv": lambda path: files.write_text(path, table.getvalue()),
        output / "probe.png": lambda path: plots.probe_figure(path, groups, settings.blocks, settings.levels, level),
    })  # fmt: skip
    print(f"{output}: {', '.join(FILES)}")


if __name__ == "__main__":
    cli.run(main)
