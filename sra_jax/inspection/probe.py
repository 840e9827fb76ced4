"""Linear probing: how well a linear classifier tells classes apart by frozen features.

The protocol is that of SRA (Jiang et al., arXiv 2505.02831, section C): features averaged over tokens, normalised per
channel without affine part, a linear layer, cross-entropy, 80 epochs of batches of 4,096, a learning rate that falls
from 1e-3 to 0 along a cosine. The optimizer is Adam. The norm's statistics are those of the whole training set, to
which the running averages of batch normalisation converge where features are frozen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sra_jax.inspection.tokens import FeatureSet

NORM_EPSILON = 1e-6
STEPS_PER_EPOCH = 10
READ_ROWS = 4096


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How probes are trained.

    Attributes:
      epochs: passes over the training set.
      batch_size: examples a step; smaller where an epoch would have fewer than 10 steps.
      learning_rate: Adam's at the first step.
      seed: of the order of examples.
    """

    epochs: int = 80
    batch_size: int = 4096
    learning_rate: float = 1e-3
    seed: int = 0


def probe(train: FeatureSet, test: FeatureSet, num_classes: int, schedule: Schedule) -> np.ndarray:
    """Train one probe for each noise level and block, all at once, and return their accuracies on the test set.

    Args:
      train, test: rows of (levels, blocks, D) with labels in [0, num_classes).
      num_classes: classes.
      schedule: how.

    Returns:
      Top-1 accuracy (levels, blocks), float64 in [0, 1].
    """
    average, variance = _moments(train)
    mean, scale = jnp.asarray(average), jnp.asarray(1 / np.sqrt(variance + NORM_EPSILON))
    batch_size = min(schedule.batch_size, max(1, len(train) // STEPS_PER_EPOCH))
    steps = len(train) // batch_size
    optimizer = optax.adam(optax.cosine_decay_schedule(schedule.learning_rate, schedule.epochs * steps))
    levels, blocks, width = train.shape

    def logits(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.dot(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST) + layer["bias"]

    def over_probes(function: Callable[..., Any], in_axes: Any) -> Callable[..., Any]:
        return jax.vmap(jax.vmap(function, in_axes=in_axes), in_axes=in_axes)

    def init(_: jax.Array) -> tuple[Any, Any]:
        layer = {"kernel": jnp.zeros((width, num_classes)), "bias": jnp.zeros(num_classes)}
        return layer, optimizer.init(layer)

    def update(layer: Any, opt_state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        def loss(layer: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits(layer, x), y).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(layer), opt_state, layer)
        return optax.apply_updates(layer, updates), opt_state

    @jax.jit
    def step(state: tuple[Any, Any], x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        x = jnp.moveaxis((x - mean) * scale, 0, 2)  # (L,K,B,D)
        return over_probes(update, (0, 0, 0, None))(*state, x, y)

    @jax.jit
    def correct(layer: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        x = jnp.moveaxis((x - mean) * scale, 0, 2)
        return (over_probes(logits, (0, 0))(layer, x).argmax(axis=-1) == y).sum(axis=-1)

    state = over_probes(init, 0)(jnp.zeros((levels, blocks)))
    order = np.random.default_rng(schedule.seed)
    for _ in range(schedule.epochs):
        permutation = order.permutation(len(train))
        for i in range(steps):
            chosen = permutation[i * batch_size : (i + 1) * batch_size]
            state = step(state, train.rows(chosen), train.labels[chosen])
    right = np.zeros((levels, blocks))
    for start in range(0, len(test), batch_size):
        chosen = np.arange(start, min(start + batch_size, len(test)))
        right += np.asarray(correct(state[0], test.rows(chosen), test.labels[chosen]))
    return right / len(test)


def _moments(features: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every channel over all rows, (levels, blocks, D) float32."""
    total = np.zeros(features.shape, np.float64)
    parts = [np.arange(i, min(i + READ_ROWS, len(features))) for i in range(0, len(features), READ_ROWS)]
    for part in parts:
        total += features.rows(part).sum(axis=0, dtype=np.float64)
    mean = total / len(features)
    squares = np.zeros_like(total)
    for part in parts:
        squares += np.square(features.rows(part) - mean).sum(axis=0)
    return mean.astype(np.float32), (squares / len(features)).astype(np.float32)
