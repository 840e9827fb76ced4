"""Networks that methods put on the student's tokens while training; none is part of the sampled model."""

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax.models.transformer import TransformerConfig, linear


class Head(nnx.Module):
    """Projection head j of the student: linear D -> 2D, SiLU, linear 2D -> D. Not part of the sampled model."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.hidden = linear(config, config.width, 2 * config.width, rngs)
        self.out = linear(config, 2 * config.width, config.width, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(B,N,D) -> (B,N,D) float32."""
        return self.out(nnx.silu(self.hidden(tokens))).astype(jnp.float32)
