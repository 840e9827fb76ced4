"""Measure training, sampling, data and evaluation; beside PyTorch doing the same work, in the same run.

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

  # all of the above, as the table of the README
  python tools/benchmark.py table --config=configs/sit_b2.py --config.batch_size=8 --peer=pytorch --repeats=3 \\
      --config.sampling.steps=20 --config.sampling.guidance_scale=1.8 --config.sampling.guidance_interval=0,0.7

  # reading latents; encoding images; the FID network; the metrics: options by --help
  python tools/benchmark.py data --folder=FOLDER
  python tools/benchmark.py vae --folder=FOLDER
  python tools/benchmark.py inception
  python tools/benchmark.py metrics

Data is synthetic and dtype float32 unless the flags say otherwise (--config.dtype=bfloat16 is kept with --keep_dtype).
The sides take turns, each in a process of its own, so that neither sees the other's memory or threads; each turn begins
with a run that is not counted; every figure is the median over --repeats rounds, a ratio the median of the rounds'
ratios. Arithmetic is counted analytically (sra_jax/models/flops.py); `matmul_share` relates it to the rate of a
4096x4096 product measured in the same rounds.
"""

import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import numpy as np

from sra_jax import memory_pages

COMMANDS = ("train_step", "growth", "compile", "sampler", "table", "data", "vae", "inception", "metrics")
ELSEWHERE = {
    "data": ("benchmark_data", "read"), "vae": ("benchmark_data", "encode"),
    "inception": ("benchmark_evaluation", "network"), "metrics": ("benchmark_evaluation", "metrics"),
}  # fmt: skip
MATMUL = 4096


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class JaxSide:
    """Our step and sampler. Lives in a process of its own."""

    def __init__(self, config_json: str):
        import jax

        from sra_jax import config as config_lib
        from sra_jax.data import registry
        from sra_jax.training import sharding

        self._jax = jax
        self._config = config_lib.from_json(config_json)
        self._dataset = registry.load(self._config.data)
        self._mesh = sharding.make_mesh(config_lib.mesh_shape(self._config, jax.device_count()))
        self._runs: dict[str, list[Any]] = {}
        side = np.ones((MATMUL, MATMUL), np.float32)
        self._operand = jax.device_put(side)
        self._product = jax.jit(lambda a: jax.numpy.matmul(a, a, precision="highest"))

    def _compile(self, name: str) -> tuple[Any, Any, Any, float]:
        """The config with SRA or without it, its programs, its compiled step, seconds of tracing and compiling."""
        from sra_jax.training import loop

        config = self._config.copy_and_resolve_references()
        with config.unlocked():
            config.alignment.enabled = name == "sra"
        program = loop.build(config, self._mesh, self._dataset, config.steps)
        start = time.perf_counter()
        shapes = loop.abstract_batch(self._dataset, config.batch_size, self._mesh)
        step = program.train_step.lower(program.state, shapes).compile()
        return config, program, step, time.perf_counter() - start

    def compile(self, name: str) -> float:
        """Seconds of tracing and compiling the step of "sra" or "baseline"; nothing is run."""
        return self._compile(name)[-1]

    def prepare(self, name: str) -> dict[str, float]:
        """Compile and warm up "sra" or "baseline"; how long the compiler took."""
        from sra_jax.data import pipeline
        from sra_jax.training import sharding

        config, program, step, seconds = self._compile(name)
        state = program.init(self._jax.random.key(0))
        rows = sharding.process_rows(self._mesh, config.batch_size)
        stream = pipeline.batches(self._dataset.source, batch_size=config.batch_size, seed=0, rows=rows)
        self._runs[name] = [step, state, sharding.put_batch(next(stream), self._mesh)]
        self.step(name)
        return {"compile_seconds": seconds, "peak_memory_bytes": peak_memory()}

    def step(self, name: str) -> float:
        """Seconds of one step."""
        step, state, batch = self._runs[name]
        start = time.perf_counter()
        state, metrics = step(state, batch)
        self._jax.block_until_ready((state, metrics))
        self._runs[name][1] = state
        return time.perf_counter() - start

    def prepare_sampler(self, count: int) -> dict[str, float]:
        """Compile and warm up the sampler."""
        from sra_jax.evaluation.generation import make_sampler
        from sra_jax.training.state import Networks

        jax = self._jax
        networks = Networks(self._config)
        params = jax.jit(networks.init)(jax.random.key(0))
        indices = jax.numpy.arange(count)
        arguments = ({"model": params["model"]}, indices, indices % self._config.data.num_classes, np.int32(0))
        start = time.perf_counter()
        compiled = jax.jit(make_sampler(self._config, networks)).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        self._sample = lambda: jax.block_until_ready(compiled(*arguments))
        return {"compile_seconds": seconds}

    def sample(self) -> float:
        """Seconds of one batch of samples."""
        start = time.perf_counter()
        self._sample()
        return time.perf_counter() - start

    def rate(self) -> float:
        """Operations a second of a large product."""
        start = time.perf_counter()
        self._jax.block_until_ready(self._product(self._operand))
        return 2 * MATMUL**3 / (time.perf_counter() - start)


class PytorchSide:
    """The same work in PyTorch. Lives in a process of its own."""

    def __init__(self, config_json: str):
        import torch
        from benchmark_peers import PeerStep, PeerTransformer

        from sra_jax import config as config_lib

        config = config_lib.from_json(config_json)
        data, model, alignment = config.data, config.model, config.alignment
        shape = {
            "input_size": data.image_size, "patch": model.patch, "channels": data.channels, "width": model.width,
            "depth": model.depth, "heads": model.heads, "hidden": int(model.width * model.mlp_ratio),
            "classes": data.num_classes, "outputs": config_lib.transformer_of(config).output_channels,
        }  # fmt: skip
        generator = np.random.default_rng(0)
        zeros = PeerTransformer(**shape).state_dict()
        tensors = {name: generator.normal(0, 0.02, tuple(x.shape)).astype(np.float32) for name, x in zeros.items()}
        threads = len(os.sched_getaffinity(0))
        self._step = PeerStep(
            shape, tensors, process=config.process.name, student_block=alignment.student_block,
            teacher_block=alignment.teacher_block, weight=alignment.weight, threads=threads,
        )  # fmt: skip
        size = (config.batch_size, data.channels, data.image_size, data.image_size)
        t = generator.uniform(0.2, 1, config.batch_size).astype(np.float32)
        s = t - np.float32(0.1)
        if config.process.name == "gaussian":
            t, s = np.floor(1000 * t), np.floor(1000 * s)
        self._example = {
            "x0": generator.normal(size=size).astype(np.float32), "e": generator.normal(size=size).astype(np.float32),
            "t": t, "s": s, "y": generator.integers(data.num_classes, size=config.batch_size),
        }  # fmt: skip
        self._config, self._torch = config, torch

    def prepare(self, name: str) -> dict[str, float]:
        """Warm up a step with a "full", "truncated" or no teacher ("none")."""
        self.step(name)
        return {"peak_memory_bytes": peak_memory()}

    def step(self, name: str) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self._step.step(self._example, name)
        return time.perf_counter() - start

    def prepare_sampler(self, count: int) -> dict[str, float]:
        """Nothing to compile."""
        data = self._config.data
        size = (count, data.channels, data.image_size, data.image_size)
        self._noise = np.random.default_rng(0).normal(size=size).astype(np.float32)
        return {}

    def sample(self) -> float:
        """Seconds of one batch of samples."""
        sampling, classes = self._config.sampling, self._config.data.num_classes
        labels = np.arange(len(self._noise)) % classes
        start = time.perf_counter()
        self._step.sample(
            self._noise, labels, sampling.steps, sampling.guidance_scale, *sampling.guidance_interval, classes
        )
        return time.perf_counter() - start


SIDES = {"jax": JaxSide, "pytorch": PytorchSide}


def _serve(connection: Any, side: str, config_json: str) -> None:
    """In the side's process: answer calls until the connection closes."""
    instance = SIDES[side](config_json)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(instance, method)(*arguments))


class Remote:
    """A side in a process of its own; its methods are called by name.

    Ours starts as main.py does, with large memory pages where they help (sra_jax/memory_pages.py); the peer as PyTorch
    starts by itself, unless --peer_large_pages is given.
    """

    def __init__(self, side: str, config_json: str):
        from absl import flags

        large = side == "jax" or flags.FLAGS.peer_large_pages
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, side, config_json), daemon=True)
        before = os.environ.copy()
        os.environ.update((large and memory_pages.with_large_pages(before)) or {})
        self._process.start()  # with the environment of this moment
        os.environ.clear()
        os.environ.update(before)
        other.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """The method's result; raises EOFError where the side has died (its traceback is on stderr)."""
        self._connection.send((method, arguments))
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def alternate(calls: Mapping[str, Callable[[], float]], repeats: int, note: Callable[[str], None]) -> dict[str, list]:
    """Every call in turn, `repeats` times: all figures of each.

    A turn begins with a call that is not counted: a process that has been idle finds its caches cold and, in a virtual
    machine, memory that has gone back to the host.
    """
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats):
        for name, call in calls.items():
            call()
            figures[name].append(call())
        note(f"round {round_number + 1} of {repeats}: " + ", ".join(f"{n} {f[-1]:.4g}" for n, f in figures.items()))
    return figures


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(values: list[float]) -> list[float]:
    """Smallest and largest."""
    return [min(values), max(values)]


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def train_step(config: Any, peer: str, repeats: int) -> dict[str, Any]:
    """Our step with SRA and without, and the peer's with a full, a truncated and no teacher."""
    from sra_jax import config as config_lib
    from sra_jax.models.flops import train_step_flops

    text = config_lib.to_json(config)
    shape, alignment = config_lib.transformer_of(config), config_lib.alignment_of(config)
    flops = train_step_flops(shape, alignment, config.batch_size).total
    memory: dict[str, float] = {}
    for side, variant in (("jax", "sra"), ("pytorch", "full"))[: 2 if peer == "pytorch" else 1]:
        alone = Remote(side, text)  # memory of one side doing one thing
        memory[side] = alone.call("prepare", variant)["peak_memory_bytes"]
        alone.close()
        say(f"peak memory of {side} alone: {memory[side] / 1e9:.2f} GB")
    ours = Remote("jax", text)
    compiled = ours.call("prepare", "sra")
    ours.call("prepare", "baseline")
    calls = {
        "rate": lambda: ours.call("rate"),
        "sra": lambda: ours.call("step", "sra"),
        "baseline": lambda: ours.call("step", "baseline"),
    }
    theirs = None
    if peer == "pytorch":
        theirs = Remote("pytorch", text)
        for variant in ("full", "truncated", "none"):
            theirs.call("prepare", variant)
            calls[f"peer_{variant}"] = lambda variant=variant: theirs.call("step", variant)
    figures = alternate(calls, repeats, say)
    ours.close()
    result = {
        "config": config.name, "batch_size": config.batch_size, "dtype": config.dtype, "remat": config.model.remat,
        "step_seconds": statistics.median(figures["sra"]), "step_seconds_range": spread(figures["sra"]),
        "baseline_step_seconds": statistics.median(figures["baseline"]),
        "sra_over_baseline": ratio(figures["sra"], figures["baseline"]),
        "flops": flops, "matmul_flops_per_second": statistics.median(figures["rate"]),
        "matmul_share": statistics.median(
            flops / seconds / rate for seconds, rate in zip(figures["sra"], figures["rate"], strict=True)
        ),
        "compile_seconds": compiled["compile_seconds"], "peak_memory_bytes": memory["jax"],
    }  # fmt: skip
    if theirs is not None:
        theirs.close()
        result |= {
            "peer_step_seconds": statistics.median(figures["peer_full"]),
            "peer_step_seconds_range": spread(figures["peer_full"]),
            "peer_truncated_step_seconds": statistics.median(figures["peer_truncated"]),
            "peer_baseline_step_seconds": statistics.median(figures["peer_none"]),
            "speedup_vs_peer": ratio(figures["peer_full"], figures["sra"]),
            "speedup_vs_truncated_peer": ratio(figures["peer_truncated"], figures["sra"]),
            "baseline_speedup_vs_peer": ratio(figures["peer_none"], figures["baseline"]),
            "peer_peak_memory_bytes": memory["pytorch"],
            "memory_over_peer": memory["jax"] / memory["pytorch"],
        }
    return result


def growth(config: Any, repeats: int) -> dict[str, Any]:
    """Step time with twice the batch, four times the tokens and twice the depth, against the arithmetic."""
    from sra_jax import config as config_lib
    from sra_jax.models.flops import train_step_flops

    changes = {
        "as given": {},
        "batch x2": {"batch_size": 2 * config.batch_size},
        "tokens x4": {"data.image_size": 2 * config.data.image_size},
        "depth x2": {"model.depth": 2 * config.model.depth},
    }
    rows = {}
    sides, flops = {}, {}
    for name, change in changes.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(change)
        config_lib.check(changed)
        shape, alignment = config_lib.transformer_of(changed), config_lib.alignment_of(changed)
        flops[name] = train_step_flops(shape, alignment, changed.batch_size).total
        sides[name] = Remote("jax", config_lib.to_json(changed))
        rows[name] = {"compile_seconds": sides[name].call("prepare", "sra")["compile_seconds"]}
    figures = alternate({name: lambda s=side: s.call("step", "sra") for name, side in sides.items()}, repeats, say)
    for name, side in sides.items():
        side.close()
        rows[name] |= {
            "step_seconds": statistics.median(figures[name]),
            "time_ratio": ratio(figures[name], figures["as given"]),
            "arithmetic_ratio": flops[name] / flops["as given"],
        }
    return rows


def compile_times(config: Any, repeats: int) -> dict[str, Any]:
    """Seconds that tracing and compiling the step take, at the recipe's depth and at twice that depth."""
    from sra_jax import config as config_lib

    figures: dict[str, list[float]] = {"as given": [], "depth x2": []}
    for _ in range(repeats):
        for name, factor in (("as given", 1), ("depth x2", 2)):
            changed = config.copy_and_resolve_references()
            changed.model.depth *= factor
            side = Remote("jax", config_lib.to_json(changed))  # a process that has compiled nothing yet
            figures[name].append(side.call("compile", "sra"))
            side.close()
    return {
        "config": config.name, "depth": config.model.depth,
        "compile_seconds": statistics.median(figures["as given"]),
        "compile_seconds_depth_x2": statistics.median(figures["depth x2"]),
        "depth_x2_over_depth": ratio(figures["depth x2"], figures["as given"]),
    }  # fmt: skip


def sampler(config: Any, peer: str, repeats: int, count: int) -> dict[str, Any]:
    """One batch of samples of ours and of the peer's loop."""
    from sra_jax import config as config_lib

    if peer == "pytorch" and config.sampling.sampler != "sde":
        from sra_jax.errors import UserError

        raise UserError("the PyTorch loop is the SDE's: use --config.sampling.sampler=sde")
    text = config_lib.to_json(config)
    sides = {"ours": Remote("jax", text)} | ({"peer": Remote("pytorch", text)} if peer == "pytorch" else {})
    prepared = {name: side.call("prepare_sampler", count) for name, side in sides.items()}
    for side in sides.values():
        side.call("sample")
    figures = alternate({name: lambda s=side: s.call("sample") for name, side in sides.items()}, repeats, say)
    for side in sides.values():
        side.close()
    result = {
        "config": config.name, "samples": count, "steps": config.sampling.steps,
        "guidance_scale": config.sampling.guidance_scale, "guidance_interval": list(config.sampling.guidance_interval),
        "seconds": statistics.median(figures["ours"]), "compile_seconds": prepared["ours"]["compile_seconds"],
    }  # fmt: skip
    if "peer" in sides:
        result |= {"peer_seconds": statistics.median(figures["peer"]),
                   "speedup_vs_peer": ratio(figures["peer"], figures["ours"])}  # fmt: skip
    return result


def table(config: Any, peer: str, repeats: int, count: int) -> dict[str, Any]:
    """Everything about one recipe; "markdown" is the table."""
    half = config.copy_and_resolve_references()
    half.batch_size = max(1, config.batch_size // 2)
    result = {
        "train_step": train_step(config, peer, repeats),
        "sampler": sampler(config, peer, repeats, count),
        "growth": growth(half, repeats),
        "compile": compile_times(config, 1),
    }
    step, sampling, compiling = result["train_step"], result["sampler"], result["compile"]
    rows = [("SRA step", f"{step['step_seconds']:.2f} s")]
    if peer == "pytorch":
        rows += [
            ("PyTorch, whole teacher", f"{step['peer_step_seconds']:.2f} s, {step['speedup_vs_peer']:.2f}x ours"),
            ("PyTorch, teacher cut at block n",
             f"{step['peer_truncated_step_seconds']:.2f} s, {step['speedup_vs_truncated_peer']:.2f}x ours"),
            ("sampling, PyTorch's loop over ours", f"{sampling['speedup_vs_peer']:.2f}"),
            ("peak memory", f"{step['peak_memory_bytes'] / 1e9:.2f} GB "
             f"(PyTorch {step['peer_peak_memory_bytes'] / 1e9:.2f} GB)"),
        ]  # fmt: skip
    rows += [
        ("SRA step over the baseline's", f"{step['sra_over_baseline']:.2f}"),
        ("share of the matmul rate", f"{step['matmul_share']:.0%} of "
         f"{step['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s"),
        ("tracing and compiling", f"{compiling['compile_seconds']:.1f} s, at twice the depth "
         f"{compiling['compile_seconds_depth_x2']:.1f} s"),
    ]  # fmt: skip
    rows += [
        (f"step with {name} (arithmetic {row['arithmetic_ratio']:.2f}x)", f"{row['time_ratio']:.2f}x")
        for name, row in result["growth"].items()
        if name != "as given"
    ]
    return result | {"markdown": ["| what | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]}


def define_flags() -> None:
    """Flags of the commands that live in this file."""
    from absl import flags
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "The recipe; its data is replaced by synthetic latents.")
    flags.DEFINE_enum("peer", "none", ["none", "pytorch"], "What to measure beside ours.")
    flags.DEFINE_bool("peer_large_pages", False, "Start PyTorch with large memory pages, as main.py starts itself.")
    flags.DEFINE_integer("repeats", 5, "Rounds, in each of which every side runs once.", lower_bound=1)
    flags.DEFINE_integer("samples", 4, "sampler: samples at a time.", lower_bound=1)
    flags.DEFINE_string("json", None, "Write the result to this file, too; an old one is replaced.")
    flags.DEFINE_bool("keep_dtype", False, "Keep the recipe's dtype; by default float32, which CPUs compute in.")


def prepared_config(command: str, value: Any, keep_dtype: bool, peer: str) -> Any:
    """The recipe on synthetic data, at the sizes it has, if the command can measure it."""
    import importlib.util

    from sra_jax import config as config_lib
    from sra_jax.errors import UserError

    config = config_lib.from_flag(value)
    with config.unlocked():
        config.data.name, config.data.workers = "synthetic", 0
        if not keep_dtype:
            config.dtype = "float32"
    config_lib.check(config)
    if peer == "pytorch":
        for package in ("torch", "timm"):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--peer=pytorch needs {package}: python -m pip install -r tests/parity/requirements.txt"
                )
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
        if not config.alignment.enabled or config.alignment.distance != "smooth_l1":
            raise UserError("--peer=pytorch aligns with smooth_l1; use alignment.enabled=True and that distance")
    return config


def main(command: str) -> None:
    """Run a command and report."""
    from absl import flags

    given = flags.FLAGS
    if command in ELSEWHERE:
        sys.modules[ELSEWHERE[command][0]].main()
        return
    config = prepared_config(command, given.config, given.keep_dtype, given.peer)
    if command == "train_step":
        result = train_step(config, given.peer, given.repeats)
    elif command == "growth":
        result = growth(config, given.repeats)
    elif command == "compile":
        result = compile_times(config, given.repeats)
    elif command == "sampler":
        result = sampler(config, given.peer, given.repeats, given.samples)
    else:
        result = table(config, given.peer, given.repeats, given.samples)
    text = json.dumps(result, indent=2)
    print("\n".join(result["markdown"]) if command == "table" else text)
    if given.json:
        pathlib.Path(given.json).write_text(text + "\n")


if __name__ == "__main__":
    from sra_jax import cli

    arguments = sys.argv[:]
    chosen = arguments.pop(1) if len(arguments) > 1 and not arguments[1].startswith("-") else ""
    if chosen in ELSEWHERE:
        module, job = ELSEWHERE[chosen]
        __import__(module)
        arguments.append(f"--job={job}")
    else:
        define_flags()
    if chosen not in COMMANDS and "--help" not in arguments:
        print(f"error: name what to measure: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(cli.EXIT_BAD_INPUT)
    cli.run(lambda: main(chosen), arguments)
