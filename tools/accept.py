"""Accept a machine: whether what it computes is right, and how fast it is. Run it once on a new GPU or TPU host.

It says what is there; compares loss, gradients and ten steps with the CPU's, in float32 and bfloat16; runs and times
every implementation of attention that can run; times the training step of SiT-B/2 and SiT-XL/2 with SRA and without, at
the largest batch that fits, beside the same step in PyTorch where that is installed; times the sampler, the VAE and the
FID network; and kills a run and starts it again. No data and no weights are needed. Each part runs in a process of its
own; one that fails is reported, and the rest goes on. A host with a GPU or a TPU takes about eight minutes.

--output=FOLDER gets acceptance.json, all figures, and acceptance.md, the table that is printed, too. Until then
finished parts lie in unfinished.json there, and the same command goes on where it was stopped. --quick does everything
at small sizes, a few minutes on two cores of a CPU; its times say nothing of a machine.

Exit codes: 0 all is right, 1 a part failed or a result is wrong (the table says which), 2 bad input, 75 SIGTERM and
130 Ctrl-C: finished parts are kept, start it again.

Examples:

    python tools/accept.py --output=acceptance
    python tools/accept.py --quick --output=acceptance
    python tools/accept.py --parts=machine,attention --output=attention
"""

import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import flags

from configs import sit_b2, sit_xl2
from sra_jax import cli, files
from sra_jax import config as config_lib
from sra_jax.benchmarks import acceptance
from sra_jax.errors import UserError

FLAGS = flags.FLAGS
EXIT_WRONG = 1

cli.path_flag("output", None, "Folder for acceptance.json and acceptance.md.", required=True)
flags.DEFINE_bool("quick", False, "Small sizes, for a CPU: a few minutes on two cores.")
flags.DEFINE_list("parts", list(acceptance.PARTS), f"What to do, of {', '.join(acceptance.PARTS)}.")
cli.whole_flag("part_seconds", 600, "A part that takes longer is ended, and has failed.", 1, 86_400)
flags.DEFINE_bool("overwrite", False, "Replace what an earlier run left in --output.")


def recipes(quick: bool) -> dict[str, str]:
    """The recipes that are measured, as JSON, by the names of their networks."""
    if quick:
        config = sit_b2.get_config("smoke")
        config.batch_size = 8
        return {"SiT, 4 blocks": config_lib.to_json(config)}
    return {"SiT-B/2": config_lib.to_json(sit_b2.get_config()), "SiT-XL/2": config_lib.to_json(sit_xl2.get_config())}


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Run the parts, write and print what they found."""
    output = files.check_output("--output", FLAGS.output, folder=True)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is no folder: give the name of one")
    for name in (acceptance.JSON, acceptance.TABLE):
        files.check_output("--output", output / name, FLAGS.overwrite)
    if unknown := [part for part in FLAGS.parts if part not in acceptance.PARTS]:
        raise UserError(f"--parts={','.join(unknown)} is unknown; allowed: {', '.join(acceptance.PARTS)}")
    parts = [part for part in acceptance.PARTS if part in FLAGS.parts]
    settings = acceptance.Settings(FLAGS.quick, recipes(FLAGS.quick), str(ROOT))
    unfinished = acceptance.Unfinished(output, settings, parts)
    with files.locked_output(output / acceptance.JSON, "choose another --output"):
        kept = unfinished.read(FLAGS.overwrite)
        with cli.ends_when_told("finished parts are kept"):
            results = acceptance.accept(settings, parts, FLAGS.part_seconds, say, kept, unfinished.write)
        table = acceptance.table(results)
        print(table, end="")
        figures = json.dumps(results, indent=2) + "\n"
        files.write_results({
            output / acceptance.JSON: lambda path: files.write_text(path, figures),
            output / acceptance.TABLE: lambda path: files.write_text(path, table),
        })  # fmt: skip
        unfinished.remove()
    wrong = [name for name, result in results.items() if not acceptance.passed(result)]
    say(f"not right: {', '.join(wrong)}" if wrong else f"all is right; {output} has the figures")
    return EXIT_WRONG if wrong else 0


if __name__ == "__main__":
    cli.run(main)
