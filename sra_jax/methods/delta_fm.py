"""Contrastive flow matching, delta FM (Stoica et al., ICCV 2025, arXiv 2506.05350).

    L = mean |v_i - u_i|^2 - lambda * mean over the anchors of |v_i - u_j(i)|^2

with the velocity target u_j(i) of another example j(i) of the global batch, at that example's own time as in the
official code (on the linear path the target knows no time). Anchors are all examples, or those whose label was not
dropped; the mean is over them, counted over the global batch.

The loss moves its own minimum: for an anchor it is reached at v = (u - lambda' u') / (1 - lambda'), u' being the
expected velocity of its negative and lambda' the weight that an anchor really has. `DeltaFM.correction` takes that back
while sampling:

    lambda' = lambda; with `drop_null` lambda / (1 - p), p the label dropout, and 0 for the null label
    u' = E[alpha'_t] m          over the training times, for the negative is at its own; its noise averages out
    m = the mean latent, or with negatives of another label, of class c with the share pi_c and the mean m_c:
        (mean - (1 - p) pi_c m_c) / (1 - (1 - p) pi_c)     all but the class's own that kept their label
"""

import dataclasses
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.diffusion.process import Flow, Process
from sra_jax.errors import UserError
from sra_jax.methods.correction import Correction, LatentMeans
from sra_jax.methods.groups import position_times
from sra_jax.methods.method import Draws, Method, Seen, Term, check_choice, check_weight
from sra_jax.models.flops import Shape
from sra_jax.models.mmdit import MMDiTConfig
from sra_jax.models.transformer import TransformerConfig


def other_rows(drawn: jax.Array) -> jax.Array:
    """For each row another one, never itself: (B,) int32 of integers 0..B-2, each of which stands for one of them."""
    return drawn + (drawn >= jnp.arange(drawn.shape[0]))


def rows_of_other_labels(key: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each row one of another label, uniform over these.

    Returns:
      Their numbers (B,) int32, and whether there is one (B,) bool; the number means nothing where there is none.
    """
    allowed = labels[:, None] != labels[None, :]
    draws = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
    return draws.argmax(axis=1).astype(jnp.int32), allowed.any(axis=1)


def anchor_weights(anchors: jax.Array) -> jax.Array:
    """(B,) float32 whose mean over all rows of w_i x_i is the mean of x over the anchors (B,) bool; 0 without any."""
    return anchors * (anchors.shape[0] / jnp.maximum(anchors.sum(), 1)).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class DeltaFM(Method):
    """What is pushed away from what.

    Attributes:
      weight: lambda, below 1.
      drop_null: whether examples whose label was dropped are no anchors; they may still be somebody's negative.
      negatives: "any" other example, or one of an "other_label" (dropped labels count as one).
    """

    weight: float = 0.05
    drop_null: bool = False
    negatives: str = "any"

    name: ClassVar[str] = "delta_fm"
    processes: ClassVar[tuple[str, ...]] = ("interpolant",)

    def draw(self, key: jax.Array, given: Draws, process: Process, shape: Shape) -> dict[str, jax.Array]:
        """negative (B,H,W,C), the velocity of each row's negative; anchor (B,), weights of the mean over anchors."""
        y, count = given["y"], given["x0"].shape[0]
        if self.negatives == "any":  # uniform, with replacement
            drawn = jax.random.randint(key, (count,), 0, count - 1, jnp.int32)
            return self.contrasted(given, other_rows(drawn), jnp.ones(count, bool), process, shape)
        return self.contrasted(given, *rows_of_other_labels(key, y), process, shape)

    def contrasted(
        self, given: Draws, chosen: jax.Array, found: jax.Array, process: Process, shape: Shape
    ) -> dict[str, jax.Array]:
        """What `draw` returns, of the row of each one's negative (B,) int and whether it has one (B,) bool."""
        anchors = found & (given["y"] != cast(TransformerConfig, shape).num_classes) if self.drop_null else found
        times = position_times(given["t"], given.get("groups"), shape)
        flow = cast(Flow, process)  # `processes` names flows only
        return {"negative": flow.target(given["x0"], given["e"], times)[chosen], "anchor": anchor_weights(anchors)}

    def contrast(self, seen: Seen) -> jax.Array:
        """Each example's squared error against its negative's velocity, times its weight of an anchor, (B,)."""
        error = seen.prediction.astype(jnp.float32) - seen.example["negative"]
        return seen.example["anchor"] * jnp.square(error).mean(axis=(1, 2, 3))

    def loss(self, seen: Seen) -> Term:
        """Minus the mean over anchors."""
        return Term(-self.contrast(seen).mean())

    @property
    def latent_means(self) -> str:
        return "all" if self.negatives == "any" else "classes"

    def shift(self, label_dropout: float) -> float:
        """lambda', the weight of the negative's velocity for an anchor."""
        weight = self.weight / (1 - label_dropout) if self.drop_null else self.weight
        if weight >= 1:
            raise UserError(
                f"{self.key}.weight={self.weight} over the {1 - label_dropout:g} of examples with a label is "
                f"{weight:g}: from 1 on the loss has no minimum; the authors use 0.05"
            )
        return weight

    def correction(self, means: LatentMeans, process: Process, num_classes: int, label_dropout: float) -> Correction:
        weight = np.full(num_classes + 1, self.shift(label_dropout))
        if self.drop_null:
            weight[num_classes] = 0
        mean = means.mean[None]
        if means.class_means is not None and means.class_shares is not None and self.negatives != "any":
            own = ((1 - label_dropout) * means.class_shares)[:, None, None, None]
            others = (mean - own * means.class_means) / np.maximum(1 - own, np.finfo(np.float32).tiny)
            mean = np.concatenate([others, mean])
            weight[:num_classes] *= own.ravel() < 1  # a single class has no negatives
        return Correction(weight, cast(Flow, process).mean_rate() * mean)

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        del microbatch
        check_weight(f"{self.key}.weight", self.weight)
        if isinstance(shape, MMDiTConfig):
            raise UserError(
                f"method.name: {self.name} moves the velocity, which samplers take back by the means of classes, and "
                "captions (model.name=mmdit) have none; take another method"
            )
        if self.weight >= 1:
            raise UserError(f"{self.key}.weight={self.weight}: from 1 on the loss has no minimum; the authors use 0.05")
        check_choice(f"{self.key}.negatives", self.negatives, ("any", "other_label"))
        if batch_size < 2:
            raise UserError(f"{self.key} needs another example: batch_size={batch_size} must be at least 2")
