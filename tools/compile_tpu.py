"""Compile a recipe for a TPU slice on a machine without a TPU, and say whether it fits and what it would take.

The train step, or with --sample the sampler for batch_size images, is built by the functions that main.py uses and
compiled by libtpu (pip install of the version that the installed JAX names; --help works without). No data is needed:
where data.path is empty, random latents of the recipe's shape stand in. Memory and operations are the compiler's; times
are estimates from the chip's published rates.

What the recipe leaves open of mesh, remat policy and accumulation is chosen as main.py would choose it on the slice.
--search tries meshes, remat policies and accumulations, leaves out what surely does not fit, says how each does, and
ends with the fastest that fits and the flags that give it (--json has them too). --table compiles every recipe of
--recipes for every slice of --topologies, each as main.py would run it there. A compilation takes half a minute on two
cores, whatever the depth. --results keeps what the compiler said of each program and reads it again when the same
program is met, so that a table or a search goes on where it stopped.

--attention=plain,flash compiles the recipe with each of these implementations, and with each remat policy of --remat,
and prints them side by side.

--platform=cuda lowers the step for CUDA, which is as far as one gets without a GPU: layouts, FLOPs and state are
checked, memory is not.

Exit codes: 0 fits (or lowered), 2 bad input, 3 does not fit.

Examples:

    python tools/compile_tpu.py --config=configs/sit_xl2.py --topology=v5e:4x4
    python tools/compile_tpu.py --config=configs/sit_xl2.py --topology=v5e-256 --config.mesh.fsdp=16 --json=report.json
    python tools/compile_tpu.py --config=configs/sit_xl2.py --topology=v5e:4x4 --search --results=compiled
    python tools/compile_tpu.py --config=configs/sit_xl2.py --topology=v6e:2x2 --sample --config.batch_size=64
    python tools/compile_tpu.py --config=configs/sit_xl2_512.py --topology=v5e:4x4 --attention=plain,flash \\
        --remat=none,dots,block --config.mesh.fsdp=4 --results=compiled
    python tools/compile_tpu.py --table --results=compiled
    python tools/compile_tpu.py --config=configs/sit_xl2.py --topology=v5e:16x16 --slices=2 --config.batch_size=512
    python tools/compile_tpu.py --config=configs/sit_xl2.py --platform=cuda --devices=8
"""

import importlib
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is run, and JAX must not look for a TPU

from sra_jax import cli, files, remote  # first: it quiets what the others load

# isort: split
import jax
from absl import flags
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.distributed import chips
from sra_jax.errors import UserError
from sra_jax.planning import report as compile_report
from sra_jax.planning import search as compile_search

FLAGS = flags.FLAGS
EXIT_DOES_NOT_FIT = 3
TOPOLOGIES = ("v4-8", "v4-32", "v5e-16", "v5e-256", "v5p-16", "v6e-16")

CONFIG = config_lib.define_flag("The recipe: configs/NAME.py, or configs/NAME.py:VARIANT.")
flags.DEFINE_string("topology", "v5e:4x4", "Slice to compile for: v5e:4x4, v4:2x2x4, v5e-256, v4-8, ...")
flags.DEFINE_enum("platform", "tpu", ["tpu", "cuda"], "What to compile, or (cuda) lower, for.")
cli.whole_flag("slices", 1, "So many slices of --topology, linked by a network.", 1, 1024)
cli.whole_flag("devices", 8, "Number of GPUs with --platform=cuda.", 1, 1024)
flags.DEFINE_bool("sample", False, "Compile the sampler instead of the train step.")
flags.DEFINE_bool("search", False, "Try meshes, remat policies and accumulations; print the fastest that fits.")
flags.DEFINE_bool("table", False, "Every recipe of --recipes for every slice of --topologies, as a Markdown table.")
flags.DEFINE_list("attention", None, "Implementations of attention to compare, as --config.model.attention takes them.")
flags.DEFINE_list("remat", None, "Remat policies to compare them with; by default the recipe's.")
flags.DEFINE_list("recipes", None, "Names of configs/ for --table; by default all SiT and DiT recipes.")
flags.DEFINE_list("topologies", list(TOPOLOGIES), "Slices for --table.")
cli.path_flag(
    "results", None, "Folder that keeps a JSON file of each compilation, to be read again next time.", local=True
)
cli.path_flag("json", None, "File to write the report, or the list of reports, to.")


def main() -> int:
    """Dispatch on the flags."""
    if FLAGS.json:
        files.check_output("--json", FLAGS.json, overwrite=True)
    if FLAGS.results:
        files.check_output("--results", FLAGS.results, folder=True)
    if FLAGS.table:
        reports = [entry(name, slice_) for name in recipes() for slice_ in FLAGS.topologies]
        write_json(reports)
        print(compile_report.table(reports))
        return 0
    config = config_lib.from_flag(CONFIG.value)
    if FLAGS.platform == "cuda":
        return lower_for_cuda(config)
    wanted = chips.parse_slice(FLAGS.topology, FLAGS.slices)
    if FLAGS.attention or FLAGS.remat:
        return compare(config, wanted)
    if FLAGS.search:
        report = search(config, wanted)
    elif FLAGS.sample:
        report = compiled(compile_search.cheapest(config), wanted)
        write_json(report)
    else:
        report = compile_search.chosen(config, wanted, lambda config: compiled(config, wanted), print)
        write_json(report)
    print(compile_report.describe(report))
    return 0 if report["fits"] else EXIT_DOES_NOT_FIT


def compiled(config: ConfigDict, wanted: chips.Slice) -> compile_report.Report:
    """The report of one compilation, from --results where it is there already."""
    return compile_report.compile_for(
        config, wanted, FLAGS.sample, pathlib.Path(FLAGS.results) if FLAGS.results else None
    )


def search(config: ConfigDict, wanted: chips.Slice) -> compile_report.Report:
    """The fastest setting that fits, each setting said as it is tried; the nearest one where none fits."""
    started = time.monotonic()
    found = compile_search.Search(
        config, wanted, lambda config: compiled(config, wanted),
        lambda line: print(f"{time.monotonic() - started:5.0f} s  {line}", flush=True), FLAGS.sample,
    )  # fmt: skip
    values, report = found.run()
    write_json({"settings": values, "report": report, "tried": [report for _, report in found.tried]})
    print("the fastest that fits:" if report["fits"] else "none fits; the nearest:")
    print(" ".join(f"--config.{key}={value}" for key, value in values.items()))
    return report


def compare(config: ConfigDict, wanted: chips.Slice) -> int:
    """The recipe with each implementation of attention and each remat policy, as a table."""
    config = compile_search.begun(config, wanted)
    settings = [
        compile_search.with_settings(config, {"model.attention": attention, "model.remat": remat})
        for attention in FLAGS.attention or [config.model.attention]
        for remat in FLAGS.remat or [config.model.remat]
    ]
    for one in settings:
        config_lib.check(compile_report.without_data(one), wanted.size, "tpu")
    reports = []
    for one in settings:
        reports.append(compiled(one, wanted))
        outcome = "fits" if reports[-1]["fits"] else "does not fit"
        print(f"{one.model.attention}, remat {one.model.remat}: {outcome}", file=sys.stderr, flush=True)
    write_json(reports)
    print(compile_report.table(reports, compile_report.ATTENTION_COLUMNS))
    return 0


def recipes() -> list[str]:
    """Names of the recipes of the table."""
    folder = pathlib.Path(__file__).resolve().parents[1] / "configs"
    known = sorted(path.stem for path in folder.glob("[sd]it_*.py"))
    chosen = FLAGS.recipes or known
    if unknown := set(chosen) - set(known):
        raise UserError(f"--recipes={','.join(sorted(unknown))}: there is no such recipe; allowed: {', '.join(known)}")
    return chosen


def entry(name: str, slice_name: str) -> compile_report.Report:
    """One row of the table."""
    wanted = chips.parse_slice(slice_name)
    config = importlib.import_module(f"configs.{name}").get_config()
    report = compile_search.chosen(config, wanted, lambda config: compiled(config, wanted), _silent)
    print(f"{name} {slice_name}: {'fits' if report['fits'] else 'does not fit'}", file=sys.stderr, flush=True)
    return report | {"slice": slice_name}


def _silent(_: str) -> None:
    """The table says it all."""


def lower_for_cuda(config: ConfigDict) -> int:
    """Lower the train step for CUDA and say what can be known without a GPU."""
    jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    config = compile_report.without_data(config)
    config_lib.check(config, FLAGS.devices)
    program, text = compile_report.lower_for_platform(config, jax.devices(), "cuda")
    flops = config_lib.step_flops(config)
    state = compile_report.state_bytes(program)
    print(
        f"{config.name}, train_step, lowered for {FLAGS.devices} GPU(s): {text.count(chr(10)):,} lines of StableHLO\n"
        f"mesh              {', '.join(f'{axis}={size}' for axis, size in program.mesh.shape.items())}\n"
        f"state on a device {', '.join(f'{k} {compile_report.gigabytes(v)}' for k, v in state.items())}\n"
        f"FLOPs a device    {flops.total / FLAGS.devices:.4e} analytic\n"
        "fits: unknown (XLA compiles for CUDA only where there is a GPU)"
    )
    write_json({"recipe": config.name, "platform": "cuda", "devices": FLAGS.devices, "state_bytes": state,
                "model_flops": flops.total / FLAGS.devices})  # fmt: skip
    return 0


def write_json(content: object) -> None:
    """To --json, whole or not at all."""
    if FLAGS.json:
        text = json.dumps(content, indent=2) + "\n"
        files.write_results({remote.path(FLAGS.json): lambda path: files.write_text(path, text)})


if __name__ == "__main__":
    cli.run(main)
