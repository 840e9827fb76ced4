"""Measure training, sampling, data and evaluation; beside PyTorch doing the same work, in the same run.

Data is synthetic and dtype float32 unless the flags say otherwise (--config.dtype=bfloat16 is kept with --keep_dtype).
The sides take turns, each in a process of its own, so that neither sees the other's memory or threads; each turn begins
with a run that is not counted; every figure is the median over --repeats rounds, a ratio the median of the rounds'
ratios. Arithmetic is counted analytically (sra_jax/models/flops.py); `matmul_share` relates it to the rate of a
4096x4096 product measured in the same rounds.

Examples:

    # the training step of a recipe, with SRA and without, beside PyTorch (needs torch and timm)
    python tools/benchmark.py train_step --config=configs/sit_b2.py --config.batch_size=8 --peer=pytorch --repeats=3 \\
        --json=r.json

    # step time against batch size, tokens and depth
    python tools/benchmark.py growth --config=configs/sit_b2.py --config.batch_size=4

    # tracing and compiling the step, at the recipe's depth and at twice that depth
    python tools/benchmark.py compile --config=configs/sit_xl2.py

    # 250 steps of the paper's sampler with guidance on [0, 0.7] (a share of them; the loop is the same)
    python tools/benchmark.py sampler --config=configs/sit_b2.py --config.sampling.guidance_scale=1.8 \\
        --config.sampling.guidance_interval=0,0.7 --samples=4 --peer=pytorch

    # all of the above, as the table of docs/speed.md
    python tools/benchmark.py table --config=configs/sit_b2.py --config.batch_size=8 --peer=pytorch --repeats=3 \\
        --config.sampling.steps=20 --config.sampling.guidance_scale=1.8 --config.sampling.guidance_interval=0,0.7

    # what each method adds to the baseline's step, as the table of docs/methods.md; memory by libtpu's compiler
    python tools/benchmark.py methods --config=configs/sit_b2.py --config.batch_size=2 --repeats=7 --topology=v5e:4x4

    # tracing and compiling at the first start and at the second, of training and of sampling
    python tools/benchmark.py start --recipes=sit_b2:smoke,dit_b2:smoke

    # encoding, the FID network and the metrics beside PyTorch, as the table of docs/speed.md
    python tools/benchmark.py beside --repeats=3

    # reading latents; encoding images; the FID network; the metrics: options by --help
    python tools/benchmark.py data --folder=FOLDER
    python tools/benchmark.py vae --folder=FOLDER
    python tools/benchmark.py inception
    python tools/benchmark.py metrics
"""

import functools
import importlib.util
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import ConfigDict

from configs import sit_xl2
from sra_jax import cli, files, remote, values
from sra_jax import config as config_lib
from sra_jax.benchmarks import data, evaluation, measure, start, tasks
from sra_jax.config import flag as config_flag
from sra_jax.distributed import chips
from sra_jax.errors import UserError
from sra_jax.methods.registry import METHODS, names_of
from sra_jax.planning import report

FLAGS = flags.FLAGS
ELSEWHERE = {
    "data": data.read, "vae": data.encode, "inception": evaluation.network, "metrics": evaluation.metrics,
}  # fmt: skip
COMMANDS = ("train_step", "growth", "compile", "sampler", "table", "methods", "start", "beside", *ELSEWHERE)


def define_flags() -> None:
    """Flags of the commands that live in this file."""
    config_lib.define_flag("The recipe; its data is replaced by synthetic latents.")
    flags.DEFINE_enum("peer", "none", ["none", "pytorch"], "What to measure beside ours.")
    flags.DEFINE_bool("peer_tuned_heap", False, "Start PyTorch with a heap that keeps memory, as main.py does.")
    cli.whole_flag("repeats", 5, "Rounds, in each of which every side runs once.", 1, 1000)
    cli.whole_flag("samples", 4, "sampler: samples at a time.", 1, values.BATCH_LIMIT)
    flags.DEFINE_list("methods", list(METHODS), "methods: which of them, as --config.method.name takes them.")
    flags.DEFINE_string("topology", None, "methods: also a chip's memory for SiT-XL/2 on this TPU slice; needs libtpu.")
    flags.DEFINE_list("recipes", ["sit_b2:smoke"], "start: recipes of configs/, NAME or NAME:VARIANT, as they are.")
    flags.DEFINE_list("tasks", list(tasks.PEERS), "beside: which of the tasks.")
    cli.whole_flag("images", 4, "beside: images at a time, of the VAE and of the FID network.", 1, values.BATCH_LIMIT)
    cli.whole_flag("image_size", 256, "beside: their height and width.", 32, 16_384)
    cli.whole_flag("features", 10_000, "beside: features of each of the two sets.", 20, 1_000_000)
    flags.DEFINE_bool("small_vae", False, "beside: a VAE of a hundredth of the size, to try the command.")
    cli.path_flag("json", None, "Write the result to this file, too; an old one is replaced.")
    flags.DEFINE_bool("keep_dtype", False, "Keep the recipe's dtype; by default float32, which CPUs compute in.")


def prepared_config(command: str, value: Any, keep_dtype: bool, peer: str) -> ConfigDict:
    """The recipe on synthetic data, at the sizes it has, if the command can measure it."""
    config = config_lib.from_flag(value)
    with config.unlocked():
        config.data.name, config.data.workers = "synthetic", 0
        if config_lib.tells_captions(config):
            config.data.captions = "embeddings"
        if not keep_dtype:
            config.dtype = "float32"
    config_lib.check(config)
    if command == "methods":
        for name in FLAGS.methods:
            names_of(name)
    if peer == "pytorch":
        for package in ("torch", "timm"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--peer=pytorch needs {package}: python -m pip install -r tests/parity/requirements.txt"
                )
        if config_lib.tells_captions(config):
            raise UserError("--peer=pytorch trains DiT and SiT, not model.name=mmdit: leave --peer out")
        process = config.process
        if process.name == "interpolant":
            trained = process.path == "linear"
        else:
            trained = (process.num_steps, process.schedule, process.variance) == (1000, "linear", "learned_range")
        if not trained or config.dtype != "float32":
            raise UserError(
                "--peer=pytorch trains SiT on the linear path, or DiT with 1000 linear betas and learned variances, in "
                "float32; use a sit_* or dit_* recipe as it is"
            )
        if process.name != "interpolant" and command in ("sampler", "table"):
            raise UserError(f"--peer=pytorch samples SiT only: measure {command} with a sit_* recipe")
        if config_lib.methods_of(config).name != "sra" or config.alignment.distance != "smooth_l1":
            raise UserError("--peer=pytorch aligns with SRA's smooth_l1: use method.name=sra and that distance")
    return config


def chip_memory(wanted: chips.Slice, method: str) -> float:
    """Bytes of a chip that SiT-XL/2 at its batch takes with a method on a slice, the state split over four chips."""
    config = sit_xl2.get_config(method)
    with config.unlocked():
        config.mesh.fsdp = 4
    return report.compile_for(config, wanted)["peak_bytes"]


def main(command: str) -> None:
    """Run a command and report."""
    if command in ELSEWHERE:
        ELSEWHERE[command]()
        return
    if FLAGS.json:
        files.check_output("--json", FLAGS.json, overwrite=True)
    if command == "beside":
        if missing := tasks.missing_peers():
            raise UserError(
                f"beside needs {', '.join(missing)}: python -m pip install -r tests/parity/requirements.txt"
            )
        if unknown := [name for name in FLAGS.tasks if name not in tasks.PEERS]:
            raise UserError(f"--tasks={','.join(unknown)} is unknown; allowed: {', '.join(tasks.PEERS)}")
        sizes = tasks.Sizes(FLAGS.images, FLAGS.image_size, FLAGS.features, FLAGS.small_vae)
        result = measure.beside(sizes, FLAGS.tasks, FLAGS.repeats)
    elif command == "start":
        result = start.table([recipe(name) for name in FLAGS.recipes], measure.say)
    else:
        result = measured(command)
    text = json.dumps(result, indent=2)
    print("\n".join(result["markdown"]) if "markdown" in result else text)
    if FLAGS.json:
        files.write_results({remote.path(FLAGS.json): lambda path: files.write_text(path, text + "\n")})


def recipe(name: str) -> ConfigDict:
    """A recipe of configs/ by name, checked."""
    file, colon, variant = name.partition(":")
    config = config_flag.load(f"configs/{file}.py{colon}{variant}")
    config_lib.check(config)
    return config


def measured(command: str) -> dict[str, Any]:
    """The figures of a command on --config."""
    config = prepared_config(command, FLAGS.config, FLAGS.keep_dtype, FLAGS.peer)
    if command == "train_step":
        result = measure.train_step(config, FLAGS.peer, FLAGS.repeats, FLAGS.peer_tuned_heap)
    elif command == "growth":
        result = measure.growth(config, FLAGS.repeats)
    elif command == "compile":
        result = measure.compile_times(config, FLAGS.repeats)
    elif command == "sampler":
        result = measure.sampler(config, FLAGS.peer, FLAGS.repeats, FLAGS.samples, FLAGS.peer_tuned_heap)
    elif command == "methods":
        memory = functools.partial(chip_memory, chips.parse_slice(FLAGS.topology)) if FLAGS.topology else None
        result = measure.methods(config, FLAGS.methods, FLAGS.repeats, memory)
    else:
        result = measure.table(config, FLAGS.peer, FLAGS.repeats, FLAGS.samples, FLAGS.peer_tuned_heap)
    return result


if __name__ == "__main__":
    arguments = sys.argv[:]
    chosen = arguments.pop(1) if len(arguments) > 1 and not arguments[1].startswith("-") else ""
    if chosen in ("data", "vae"):
        data.define_flags()
    elif chosen in ("inception", "metrics"):
        evaluation.define_flags()
    else:
        define_flags()
    if chosen not in COMMANDS and not set(arguments) & {*cli.HELP, *cli.HELP_FULL}:
        print(f"error: name what to measure: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(cli.EXIT_BAD_INPUT)
    cli.run(lambda: main(chosen), arguments)
