"""The sides of the benchmark, ours and PyTorch's, each in a process of its own."""

import functools
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sra_jax import heap
from sra_jax.benchmarks.tasks import JaxTasks, PytorchTasks

MATMUL = 4096
"""Side of the square matrices whose product gives the machine's rate."""


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class JaxSide:
    """Our step and sampler. Lives in a process of its own."""

    def __init__(self, config_json: str):
        import jax

        from sra_jax import config as config_lib
        from sra_jax.data import registry
        from sra_jax.distributed import sharding

        self._jax = jax
        self._config = config_lib.from_json(config_json)
        self._dataset = registry.training_set(self._config)
        self._mesh = sharding.make_mesh(config_lib.mesh_shape(self._config, jax.device_count()))
        self._runs: dict[str, list[Any]] = {}
        self._compiled: dict[str, tuple[Any, Any, Any, float]] = {}
        side = np.ones((MATMUL, MATMUL), np.float32)
        self._operand = jax.device_put(side)
        self._product = jax.jit(lambda a: jax.numpy.matmul(a, a, precision="highest"))

    def _compile(self, name: str) -> tuple[Any, Any, Any, float]:
        """The config with its method or without, its programs, its compiled step, seconds of tracing and compiling."""
        if name not in self._compiled:
            self._compiled[name] = self._compile_now(name)
        return self._compiled[name]

    def _compile_now(self, name: str) -> tuple[Any, Any, Any, float]:
        from sra_jax.training import program as program_lib

        config = self._config.copy_and_resolve_references()
        with config.unlocked():
            config.method.name = config.method.name if name == "method" else "none"
        program = program_lib.build(config, self._mesh, self._dataset, config.steps)
        start = time.perf_counter()
        shapes = program_lib.abstract_batch(self._dataset, config.batch_size, self._mesh)
        step = program.train_step.lower(program.state, shapes).compile()
        return config, program, step, time.perf_counter() - start

    def compile(self, name: str) -> float:
        """Seconds of tracing and compiling the step of "method" (the recipe's own) or "baseline"; nothing is run."""
        return self._compile(name)[-1]

    def flops(self, name: str) -> float:
        """Operations of matrix products in the compiled step of "method" or "baseline"."""
        from sra_jax.planning.compiled import Program

        return Program(self._compile(name)[2].as_text()).cost().flops

    def needed(self, name: str) -> int:
        """Bytes of a device's memory that the compiled step of "method" or "baseline" takes, by the compiler."""
        from sra_jax.training.fitting import memory_parts

        return sum(memory_parts(self._compile(name)[2]).values())

    def forget(self, name: str) -> None:
        """Give back what `prepare` of "method" or "baseline" holds."""
        del self._runs[name], self._compiled[name]

    def prepare(self, name: str) -> dict[str, float]:
        """Compile and warm up "method" or "baseline"; how long the compiler took."""
        from sra_jax.data import pipeline
        from sra_jax.distributed import sharding

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
        from sra_jax.runs.state import Networks, placement_on
        from sra_jax.sampling.generation import make_sampler

        jax = self._jax
        networks = Networks(self._config, placement_on(self._mesh, self._config))
        params = jax.jit(networks.init)(jax.random.key(0))
        indices = jax.numpy.arange(count)
        null = self._dataset.null
        told = indices % max(1, self._config.data.num_classes)
        if null is not None:
            told = jax.tree.map(lambda array: jax.numpy.repeat(jax.numpy.asarray(array)[None], count, axis=0), null)
        arguments = ({"model": params["model"]}, indices, told, np.int32(0))
        start = time.perf_counter()
        compiled = jax.jit(make_sampler(self._config, networks, null=null)).lower(*arguments).compile()
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
    """The same work in PyTorch. Lives in a process of its own.

    Args:
      config_json: the recipe.
      device, bfloat16, compiled: as `peers.PeerStep` takes them.
    """

    def __init__(self, config_json: str, device: str = "cpu", bfloat16: bool = False, compiled: bool = False):
        import torch

        from sra_jax import config as config_lib
        from sra_jax.benchmarks.peers import PeerStep, PeerTransformer

        config = config_lib.from_json(config_json)
        data, model, alignment = config.data, config.model, config.alignment
        shape = {
            "input_size": data.image_size, "patch": model.patch, "channels": data.channels, "width": model.width,
            "depth": model.depth, "heads": model.heads, "hidden": int(model.width * model.mlp_ratio),
            "classes": data.num_classes, "outputs": config_lib.transformer_of(config).output_channels,
        }  # fmt: skip
        generator = np.random.default_rng(0)
        zeros = PeerTransformer(**shape).state_dict()
        draws = generator.normal(0, 0.02, 1 << 20).astype(np.float32)  # again and again
        tensors = {name: np.resize(draws, tuple(x.shape)) for name, x in zeros.items()}
        threads = len(os.sched_getaffinity(0))
        self._step = PeerStep(
            shape, tensors, process=config.process.name, student_block=alignment.student_block,
            teacher_block=alignment.teacher_block, weight=alignment.weight, threads=threads, device=device,
            bfloat16=bfloat16, compiled=compiled,
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


SIDES: dict[str, Callable[[str], Any]] = {
    "jax": JaxSide, "pytorch": PytorchSide, "pytorch compiled": functools.partial(PytorchSide, compiled=True),
    "jax tasks": JaxTasks, "pytorch tasks": PytorchTasks,
}  # fmt: skip


def compiler_there() -> bool:
    """Whether there is the C++ compiler that torch.compile needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


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

    Args:
      side: a key of SIDES.
      config_json: the recipe, or the sizes of tasks.
      tuned_heap: start with a heap that keeps its memory where that helps, as commands do (sra_jax/heap.py).
      held: bytes that a step holds, for which main.py would tune it.
    """

    def __init__(self, side: str, config_json: str, tuned_heap: bool = True, held: float = 0):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, side, config_json), daemon=True)
        before = os.environ.copy()
        os.environ.update((tuned_heap and heap.tuned(before, held)) or {})
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
