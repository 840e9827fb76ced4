"""Draws a run's losses against those that its recipe is expected to have, and says where it leaves the band.

A reference curve is of runs of a recipe with several seeds. One in configs/curves that is of the run's own recipe is
found by itself, and --curve names any other. Losses are averaged over five logged steps on both sides; the band is what
the seeds and the batches explain. With --make a curve is written from runs that differ in their seeds.

Exit codes: 0 within the band, 1 outside of it somewhere, 2 bad input.

Examples:

    python tools/compare.py --workdir=runs/a,runs/b,runs/c --make=curve.json --name=configs/digits.py
    python tools/compare.py --workdir=runs/digits --curve=curve.json --output=compare.png
    python tools/compare.py --workdir=runs/digits
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags

from sra_jax import cli, files
from sra_jax import config as config_lib
from sra_jax.benchmarks import curves
from sra_jax.errors import UserError
from sra_jax.runs import CONFIG

FLAGS = flags.FLAGS

cli.paths_flag("workdir", None, "Folder of the run; with --make folders of several.", local=True, required=True)
cli.path_flag("curve", None, "Reference curve; default: the one of the run's recipe in configs/curves.", local=True)
cli.path_flag("output", None, "Write the figure to this new PNG file.", local=True)
cli.path_flag("make", None, "Write a reference curve of the runs to this new file.", local=True)
flags.DEFINE_string("name", None, "With --make: what the curve is called; default: the recipe's name.")


def main() -> int | None:
    """Compare, or make."""
    workdirs = [pathlib.Path(workdir) for workdir in FLAGS.workdir]
    configs = [config_lib.read(workdir / CONFIG) for workdir in workdirs]
    if FLAGS.make:
        path = files.check_output("--make", FLAGS.make)
        made = json.dumps(curves.make(workdirs, FLAGS.name or configs[0].name))
        files.write_results({path: lambda path: files.write_text(path, made + "\n")})
        return None
    if len(workdirs) > 1:
        raise UserError(f"--workdir={','.join(FLAGS.workdir)} names several runs: only --make takes more than one")
    if FLAGS.output:
        files.check_output("--output", FLAGS.output)
    curve = curves.read(pathlib.Path(FLAGS.curve)) if FLAGS.curve else curves.fitting(configs[0])
    steps, losses = curves.losses_of(workdirs[0])
    followed = {name: curves.follow(curve, name, steps, losses[name]) for name in curve.losses if name in losses}
    if not followed:
        raise UserError(f"{workdirs[0]} has logged none of {', '.join(curve.losses)}, which the curve is of")
    left = False
    for name, one in followed.items():
        for first, last, distance in one.outside():
            left = True
            print(
                f"{name}: {'above' if distance > 0 else 'below'} the band from step {first} to {last}, at most "
                f"{abs(distance):.1f} times its half width from the middle"
            )
    first, last = next(iter(followed.values())).steps[[0, -1]]
    print(f"{'outside' if left else 'within'} the band of {curve.name}, steps {first} to {last}")
    if FLAGS.output:
        path = pathlib.Path(FLAGS.output)
        files.write_results({path: lambda path: curves.draw(path, curve, followed)})
    return 1 if left else None


if __name__ == "__main__":
    cli.run(main)
