"""Distances between a student's tokens and their targets, (B,N,D) each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

COSINE_EPSILON = 1e-8


def smooth_l1(student: jax.Array, teacher: jax.Array, beta: float) -> jax.Array:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, for each entry; the paper's distance, beta 0.05."""
    difference = jnp.abs(student - teacher)
    return jnp.where(difference < beta, 0.5 / beta * jnp.square(difference), difference - 0.5 * beta)


def l1(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """|d| for each entry."""
    return jnp.abs(student - teacher)


def l2(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """d^2 for each entry."""
    return jnp.square(student - teacher)


def cosine(student: jax.Array, teacher: jax.Array, axis: int) -> jax.Array:
    """1 - cosine similarity along `axis`: over features (-1) one number a token, over tokens (1) one a channel."""

    def norm(x: jax.Array) -> jax.Array:
        # The maximum is taken under the root, so that a zero vector has a gradient of zero rather than NaN.
        return jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=axis), COSINE_EPSILON**2))

    return 1 - (student * teacher).sum(axis=axis) / (norm(student) * norm(teacher))


DISTANCES = ("smooth_l1", "l1", "l2", "cosine", "cosine_tokens")
"""cosine is taken over the features of a token; cosine_tokens, over the tokens of a channel, is what the authors' code
computes under the name of cosine."""


def mean_distance(name: str, student: jax.Array, target: jax.Array, beta: float = 0.05) -> jax.Array:
    """The mean over tokens of a distance, in float32; no gradient flows into the target.

    Args:
      name: one of `DISTANCES`.
      student, target: tokens (B,N,D).
      beta: of smooth_l1.
    """
    distance: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "smooth_l1": lambda a, b: smooth_l1(a, b, beta),
        "l1": l1,
        "l2": l2,
        "cosine": lambda a, b: cosine(a, b, axis=-1),
        "cosine_tokens": lambda a, b: cosine(a, b, axis=1),
    }
    student, target = student.astype(jnp.float32), jax.lax.stop_gradient(target).astype(jnp.float32)
    return distance[name](student, target).mean()
