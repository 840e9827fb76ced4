"""Dispersive loss (Wang and He, arXiv 2506.09027, the InfoNCE variant with squared L2 distances).

    L = L_gen + lambda * log mean_{i,j} exp(-d_ij / tau),  d_ij = |z_i - z_j|^2 / (N D)

over the pairs of a group of examples, i = j among them, where z_i are all tokens of example i after a block. A group is
what the authors' code has on one device; here it is a stretch of consecutive rows of the global batch, so that the loss
depends neither on the number of devices nor on that of microbatches.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from sra_jax.errors import UserError
from sra_jax.methods.method import Method, Seen, Term, check_block, check_weight
from sra_jax.models.flops import Shape


def dispersion(z: jax.Array, group: int, temperature: float) -> jax.Array:
    """log mean exp(-d_ij / tau) of each group of consecutive rows.

    Args:
      z: features (B,...) float32.
      group: rows of a group; divides B.
      temperature: tau.

    Returns:
      (B/group,) float32, at most 0; 0 for groups of one row or of equal rows.
    """
    z = z.reshape(-1, group, z[0].size)  # (B/s,s,F)
    z = z - z.mean(axis=1, keepdims=True)  # distances stay, and products of like rows lose no digits
    products = jnp.einsum("gif,gjf->gij", z, z, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(z).sum(axis=-1)
    distances = (squares[:, :, None] + squares[:, None, :] - 2 * products) / z.shape[-1]
    distances = jnp.where(jnp.eye(group, dtype=bool), 0, jnp.maximum(distances, 0))
    return jax.nn.logsumexp(-distances / temperature, axis=(1, 2)) - 2 * jnp.log(group)


@dataclasses.dataclass(frozen=True)
class Dispersive(Method):
    """What is spread out, and how strongly.

    Attributes:
      block: whose tokens, counted from 1; the paper takes a quarter of the depth.
      weight: lambda.
      temperature: tau.
      group: examples that are compared with each other; the whole batch where that is smaller.
    """

    block: int = 3
    weight: float = 0.5
    temperature: float = 0.5
    group: int = 16

    name: ClassVar[str] = "dispersive"

    @property
    def student_taps(self) -> tuple[int, ...]:
        return (self.block,)

    def together(self, batch_size: int) -> int:
        return min(self.group, batch_size)

    def loss(self, seen: Seen) -> Term:
        """The mean over groups."""
        h = seen.student[self.block]
        group = min(self.group, h.shape[0])
        return Term(dispersion(h, group, self.temperature).mean(), h)

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        check_block(f"{self.key}.block", self.block, shape.depth, "the paper takes a quarter of the depth")
        check_weight(f"{self.key}.weight", self.weight)
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"{self.key}.temperature={self.temperature} must be above 0; the paper uses 0.5")
        if self.group < 2:
            raise UserError(f"{self.key}.group={self.group}: a group has at least 2 examples; the paper uses 16")
        for size, what in ((batch_size, "batch_size"), (microbatch, "a microbatch (batch_size / accumulation)")):
            if size % self.together(batch_size):
                raise UserError(
                    f"{self.key}.group={self.group} does not divide {what}={size}: change one of them, for a group "
                    "lies in one microbatch"
                )
