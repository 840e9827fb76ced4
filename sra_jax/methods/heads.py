"""Networks that methods put on the student's tokens while training; none is part of the sampled model."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax.models.flops import Shape
from sra_jax.models.transformer import linear


class Head(nnx.Module):
    """Projection head j of the student: linear D -> 2D, SiLU, linear 2D -> D. Not part of the sampled model."""

    def __init__(self, config: Shape, *, rngs: nnx.Rngs):
        self.hidden = linear(config, config.width, 2 * config.width, rngs)
        self.out = linear(config, 2 * config.width, config.width, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(B,N,D) -> (B,N,D) float32."""
        return self.out(nnx.silu(self.hidden(tokens))).astype(jnp.float32)


def head_flops(shape: Shape) -> float:
    """Forward pass of `Head` for one example."""
    return layers_flops(shape, (shape.width, 2 * shape.width, shape.width))


class Layers(nnx.Module):
    """Linear layers with SiLU between them, of the given widths from the tokens' to the output's."""

    def __init__(self, config: Shape, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        self.layers = nnx.List([linear(config, a, b, rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(B,N,D) -> (B,N,K) float32."""
        for layer in list(self.layers)[:-1]:
            tokens = nnx.silu(layer(tokens))
        return self.layers[-1](tokens).astype(jnp.float32)


def layers_flops(shape: Shape, widths: tuple[int, ...]) -> float:
    """Forward pass of linear layers of these widths for one example."""
    return sum(2 * shape.tokens * a * b for a, b in itertools.pairwise(widths))


class GridConvolution(nnx.Module):
    """A convolution over the square grid of tokens, stride 1, zeros around it."""

    def __init__(self, config: Shape, width: int, kernel: int, *, rngs: nnx.Rngs):
        self.convolution = nnx.Conv(
            config.width, width, (kernel, kernel), padding="SAME", dtype=config.dtype, precision=config.precision,
            rngs=rngs,
        )  # fmt: skip

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(B,N,D) -> (B,N,K) float32."""
        batch, count, width = tokens.shape
        side = round(count**0.5)
        grid = self.convolution(tokens.reshape(batch, side, side, width))
        return grid.reshape(batch, count, -1).astype(jnp.float32)


def grid_convolution_flops(shape: Shape, width: int, kernel: int) -> float:
    """Forward pass of `GridConvolution` for one example, zeros around the grid counted."""
    return 2 * shape.tokens * kernel**2 * shape.width * width
