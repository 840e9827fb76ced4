"""Times in groups: the tokens of an example at several noise levels."""

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.models.flops import Shape


def token_times(t: jax.Array, groups: jax.Array) -> jax.Array:
    """The time of each token (B,N), of the times of its example's groups (B,G) and each token's group (B,N)."""
    return jnp.take_along_axis(t, groups, axis=1)


def position_times(t: jax.Array, groups: jax.Array | None, shape: Shape) -> jax.Array:
    """The time of each position of the latents (B,H,W); without groups the times (B,) as they are."""
    if groups is None:
        return t
    grid = shape.input_size // shape.patch
    times = token_times(t, groups).reshape(-1, grid, grid)
    return times.repeat(shape.patch, axis=1).repeat(shape.patch, axis=2)


def shares(ratios: tuple[float, ...]) -> np.ndarray:
    """Shares of the groups, adding up to 1: of one ratio r, [r, 1 - r]; one group where r is not between 0 and 1."""
    if len(ratios) > 1:
        return np.asarray(ratios, np.float64) / sum(ratios)
    (ratio,) = ratios
    return np.array([ratio, 1 - ratio]) if 0 < ratio < 1 else np.ones(1)


def counts(ratios: tuple[float, ...], tokens: int) -> np.ndarray:
    """How many of so many tokens fall to each group: the whole part of its share, the rest to the largest remainders
    (arXiv 2607.02508, section 3.1)."""
    exact = shares(ratios) * tokens
    whole = np.floor(exact).astype(int)
    largest_first = np.argsort(-(exact - whole), kind="stable")
    whole[largest_first[: tokens - whole.sum()]] += 1
    return whole


def random_groups(draws: jax.Array, sizes: np.ndarray) -> jax.Array:
    """The group of each token (B,N) int32: the first of a random order of an example's tokens are group 0, and so on.

    Args:
      draws: uniform numbers (B,N), whose order is the random order.
      sizes: tokens of each group.
    """
    order = jnp.argsort(draws, axis=1)
    place = jnp.argsort(order, axis=1)  # of each token in the random order
    return jnp.asarray(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))[place]
