"""The mean latent of a run's training set: measured once at its beginning, kept in its folder, read by its samplers."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax import files
from sra_jax.data import pipeline
from sra_jax.data.dataset import Dataset
from sra_jax.distributed import processes
from sra_jax.errors import RunError, UserError
from sra_jax.methods.correction import LatentMeans

FILE = "mean_latent.npz"

EXAMPLES = 10_000
"""At most so many are averaged: the mean's error is then a hundredth of the latents' deviation."""

SEED = 0
"""Of the choice of examples, and of the draws from their posteriors; no run's own."""

BATCH = 250


def measure(dataset: Dataset, classes: bool) -> LatentMeans:
    """The means over a fixed random subset, or over all where there are few; a function of the data set alone.

    Args:
      dataset: the training set.
      classes: whether those of the classes are wanted as well.
    """
    count = min(EXAMPLES, len(dataset.source))
    size = min(BATCH, count)
    encode = jax.jit(dataset.encode)
    sums = np.zeros((dataset.num_classes if classes else 1, *dataset.latent_shape))
    counts = np.zeros(len(sums), np.int64)
    stream = pipeline.batches(dataset.source, batch_size=size, seed=SEED, rows=range(size))
    try:
        for first in range(0, count, size):
            batch = next(stream)
            keep = min(size, count - first)
            latents = np.asarray(encode(batch, jax.random.fold_in(jax.random.key(SEED), first)), np.float64)[:keep]
            rows = np.asarray(batch["label"])[:keep] if classes else np.zeros(keep, int)
            np.add.at(sums, rows, latents)
            np.add.at(counts, rows, 1)
    finally:
        stream.close()
    mean = (sums.sum(axis=0) / count).astype(np.float32)
    if not classes:
        return LatentMeans(mean)
    class_means = sums / np.maximum(counts, 1)[:, None, None, None]
    return LatentMeans(mean, class_means.astype(np.float32), (counts / count).astype(np.float32))


def keep(config: ConfigDict, dataset: Dataset, workdir: Path) -> None:
    """Measure and write what the run's samplers need, unless it is there; on every process.

    Raises:
      RunError: on every process, where it failed on the first.
    """
    method = config_lib.methods_of(config).correcting
    if method is None:
        return
    failure: Exception | None = None
    if jax.process_index() == 0 and not files.exists(workdir / FILE):
        try:
            means = measure(dataset, classes=method.latent_means == "classes")
            files.write_npz(workdir / FILE, {name: x for name, x in vars(means).items() if x is not None})
        except Exception as error:  # the others wait for this process
            failure = error
    if not processes.all_agree(failure is None):
        raise failure or RunError(f"{workdir / FILE} could not be made: see the message of process 0")


def read(config: ConfigDict, workdir: Path) -> LatentMeans | None:
    """What the sampler of a run needs; None where it needs nothing, or `sampling.correction` is off.

    Raises:
      UserError: the run has none, or not those that its method asks for.
    """
    method = config_lib.methods_of(config).correcting
    if method is None or not config.sampling.correction:
        return None
    path, shape = workdir / FILE, (config.data.image_size, config.data.image_size, config.data.channels)
    advice = "training on with main.py makes it; --nocorrection samples without it"
    try:
        if not files.exists(path):
            raise FileNotFoundError
        with np.load(files.local(path)) as arrays:
            means = LatentMeans(**arrays)
    except FileNotFoundError:
        raise UserError(f"{method.name} samples with the mean latent, and there is no {path}: {advice}") from None
    except Exception as error:  # NumPy and zipfile raise many kinds for damaged files
        raise UserError(f"{path} cannot be read ({error}); move it away: {advice}") from error
    wanted: dict[str, tuple[int, ...]] = {"mean": shape}
    if method.latent_means == "classes":
        wanted |= {"class_means": (config.data.num_classes, *shape), "class_shares": (config.data.num_classes,)}
    for name, expected in wanted.items():
        if np.shape(getattr(means, name)) != expected:
            raise UserError(f"{path} holds no {name} of shape {expected}; move it away: {advice}")
    return means
