"""The parts of the acceptance run (acceptance.py); each is called in a process of its own."""

import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.benchmarks.acceptance import Result, Settings, row
from sra_jax.benchmarks.sides import JaxSide
from sra_jax.benchmarks.tasks import random_autoencoder
from sra_jax.data import registry
from sra_jax.distributed import sharding
from sra_jax.distributed.devices import memory_bytes
from sra_jax.errors import UserError
from sra_jax.evaluation.extractors import build_extractor
from sra_jax.models import attention
from sra_jax.training import fitting
from sra_jax.training import program as program_lib

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin",
    "jax-rocm7-plugin", "torch",
)  # fmt: skip
STEPS = 10

BOUNDS = {
    "float32": {"loss": 1e-5, "gradient": 1e-3, "ten steps": 1e-4},
    "bfloat16": {"loss": 1e-3, "gradient": 3e-2, "ten steps": 3e-3},
}
"""Relative to the CPU's float32: a few roundings of the type, summed over the network and over the steps."""

ATTENTION_BOUND = 2**-6
"""Of the largest entry of the output and of the gradient: a few roundings of bfloat16."""

BATCHES = (256, 128, 64, 32, 16, 8, 4, 2, 1)


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call whose result is waited for, after one that is not counted."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_rate(dtype: str, side: int, repeats: int) -> float:
    """Operations a second of one device in products of square matrices."""
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)  # equal numbers cost a chip less power, hence time
    precision = "highest" if dtype == "float32" else "default"
    return 2 * side**3 / timed(functools.partial(jax.jit(lambda a: jnp.matmul(a, a, precision=precision)), a), repeats)


def measure_machine(settings: Settings) -> Result:
    """What is there."""
    versions = {}
    for name in PACKAGES:
        if importlib.util.find_spec(name.replace("-", "_")) or name == "orbax-checkpoint":
            versions[name] = importlib.metadata.version(name)
    device = jax.devices()[0]
    memory = memory_bytes()
    side = 512 if settings.quick else 8192
    rates = {dtype: matmul_rate(dtype, side, 3) for dtype in ("bfloat16", "float32")}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    there = f"{jax.device_count()} x {device.device_kind}" + (f", {memory / 1e9:.1f} GB each" if memory else "")
    return {
        "python": platform.python_version(), "system": platform.platform(), "versions": versions,
        "platform": sharding.platform(device), "device_kind": device.device_kind, "devices": jax.device_count(),
        "memory_bytes": memory, "cpu_cores": os.cpu_count(), "matmul_flops_per_second": rates,
        "rows": [
            row("devices", there),
            row("versions", f"Python {platform.python_version()}, {shown}"),
            *(row(f"product of matrices, {dtype}", f"{rate / 1e12:.2f} TFLOP/s") for dtype, rate in rates.items()),
        ],
    }  # fmt: skip


def small_recipe(settings: Settings, dtype: str) -> ConfigDict:
    """The first recipe's method in a small network with heads of 72 channels and 256 tokens (quick: 64)."""
    config = config_lib.from_json(next(iter(settings.recipes.values())))
    config.update_from_flattened_dict({
        "dtype": dtype, "accumulation": 1, "model.depth": 3, "model.width": 144, "model.heads": 2,
        "model.remat": "dots", "batch_size": 4 if settings.quick else 16,
        "data.image_size": 16 if settings.quick else 32, "data.num_classes": 10,
        "data.name": "synthetic", "data.path": "", "data.workers": 0,
        "alignment.student_block": 1, "alignment.teacher_block": 3, "optimizer.clip_norm": 0.0,
    })  # fmt: skip
    return config


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """The results of calls that mostly compile, in threads: a compiler leaves cores idle."""
    with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
        return [each.result() for each in [pool.submit(task) for task in tasks]]


class OneDevice:
    """A recipe's steps on one device: the same parameters, examples and draws on every device.

    Args:
      config: the recipe; it does not clip gradients.
      device: where it runs.
    """

    def __init__(self, config: ConfigDict, device: jax.Device):
        self._mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, [device])
        self._kept = config.optimizer.b1
        dataset = registry.training_set(config)
        self._program = program_lib.build(config, self._mesh, dataset, STEPS)
        examples = [dataset.source[i] for i in range(config.batch_size)]
        self._batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        shapes = program_lib.abstract_batch(dataset, config.batch_size, self._mesh)
        self._step = self._program.train_step.lower(self._program.state, shapes).compile()

    def start(self) -> Any:
        """A state, as NumPy arrays, in whose parameters nothing is zero, so that each has a gradient."""
        generator = np.random.default_rng(0)
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._program.state)
        params = jax.tree.map(lambda x: generator.normal(0, 0.05, x.shape).astype(x.dtype), state.params)
        return state.replace(params=params, ema=params)

    def run(self, state: Any) -> tuple[list[float], Any]:
        """The losses of `STEPS` steps from a state, and the gradient of the first."""
        whole = sharding.replicated(self._mesh)
        state = jax.tree.map(lambda x: jax.device_put(np.array(x), whole), state)
        batch, losses, gradient = sharding.put_batch(self._batch, self._mesh), [], None
        for _ in range(STEPS):
            state, metrics = self._step(state, batch)
            losses.append(float(metrics["loss"]))
            if gradient is None:  # what Adam's running mean has of it
                mean = optax.tree.get(state.opt_state, "mu")
                gradient = jax.tree.map(lambda m: np.asarray(m) / (1 - self._kept), mean)
        return losses, gradient


def difference(found: Any, expected: Any) -> float:
    """Norm of the difference of two trees over the norm of the second."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    apart, whole = (sum(float(np.square(x, dtype=np.float64).sum()) for x in xs)
                    for xs in ([a - b for a, b in pairs], [b for _, b in pairs]))  # fmt: skip
    return (apart / whole) ** 0.5


def measure_equality(settings: Settings) -> Result:
    """The device against the CPU; a CPU against itself."""
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as error:
        raise UserError(
            f"JAX does not see the CPU beside the accelerator ({str(error).splitlines()[0]}): unset JAX_PLATFORMS"
        ) from error
    wanted = [("float32", cpu), *((dtype, jax.devices()[0]) for dtype in BOUNDS)]
    distinct = dict.fromkeys(wanted)
    made = at_once(*(functools.partial(OneDevice, small_recipe(settings, dtype), device) for dtype, device in distinct))
    sides = dict(zip(distinct, made, strict=True))
    exact, *others = (sides[key] for key in wanted)
    start = exact.start()
    losses, gradient = exact.run(start)
    rows, figures = [], {}
    for (dtype, bounds), ours in zip(BOUNDS.items(), others, strict=True):
        found, found_gradient = ours.run(start)
        apart = [abs(a - b) / abs(b) for a, b in zip(found, losses, strict=True)]
        figures[dtype] = {"loss": apart[0], "gradient": difference(found_gradient, gradient), "ten steps": max(apart)}
        rows += [
            row(f"{name}, {dtype}", f"differs by {figures[dtype][name]:.1e}, bound {bound:.0e}",
                bool(figures[dtype][name] <= bound))
            for name, bound in bounds.items()
        ]  # fmt: skip
    return {"differences": figures, "bounds": BOUNDS, "rows": rows}


def measure_attention(settings: Settings) -> Result:
    """Every implementation at heads of 64 and 72 channels, 256 and 1,024 tokens."""
    kind = sharding.platform(jax.devices()[0])
    sizes = [(1, 2, 128)] if settings.quick else [(32, 16, 256), (8, 16, 1024)]
    cases = {}
    for (batch, heads, tokens), head in itertools.product(sizes, (64, 72)):
        case = attention.Case(kind, jnp.bfloat16, head, tokens)
        inputs = _inputs(batch, tokens, heads, head)
        refusals = {name: one.refusal(case) for name, one in attention.IMPLEMENTATIONS.items()}
        cases[tokens, head] = inputs, refusals
    tasks: dict[Any, Callable[[], Any]] = {
        (tokens, head, name): _with_gradient(attention.IMPLEMENTATIONS[name].attend, jax.lax.Precision.DEFAULT, inputs)
        for (tokens, head), (inputs, refusals) in cases.items() for name, reason in refusals.items() if not reason
    }  # fmt: skip
    for (tokens, head), (inputs, _) in cases.items():
        wide = [x.astype(jnp.float32) for x in inputs]
        tasks[tokens, head, None] = _with_gradient(attention.operations.attend, jax.lax.Precision.HIGHEST, wide)
    compiled = dict(zip(tasks, at_once(*tasks.values()), strict=True))
    rows, figures = [], []
    for (tokens, head), (inputs, refusals) in cases.items():
        expected = compiled[tokens, head, None](*(x.astype(jnp.float32) for x in inputs))
        for name, reason in refusals.items():
            what = f"{name}, {tokens} tokens, heads of {head}"
            if reason:
                rows.append(row(what, f"left out: it {reason}"))
                continue
            run = functools.partial(compiled[tokens, head, name], *inputs)
            apart = max(
                float(jnp.abs(got.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max())
                for got, wanted in zip(run(), expected, strict=True)
            )
            seconds = timed(run, 3 if settings.quick else 20)
            figures.append({
                "implementation": name, "tokens": tokens, "head": head, "batch": inputs[0].shape[0],
                "heads": inputs[0].shape[3], "seconds": seconds, "difference": apart,
            })  # fmt: skip
            measured = f"{seconds * 1e3:.2f} ms forward and backward, differs by {apart:.1e}"
            rows.append(row(what, measured, bool(apart <= ATTENTION_BOUND)))
    return {"implementations": figures, "rows": rows}


def _inputs(batch: int, tokens: int, heads: int, head: int) -> tuple[jax.Array, jax.Array]:
    """Queries, keys and values, and the gradient of the output; bfloat16."""
    generator = np.random.default_rng(0)
    shapes = ((batch, tokens, 3, heads, head), (batch, tokens, heads, head))
    qkv, cotangent = (jnp.asarray(generator.normal(size=shape), jnp.bfloat16) for shape in shapes)
    return qkv, cotangent


def _with_gradient(attend: attention.Attend, precision: Any, inputs: Sequence[jax.Array]) -> Callable[[], Any]:
    """Compiles what gives the output and the gradient of queries, keys and values."""

    def both(qkv: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        output, vjp = jax.vjp(lambda qkv: attend(qkv, precision), qkv)
        return output, *vjp(cotangent)

    return lambda: jax.jit(both).lower(*inputs).compile()


def largest_batch(config: ConfigDict) -> tuple[ConfigDict, JaxSide]:
    """The recipe with the largest batch of `BATCHES`, up to its own, that this machine's devices hold, ready to run.

    Less is recomputed where that leaves the batch as it is. What by an estimate fills the memory is not compiled.

    Raises:
      UserError: none does.
    """
    limit = memory_bytes()
    state, reason = fitting.whole_state(config), ""
    policies = [config.model.remat]
    if config.model.remat == config_lib.AUTO:
        policies = ["gelu", "dots"] if sharding.is_gpu() else ["dots"]
    for batch, remat in itertools.product(BATCHES, policies):
        if batch > config.batch_size or batch % jax.device_count():
            continue
        changed = fitting.with_settings(config, {"batch_size": batch, "model.remat": remat})
        if limit and (least := fitting.least_bytes(changed, jax.device_count(), state)) > fitting.FULL * limit:
            reason = f"batch {batch} needs {least / 1e9:.1f} GB or more of {limit / 1e9:.1f} GB"
            continue
        side = JaxSide(config_lib.to_json(changed))
        if limit and (needed := side.needed("method")) > limit:
            reason = f"batch {batch} needs {needed / 1e9:.1f} GB of {limit / 1e9:.1f} GB"
            continue
        try:
            side.prepare("method")
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = f"batch {batch}: {str(error).splitlines()[0][:200]}"
            continue
        return changed, side
    raise UserError(f"no batch fits this machine: {reason}")


def on_this_machine(text: str) -> ConfigDict:
    """A recipe on random latents and all devices here; its state is split over them where there are several."""
    config = config_lib.from_json(text)
    count = jax.device_count()
    split = count if config.model.width % count == 0 else 1
    config.update_from_flattened_dict({
        "data.name": "synthetic", "data.path": "", "data.workers": 0, "accumulation": 1, "mesh.data": count // split,
        "mesh.fsdp": split, "mesh.model": 1,
    })  # fmt: skip
    return config


def measure_train_step(settings: Settings) -> Result:
    """Each recipe with its method and without."""
    repeats = 2 if settings.quick else 10
    dtype = config_lib.from_json(next(iter(settings.recipes.values()))).dtype
    rate = matmul_rate(dtype, 512 if settings.quick else 8192, 3) * jax.device_count()
    rows, figures, batches = [], {}, {}
    for name, text in settings.recipes.items():
        config, side = largest_batch(on_this_machine(text))
        batches[name] = config.batch_size
        flops = config_lib.step_flops(config).total
        with_method = statistics.median(side.step("method") for _ in range(repeats))
        side.forget("method")
        compiled = side.prepare("baseline")["compile_seconds"]
        without = statistics.median(side.step("baseline") for _ in range(repeats))
        figures[name] = {
            "config": config.name, "method": config_lib.methods_of(config).name, "dtype": config.dtype,
            "batch_size": config.batch_size, "mesh": config_lib.mesh_shape(config, jax.device_count()),
            "attention": config.model.attention, "remat": config_lib.transformer_of(config).remat,
            "step_seconds": with_method, "baseline_step_seconds": without, "flops": flops,
            "flops_per_second": flops / with_method, "share_of_matmul_rate": flops / with_method / rate,
            "compile_seconds": compiled,
        }  # fmt: skip
        rows.append(row(
            f"{name}, batch {config.batch_size}, {config.dtype}, remat {figures[name]['remat']}",
            f"{with_method * 1e3:.1f} ms with {figures[name]['method']}, {without * 1e3:.1f} ms without; "
            f"{config.batch_size / with_method:.1f} images/s, {flops / with_method / 1e12:.2f} TFLOP/s, "
            f"{flops / with_method / rate:.0%} of the product's rate",
        ))  # fmt: skip
    return {"recipes": figures, "batches": batches, "rows": rows}


def measure_peer(settings: Settings) -> Result:
    """PyTorch's step with fused attention; on a GPU in bfloat16 and with torch.compile."""
    missing = [name for name in ("torch", "timm") if importlib.util.find_spec(name) is None]
    if missing:
        return {"rows": [row("PyTorch", f"left out: {' and '.join(missing)} not installed")]}
    import torch

    from sra_jax.benchmarks.sides import PytorchSide

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not settings.quick:
        return {"rows": [row("PyTorch", "left out: it sees no GPU, and tools/benchmark.py measures CPUs")]}
    device = "cuda" if on_gpu else "cpu"
    rows, figures = [], {}
    for name, text in settings.recipes.items():
        config = config_lib.from_json(text)
        config.batch_size = settings.batches.get(name, config.batch_size)
        side = None
        while side is None:
            try:
                side = PytorchSide(config_lib.to_json(config), device, bfloat16=on_gpu, compiled=on_gpu)
                side.prepare("truncated")
            except torch.OutOfMemoryError:
                side = None
                torch.cuda.empty_cache()
                if config.batch_size == 1:
                    raise
                config.batch_size //= 2
        seconds = {teacher: statistics.median(side.step(teacher) for _ in range(2 if settings.quick else 10))
                   for teacher in ("truncated", "none")}  # fmt: skip
        figures[name] = {"batch_size": config.batch_size, "step_seconds": seconds, "device": device}
        how = "bfloat16, torch.compile" if on_gpu else "float32"
        rows.append(row(
            f"PyTorch, {name}, batch {config.batch_size}, {how}",
            f"{seconds['truncated'] * 1e3:.1f} ms with sra, {seconds['none'] * 1e3:.1f} ms without; "
            f"{config.batch_size / seconds['truncated']:.1f} images/s",
        ))  # fmt: skip
        del side
    return {"recipes": figures, "rows": rows}


def measure_sampler(settings: Settings) -> Result:
    """The first recipe's sampler, guided."""
    name, text = next(iter(settings.recipes.items()))
    config = on_this_machine(text)
    steps = 2 if settings.quick else 25
    config.sampling.update(steps=type(config.sampling.steps)(steps), guidance_scale=1.8)
    count = (1 if settings.quick else 32) * jax.device_count()
    side = JaxSide(config_lib.to_json(config))
    side.prepare_sampler(count)
    side.sample()
    seconds = statistics.median(side.sample() for _ in range(2 if settings.quick else 5))
    return {
        "samples": count, "steps": steps, "seconds": seconds,
        "rows": [row(
            f"{name}, {steps} guided steps of {config.sampling.sampler}, {count} at a time",
            f"{count / seconds:.2f} latents/s, {seconds / steps * 1e3:.1f} ms a step",
        )],
    }  # fmt: skip


def measure_networks(settings: Settings) -> Result:
    """Images a second of the VAE's encoder and of the FID network, with random weights, which change no speed."""
    size, repeats = (64, 1) if settings.quick else (256, 5)
    generator = np.random.default_rng(0)
    vae = random_autoencoder(settings.quick, dtype=jnp.float32 if settings.quick else jnp.bfloat16)
    batch = 1 if settings.quick else 16
    images = jax.device_put(generator.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32))
    encoding = timed(lambda: vae.encode(images), repeats)

    batch_inception = 1 if settings.quick else 64
    pictures = generator.integers(0, 256, (batch_inception, size, size, 3), dtype=np.uint8)
    extractor = build_extractor("inception_random")
    parameters, apply = jax.device_put(extractor.parameters), jax.jit(extractor.apply)
    features = timed(lambda: apply(parameters, pictures), repeats)
    return {
        "encode_images_per_second": batch / encoding, "inception_images_per_second": batch_inception / features,
        "rows": [
            row(f"VAE encodes {size} pixels, batch {batch}" + (", a small one" if settings.quick else ", bfloat16"),
                f"{batch / encoding:.1f} images/s"),
            row(f"Inception, {size} pixels, batch {batch_inception}", f"{batch_inception / features:.1f} images/s"),
        ],
    }  # fmt: skip


RUN_STEPS, SAVE_EVERY = 12, 4


def measure_resume(settings: Settings) -> Result:
    """Two runs of main.py, one of them killed after a checkpoint and started again."""
    with tempfile.TemporaryDirectory(prefix="accept_runs_") as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        _train(settings, whole)
        saved = _train(settings, killed, until=lambda: _checkpoint(killed, SAVE_EVERY))
        _train(settings, killed)
        expected, found = (list(_arrays(workdir)) for workdir in (whole, killed))
        entries = sum(array.size for _, array in expected)
        differing = [
            np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
            for (name, a), (other, b) in zip(found, expected, strict=True) if name == other and not np.array_equal(a, b)
        ]  # fmt: skip
    equal = not differing
    worst = float(max(differing, default=0.0))
    measured = f"{entries:,} numbers of the state equal bit for bit" if equal else f"differ by up to {worst:.1e}"
    return {
        "bit_for_bit": equal, "largest_difference": worst, "killed_at": saved,
        "rows": [row(f"killed after step {SAVE_EVERY} of {RUN_STEPS}, started again", measured, bool(worst <= 1e-4))],
    }  # fmt: skip


def _checkpoint(workdir: Path, step: int) -> bool:
    return (workdir / "checkpoints" / str(step)).is_dir()


def _train(settings: Settings, workdir: Path, until: Callable[[], bool] | None = None) -> int:
    """main.py on the digits, to its end or until it is killed; the exit code.

    Raises:
      RuntimeError: it ended otherwise; with its last line.
    """
    arguments = (
        "--config=configs/digits.py", f"--workdir={workdir}", f"--config.steps={RUN_STEPS}", "--config.log_every=1",
        f"--config.checkpoint_every={SAVE_EVERY}", "--config.sample_every=0", "--config.model.width=32",
        "--config.model.depth=3", "--config.model.heads=2", "--config.alignment.student_block=1",
        "--config.alignment.teacher_block=2", "--config.evaluation.every=0",
        "--config.batch_size=64",  # for any usual number of devices: main.py is to have them, and not this process
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "main.py", *arguments], cwd=settings.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    while until and process.poll() is None and not until():
        time.sleep(0.001)
    if until and process.poll() is None:
        process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    if process.returncode not in (0, *([-signal.SIGKILL] if until else [])):
        last = (output.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"main.py ended with code {process.returncode}: {last}")
    return process.returncode


def _arrays(workdir: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The state at the last checkpoint, array by array."""
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(RUN_STEPS)
    with ocp.StandardCheckpointer() as reader:
        for name in ("params", "ema", "opt_state"):
            tree: Mapping[str, Any] = reader.restore(folder / name)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                yield f"{name}/{jax.tree_util.keystr(path)}", np.asarray(leaf, np.float64)
