"""Classifier-free guidance (Ho and Salimans, 2022) with a guidance interval (Kynkäänniemi et al., 2024)."""

import dataclasses
from collections.abc import Callable
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.diffusion.process import Denoiser

Condition = Any
"""What the network is told beside the time: labels (B,) int, or a tree of arrays (B,...) such as a caption's."""


def without(y: Condition, null: Condition, where: jax.Array | bool = True) -> Condition:
    """A condition with the null condition in place of some examples' own.

    Args:
      y: the condition of B examples.
      null: a tree like `y` without the batch axis: the null label, the empty caption.
      where: (B,) bool, which examples lose theirs; True takes all.
    """

    def replace(own: jax.Array, nothing: Any) -> jax.Array:
        rows = jnp.reshape(where, jnp.shape(where) + (1,) * (own.ndim - 1))
        return jnp.where(rows, jnp.asarray(nothing, own.dtype), own)

    return jax.tree.map(replace, y, null)


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How much, when and on what samples are guided.

    Attributes:
      null: the condition of the unconditional branch, as `without` takes it: the model's `num_classes` or a tree.
      scale: w in `d_null + w * (d_label - d_null)`, at least 1; 1 turns guidance off.
      low, high: guided where low <= t <= high, both ends included, in the process's time.
      channels: guide the first so many channels of the prediction and keep the conditional branch's others; None
        guides all.
    """

    null: Condition
    scale: float = 1.0
    low: float = -np.inf
    high: float = np.inf
    channels: int | None = None

    def active(self, times: np.ndarray) -> np.ndarray:
        """Whether a step that starts at each of `times` (S,) is guided, (S,) bool. On the host: it shapes the loop."""
        times = np.asarray(times)
        return (self.scale > 1) & (times >= self.low) & (times <= self.high)

    def guide(self, denoise: Denoiser) -> Denoiser:
        """`denoise` with guidance: one call on the doubled batch [x, x] with conditions [y, null]."""

        def guided(x: jax.Array, t: jax.Array, y: Condition) -> jax.Array:
            doubled = jax.tree.map(lambda *each: jnp.concatenate(each), (x, t, y), (x, t, without(y, self.null)))
            both = denoise(*doubled)
            conditional, unconditional = jnp.split(both, 2)
            mixed = unconditional + self.scale * (conditional - unconditional)
            if self.channels is None:
                return mixed
            return jnp.concatenate([mixed[..., : self.channels], conditional[..., self.channels :]], axis=-1)

        return guided


def loop(
    step: Callable[[jax.Array, jax.Array, Denoiser], jax.Array], x: jax.Array, active: np.ndarray, denoise: Denoiser,
    guidance: Guidance,
) -> jax.Array:
    """Run `x = step(x, i, denoiser)` for i = 0 .. len(active)-1 inside one compiled program.

    Whether a step is guided is known before compilation, so steps are run in stretches of equal state, each one loop:
    an unguided step costs the conditional branch only.

    Args:
      step: one sampler step; `denoiser` is the plain or the guided one.
      x: the state at the first step (B,H,W,C).
      active: (S,) bool, for each step whether it is guided.
    """
    start = 0
    for is_guided, stretch in groupby(active.tolist()):
        stop = start + len(list(stretch))
        denoiser = guidance.guide(denoise) if is_guided else denoise
        x = jax.lax.fori_loop(start, stop, lambda i, x, denoiser=denoiser: step(x, i, denoiser), x)
        start = stop
    return x
