"""REPA (Yu et al., arXiv 2410.06940) and iREPA (Singh et al., 2025): alignment to an external encoder, the anchor.

    L = L_gen + lambda * mean over tokens (and encoders) of (1 - cos(j(h_m), f))

with features f (B,N,Dz) that were stored beside the latents, one vector a token. REPA's head j is three linear layers;
iREPA's is a 3x3 convolution over the grid of tokens, and its features are normalised over space. The papers' term is
- cos, which differs by a constant. Data sets without stored features get a stand-in, a fixed random projection of the
clean patches, so that every recipe runs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax import values
from sra_jax.diffusion.process import Process
from sra_jax.errors import UserError
from sra_jax.methods.distances import mean_distance
from sra_jax.methods.heads import GridConvolution, Layers, grid_convolution_flops, layers_flops
from sra_jax.methods.method import Draws, Method, Seen, Term, check_block, check_choice, check_weight
from sra_jax.models.flops import Shape
from sra_jax.models.transformer import patchify

FEATURES = "features"
"""Name of the stored features in a batch."""

EPSILON = 1e-6


def spatially_normalised(features: jax.Array, alpha: float) -> jax.Array:
    """(f - alpha * mean over tokens) / (standard deviation over tokens + 1e-6), an example and channel (iREPA, sec. 4).

    Args:
      features: (B,N,Dz) float32, N >= 2.
      alpha: how much of the mean is taken away, 0..1.
    """
    mean = features.mean(axis=1, keepdims=True)
    return (features - alpha * mean) / (features.std(axis=1, keepdims=True, ddof=1) + EPSILON)


def stand_in(x0: jax.Array, patch: int, width: int) -> jax.Array:
    """Features (B,N,width) of clean latents: a fixed random projection of their patches, tanh between two layers."""
    patches = patchify(x0, patch)
    first, second = jax.random.split(jax.random.key(0))
    hidden = jax.random.normal(first, (patches.shape[-1], width)) * patches.shape[-1] ** -0.5
    out = jax.random.normal(second, (width, width)) * width**-0.5
    return jnp.tanh(patches @ hidden) @ out


@dataclasses.dataclass(frozen=True)
class REPA(Method):
    """Which block is aligned to which features.

    Attributes:
      student_block: m, counted from 1.
      weight: lambda.
      widths: channels of each encoder's features, which lie side by side in a record; each has a head of its own.
      hidden: width of the head's layers.
    """

    student_block: int = 4
    weight: float = 0.5
    widths: tuple[int, ...] = (768,)
    hidden: int = 2048

    name: ClassVar[str] = "repa"
    exclusive: ClassVar[str] = "what stored features are for"

    @property
    def student_taps(self) -> tuple[int, ...]:
        return (self.student_block,)

    @property
    def feature_widths(self) -> tuple[int, ...]:
        return self.widths

    def _head_names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}_head_{number}" for number in range(len(self.widths)))

    def heads(self, shape: Shape) -> Mapping[str, Callable[[nnx.Rngs], nnx.Module]]:
        return {
            name: functools.partial(self._head, shape, width)
            for name, width in zip(self._head_names(), self.widths, strict=True)
        }

    def _head(self, shape: Shape, width: int, rngs: nnx.Rngs) -> nnx.Module:
        return Layers(shape, self._layers(shape, width), rngs=rngs)

    def head_flops(self, shape: Shape) -> float:
        return sum(layers_flops(shape, self._layers(shape, width)) for width in self.widths)

    def _layers(self, shape: Shape, width: int) -> tuple[int, ...]:
        return (shape.width, self.hidden, self.hidden, width)

    def draw(self, key: jax.Array, given: Draws, process: Process, shape: Shape) -> dict[str, jax.Array]:
        """features (B,N,Dz) float32: the stored ones, or the stand-in."""
        del key, process
        if FEATURES in given:
            return {FEATURES: given[FEATURES].astype(jnp.float32)}
        return {FEATURES: stand_in(given["x0"], shape.patch, sum(self.widths))}

    def targets(self, features: jax.Array) -> jax.Array:
        """What the head is compared with, of the features (B,N,Dz) of one encoder."""
        return features

    def loss(self, seen: Seen) -> Term:
        """The mean over tokens and encoders."""
        h = seen.student[self.student_block]
        ends = [sum(self.widths[: number + 1]) for number in range(len(self.widths))]
        targets = [self.targets(f) for f in jnp.split(seen.example[FEATURES], ends[:-1], axis=-1)]
        projected = [seen.head(name, h) for name in self._head_names()]
        terms = [mean_distance("cosine", p, f) for p, f in zip(projected, targets, strict=True)]
        return Term(sum(terms[1:], terms[0]) / len(terms), h, projected[0], targets[0])

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        del batch_size, microbatch
        hint = "the paper uses 4 for B, 8 for L and XL"
        check_block(f"{self.key}.student_block", self.student_block, shape.depth, hint)
        check_weight(f"{self.key}.weight", self.weight)
        if not self.widths:
            raise UserError(f"{self.key}.widths is empty: channels of the encoders' features, such as 768 for DINOv2-B")
        for width in self.widths:
            values.whole(f"{self.key}.widths={values.shown(self.widths)}: a width", width, 1, 2**16)
        if self.hidden < 1:
            raise UserError(f"{self.key}.hidden={self.hidden} must be at least 1; the paper uses 2048")


@dataclasses.dataclass(frozen=True)
class ConvREPA(REPA):
    """iREPA's projection and target.

    Attributes:
      student_block: m, counted from 1.
      weight: lambda.
      widths: channels of each encoder's features, which lie side by side in a record; each has a head of its own.
      kernel: side of the convolution over the grid of tokens, odd; the authors' paper says 3, their shipped recipe
        trains 1.
      hidden: width of the layers of `projection=layers`.
      projection: "convolution", or "layers" as REPA's.
      alpha: how much of their spatial mean the features lose.
    """

    weight: float = 1.0
    kernel: int = 3
    projection: str = "convolution"
    alpha: float = 0.6

    name: ClassVar[str] = "repa_conv"

    def _head(self, shape: Shape, width: int, rngs: nnx.Rngs) -> nnx.Module:
        if self.projection == "layers":
            return super()._head(shape, width, rngs)
        return GridConvolution(shape, width, self.kernel, rngs=rngs)

    def head_flops(self, shape: Shape) -> float:
        if self.projection == "layers":
            return super().head_flops(shape)
        return sum(grid_convolution_flops(shape, width, self.kernel) for width in self.widths)

    def targets(self, features: jax.Array) -> jax.Array:
        return spatially_normalised(features, self.alpha)

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        super().check(shape, batch_size, microbatch)
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"{self.key}.kernel={self.kernel} must be odd, from 1; the paper uses 3")
        check_choice(f"{self.key}.projection", self.projection, ("convolution", "layers"))
        if not 0 <= self.alpha <= 1:
            raise UserError(f"{self.key}.alpha={self.alpha} is out of range: 0 <= alpha <= 1; the authors use 0.6")
        if shape.tokens < 2:
            raise UserError(f"{self.key} normalises over tokens, of which there is one: use a smaller model.patch")
