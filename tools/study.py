"""Does a method help, and by how much: methods x seeds of one recipe, trained and measured as one job.

Each cell of the matrix is a normal run in --output/runs. At the steps of --measure_at its EMA is measured: FID, FID
infinity, KID, precision, recall and accuracy of samples that come from the same noise for all cells, the denoising loss
on the same held-out examples, the health of the alignment, and at the end a linear probe of all blocks. The recipe's
`sampling` and `evaluation` sections say how. A finished cell is one file in --output/cells; the table (study.md), all
numbers (study.json) and the figures are made of these, anew after each cell: means and standard errors over seeds,
differences to the method `none` with the same seed, cost of a step by formula and as measured.

The same command goes on where it was killed. More methods or seeds add what is missing; of finished cells only their
files in cells/ are needed, and extractor.safetensors where the extractor is a classifier. Several processes may work on
one --output, on one machine or several: each with its --shard, or all with the same command, since a cell that one is
making is left alone by the others. One process a device: CUDA_VISIBLE_DEVICES=0, 1, ... with --shard=0/8, 1/8, ...

Exit codes: 0 all cells are finished or others are making them, 1 a run failed, 2 bad input, 75 SIGTERM and 130 Ctrl-C:
saved, start it again.

Examples:

    python tools/study.py --config=configs/fashion_mnist.py:study --methods=none,sra_cosine --seeds=0,1,2 --output=study
    python tools/study.py --config=configs/fashion_mnist.py:study --methods=none,sra_cosine,layersync --seeds=0,1,2 \\
        --output=study --test_path=idx:FOLDER:t10k --config.steps=400 --measure_at=200,400

    # any key besides: a row for each method and value
    python tools/study.py --config=configs/digits.py --config.evaluation.extractor=classifier --methods=none,sra \\
        --seeds=0,1 --output=study --vary=optimizer.learning_rate=0.001 --vary=optimizer.learning_rate=0.002

    # the table and the figures of finished cells only
    python tools/study.py --output=study --report
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
from sra_jax.benchmarks import study, study_report
from sra_jax.benchmarks.study_points import Probe
from sra_jax.distributed import compilation_cache
from sra_jax.distributed.devices import check_devices
from sra_jax.errors import UserError
from sra_jax.inspection.tokens import parse_levels

FLAGS = flags.FLAGS

config_lib.define_flag("The recipe; its variants name the methods.")
cli.path_flag("output", None, "Folder of the study.", local=True, required=True)
flags.DEFINE_list("methods", ["none", "sra"], "As variants of the recipe: none, sra, sra_cosine, sra+dispersive, ...")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
flags.DEFINE_multi_string("vary", [], "KEY=VALUE, a further key of the recipe with one of its values; may be repeated.")
flags.DEFINE_list("measure_at", [], "Ascending steps, the last of them the run's; default: a quarter, half, the end.")
cli.source_flag("test_path", None, "data.path of a held-out set; default: a fifth of the training set.")
flags.DEFINE_list("probe_levels", ["0", "0.25", "0.5"], "Noise levels of the probe; empty: no probe.")
cli.whole_flag("probe_examples", 4000, "Train the probe on so many examples; 0: all.", 0, values.COUNT_LIMIT)
cli.whole_flag("probe_tests", 2000, "Test it on so many that are held out; 0: all.", 0, values.COUNT_LIMIT)
flags.DEFINE_string("shard", "0/1", "i/n: this process makes every n-th cell, from the i-th on, counted from 0.")
flags.DEFINE_bool("report", False, "Make table and figures of the finished cells and end.")


def main() -> None:
    """Read the flags, make what is missing, report."""
    output = files.check_output("--output", FLAGS.output, folder=True)
    if FLAGS.report:
        print(study_report.write(output).read_text(), end="")
        return
    shard = study.parse_shard(FLAGS.shard)
    seeds = [values.whole("--seeds", seed, 0, values.SEED_LIMIT) for seed in FLAGS.seeds]
    measured = [values.whole("--measure_at", step, 1, values.COUNT_LIMIT) for step in FLAGS.measure_at]
    if not FLAGS.methods or not seeds:
        raise UserError("--methods and --seeds must each name at least one")
    levels = [level for level in FLAGS.probe_levels if level.strip()]
    probe = Probe(parse_levels(levels), FLAGS.probe_examples, FLAGS.probe_tests) if levels else None
    cells = study.cells_of(FLAGS.methods, seeds, study.parse_varied(FLAGS.vary))
    recipe = study.Recipe(*config_lib.given(), measured)
    heap.tune(max(config_lib.held_by_a_step(recipe.config(cell)) for cell in cells))
    check_devices()
    compilation_cache.use()
    job = study.Study(output, recipe, cells, probe, FLAGS.test_path)
    others = job.run(shard)
    if table := job.report():
        print(table.read_text(), end="")
    if others:
        print(f"{len(others)} cell(s) are being made by other processes", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
