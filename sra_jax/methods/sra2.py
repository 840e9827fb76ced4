"""SRA 2 (Wang, Jiang et al., CVPR 2026, arXiv 2601.17830): early tokens predict the clean latent.

    L = L_gen + lambda * mean smooth_l1(P(h_m), z)

with a head P of five linear layers from tokens to patches of z, the clean latent. No code was released: the head's
activation, the mean over entries and the order inside a patch are this project's reading of the paper. Latents of other
autoencoders than Stable Diffusion's make the loss collapse unless they are standardised, each example by itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
from flax import nnx

from sra_jax.errors import UserError
from sra_jax.methods.distances import mean_distance
from sra_jax.methods.heads import Layers, layers_flops
from sra_jax.methods.method import Method, Seen, Term, check_block, check_choice, check_weight
from sra_jax.models.flops import Shape
from sra_jax.models.transformer import patchify

HEAD = "sra2_head"
STANDARDISE = ("none", "target", "both")
LAYERS = 5
EPSILON = 1e-6


def standardised(x: jax.Array) -> jax.Array:
    """Each example (B,...) with mean 0 and standard deviation 1 over all of its entries."""
    axes = tuple(range(1, x.ndim))
    return (x - x.mean(axis=axes, keepdims=True)) / (x.std(axis=axes, keepdims=True) + EPSILON)


@dataclasses.dataclass(frozen=True)
class SRA2(Method):
    """From which block the latent is predicted, and how it is compared.

    Attributes:
      student_block: m, counted from 1.
      weight: lambda.
      beta: of smooth-L1.
      hidden: width of the head; 1536 gives the paper's 8M parameters for B.
      standardise: "none" compares with the latent as it is, as the paper does on SD-VAE latents; "target" with the
        standardised one; "both" standardises the prediction as well.
    """

    student_block: int = 2
    weight: float = 1.0
    beta: float = 0.05
    hidden: int = 1536
    standardise: str = "none"

    name: ClassVar[str] = "sra2"

    @property
    def student_taps(self) -> tuple[int, ...]:
        return (self.student_block,)

    def advice(self, stable_diffusion: bool) -> str | None:
        if stable_diffusion or self.standardise != "none":
            return None
        return (
            f"{self.key}.standardise=none compares with latents that are not Stable Diffusion's, where the loss was "
            f"seen to collapse: --config.{self.key}.standardise=target standardises them"
        )

    def heads(self, shape: Shape) -> Mapping[str, Callable[[nnx.Rngs], nnx.Module]]:
        return {HEAD: lambda rngs: Layers(shape, self._widths(shape), rngs=rngs)}

    def head_flops(self, shape: Shape) -> float:
        return layers_flops(shape, self._widths(shape))

    def _widths(self, shape: Shape) -> tuple[int, ...]:
        return (shape.width, *[self.hidden] * (LAYERS - 1), shape.patch**2 * shape.channels)

    def loss(self, seen: Seen) -> Term:
        """The mean over all entries; tokens and patches hold the same entries in the same order."""
        h, x0 = seen.student[self.student_block], seen.example["x0"]
        predicted = seen.head(HEAD, h)
        target = patchify(x0 if self.standardise == "none" else standardised(x0), seen.shape.patch)
        if self.standardise == "both":
            predicted = standardised(predicted)
        return Term(mean_distance("smooth_l1", predicted, target, self.beta), h, predicted, target)

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        del batch_size, microbatch
        hint = "the paper uses 2 for B, 8 for L and XL"
        check_block(f"{self.key}.student_block", self.student_block, shape.depth, hint)
        check_weight(f"{self.key}.weight", self.weight)
        check_choice(f"{self.key}.standardise", self.standardise, STANDARDISE)
        if not self.beta > 0:
            raise UserError(f"{self.key}.beta={self.beta} must be above 0; the paper uses 0.05")
        if self.hidden < 1:
            raise UserError(f"{self.key}.hidden={self.hidden} must be at least 1; the paper's head of B has 1536")
