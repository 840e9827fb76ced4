"""Measures the evaluation: speed of the Inception network, time and memory of the metrics.

  # Images per second of the network; where torch-fidelity is installed, also its own, taking turns in one run
  python tools/benchmark.py inception

  # Time and peak memory of every metric: 50,000 synthetic samples against 10,000, 2048 pool and 2023 spatial features
  python tools/benchmark.py metrics

One line of JSON goes to stdout. Weights are random: neither speed nor memory depends on them.
"""

import importlib.util
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from sra_jax import cli, values
from sra_jax.benchmarks.tasks import untrained_inception
from sra_jax.evaluation import evaluate
from sra_jax.evaluation.extractors import build_extractor
from sra_jax.evaluation.features import Extractor, extract_features
from sra_jax.evaluation.images import ImageSet
from sra_jax.evaluation.reference import make_reference
from sra_jax.models.inception import NUM_LOGITS, POOL_FEATURES, SPATIAL_FEATURES

FLAGS = flags.FLAGS



def define_flags() -> None:
    """Flags of the commands inception and metrics."""
    cli.whole_flag("num_samples", 50_000, "metrics: number of samples", 20, 10_000_000)
    cli.whole_flag("num_reference", 10_000, "metrics: number of reference images", 4, 10_000_000)
    cli.whole_flag("batch_size", 16, "network: images at a time", 1, values.BATCH_LIMIT)
    cli.whole_flag("image_size", 256, "network: height and width of the images", 1, 16_384)
    cli.whole_flag("rounds", 5, "network: how often each takes its turn", 1, 1000)



def peer_network() -> Callable[[np.ndarray], None] | None:
    """torch-fidelity's network with its initial weights, as a function of uint8 images (N,H,W,3); None without it."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return None
    import torch

    network = untrained_inception()

    def run(images: np.ndarray) -> None:
        with torch.no_grad():
            network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))

    return run


def measure_network() -> dict[str, float]:
    """Median images per second over rounds in which the networks take turns."""
    shape = (FLAGS.batch_size, FLAGS.image_size, FLAGS.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    extractor = build_extractor("inception_random")
    parameters = jax.device_put(extractor.parameters)
    apply = jax.jit(extractor.apply)
    networks: dict[str, Callable[[np.ndarray], Any]] = {
        "sra_jax": lambda images: jax.block_until_ready(apply(parameters, images))
    }
    if (peer := peer_network()) is not None:
        networks["torch_fidelity"] = peer
    speeds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(FLAGS.rounds + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            network(images)
            if turn:  # the first one compiles
                speeds[name].append(len(images) / (time.perf_counter() - start))
    return {f"{name}_images_per_second": statistics.median(speed) for name, speed in speeds.items()}


def synthetic_extractor() -> Extractor:
    """Features of the FID Inception's sizes at next to no cost: correlated, positive, with a decaying spectrum."""
    generator = np.random.default_rng(0)
    inputs, hidden = 8 * 8 * 3, 512
    parameters = {"hidden": generator.standard_normal((inputs, hidden), dtype=np.float32) / inputs**0.5}
    sizes = {"pool": POOL_FEATURES, "spatial": SPATIAL_FEATURES, "logits": NUM_LOGITS}
    for name, size in sizes.items():
        parameters[name] = generator.standard_normal((hidden, size), dtype=np.float32) / hidden**0.5

    def apply(parameters: Mapping[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
        x = images.reshape(len(images), -1).astype(jnp.float32) / 64 - 2
        x = jnp.tanh(x @ parameters["hidden"])
        return {name: jax.nn.relu(x @ parameters[name]) for name in sizes}

    return Extractor("synthetic", "synthetic/0", frozenset(sizes), apply, parameters)


def synthetic_images(count: int, seed: int) -> ImageSet:
    """Noise images (count,8,8,3), made as they are read."""

    def read(batch_size: int) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(seed)
        for start in range(0, count, batch_size):
            yield generator.integers(0, 256, (min(batch_size, count - start), 8, 8, 3), dtype=np.uint8)

    return ImageSet(f"noise {seed}", (count, 8, 8, 3), None, read)


def peak_gibibytes() -> float:
    """The most memory this process has held so far; ru_maxrss counts kB on Linux, bytes on macOS."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure_metrics() -> dict[str, object]:
    """Seconds of each step and the process's peak memory."""
    extractor = synthetic_extractor()
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.1f} s, peak so far {peak_gibibytes():.2f} GiB", file=sys.stderr)
        return result

    def one(*metrics: str) -> Callable[[], dict[str, float]]:
        return lambda: evaluate.metrics_of_features(pool, reference, metrics)

    images = synthetic_images(FLAGS.num_reference, 0)
    reference = timed("reference", lambda: make_reference(images, extractor, progress=False))
    metrics = ("fid", "sfid", "inception_score")
    batches = synthetic_images(FLAGS.num_samples, 1).batches(256)
    result = timed(
        "fid_sfid_inception_score",
        lambda: evaluate.measure(batches, reference, extractor, metrics=metrics, progress=False),
    )
    again = synthetic_images(FLAGS.num_samples, 1).batches(256)
    pool = np.concatenate([batch["pool"] for batch, _ in extract_features(again, extractor, progress=False)])
    result |= timed("precision_recall", one("precision", "recall"))
    result |= timed("kid", one("kid"))
    result |= timed("fid_infinity", one("fid_infinity"))
    numbers = {name: result[name] for name in evaluate.METRICS if name in result}
    return {"peak_gibibytes": peak_gibibytes(), "seconds": seconds, "metrics": numbers}


def network() -> None:
    """The command inception."""
    _report("network", measure_network())


def metrics() -> None:
    """The command metrics."""
    _report("metrics", measure_metrics())


def _report(job: str, result: Mapping[str, object]) -> None:
    print(json.dumps({"job": job, "device": jax.devices()[0].device_kind, **result}))
