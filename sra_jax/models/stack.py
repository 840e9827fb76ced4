"""Running a stack of equal blocks whose parameters carry a leading depth axis, compiled once whatever the depth."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}
"""What is saved for the backward pass: everything; the results of matrix products; each block's input only."""

Block = Callable[[Any, jax.Array, jax.Array], jax.Array]


def run_stack(
    block: Block, params: Any, x: jax.Array, condition: jax.Array, *, depth: int, taps: tuple[int, ...], stop: int,
    remat: str,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Apply blocks 1..stop to the tokens and return the tokens after some of them.

    Args:
      block: `block(params_of_one, x, condition) -> x`, pure.
      params: tree of arrays with a leading axis of `depth`.
      x: tokens (B,N,D).
      condition: what every block sees (B,D).
      depth: number of blocks in `params`.
      taps: ascending block numbers in 1..stop.
      stop: number of blocks to run; the parameters of later blocks are not read.
      remat: a key of `REMAT_POLICIES`.

    Returns:
      The tokens after block `stop` and a tuple of the tokens after each tap, (B,N,D) each.
    """
    if remat != "none":
        block = jax.checkpoint(block, policy=REMAT_POLICIES[remat])
    if stop < depth:
        return _run_part(block, params, x, condition, taps, stop)

    # One scan over the whole depth: cutting it at the taps would slice, and so copy, the stacked parameters and their
    # gradients. The tokens at a tap travel in the carry instead.
    def body(carry: tuple[jax.Array, tuple[jax.Array, ...]], item: tuple[jax.Array, Any]):
        x, tapped = carry
        number, params = item
        x = block(params, x, condition)
        return (x, tuple(jnp.where(number == tap, x, old) for tap, old in zip(taps, tapped, strict=True))), None

    carry = (x, tuple(jnp.zeros_like(x) for _ in taps))
    (x, tapped), _ = jax.lax.scan(body, carry, (jnp.arange(1, depth + 1), params))
    return x, tapped


def _run_part(
    block: Block, params: Any, x: jax.Array, condition: jax.Array, taps: tuple[int, ...], stop: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Blocks 1..stop by index into the whole stack: no copy of the part of the parameters that is used."""

    def body(index: jax.Array, x: jax.Array) -> jax.Array:
        one = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), params)
        return block(one, x, condition)

    tapped = []
    start = 0
    for tap in taps:
        x = jax.lax.fori_loop(start, tap, body, x)
        tapped.append(x)
        start = tap
    return jax.lax.fori_loop(start, stop, body, x), tuple(tapped)
