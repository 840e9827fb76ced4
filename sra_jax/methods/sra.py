"""Self-representation alignment (Jiang et al., arXiv 2505.02831, section 3).

The student's tokens after block m, at time t and through a projection head, are pulled towards the tokens after block
n >= m of its own EMA copy, the teacher, at the less noisy time s <= t of the same latents, noise and labels:

    L = L_gen + lambda * mean over tokens of dist(j(h_m), stop_gradient(h*_n))

This module knows features and times only; neither data nor devices.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sra_jax import values
from sra_jax.errors import UserError
from sra_jax.methods.distances import DISTANCES, mean_distance

WEIGHT_SCHEDULES = ("constant", "decay")


@dataclasses.dataclass(frozen=True)
class Alignment:
    """What is aligned to what, how and how strongly.

    Attributes:
      student_block: m, the student's block, counted from 1.
      teacher_block: n >= m, the teacher's block; the teacher runs blocks 1..n only.
      distance: one of `DISTANCES`.
      beta: where smooth-L1 turns from quadratic to linear.
      weight: lambda, the weight of the alignment loss.
      weight_schedule: "constant", or "decay" by a factor of ten every `weight_decay_steps` after `weight_decay_start`.
      weight_decay_start: step at which the decay starts.
      weight_decay_steps: steps for one factor of ten.
      weight_decay_stair: the decayed weight changes once in so many steps (the authors change it once an epoch).
      interval: the teacher is k earlier than the student, k ~ U[low, high) as a fraction of the process's whole time
        range; low = high, or one number, gives a fixed k.
      head: whether the student's tokens pass through the projection head.

    Raises:
      UserError: an interval that is none.
    """

    student_block: int
    teacher_block: int
    distance: str = "smooth_l1"
    beta: float = 0.05
    weight: float = 0.2
    weight_schedule: str = "constant"
    weight_decay_start: int = 0
    weight_decay_steps: int = 1
    weight_decay_stair: int = 1
    interval: tuple[float, float] = (0.0, 0.2)
    head: bool = True

    def __post_init__(self):
        interval = values.interval(
            "alignment.interval", self.interval, fixed=True,
            advice="they are fractions of the process's time range, and the paper uses 0,0.2",
        )  # fmt: skip
        object.__setattr__(self, "interval", interval)

    def check(self, depth: int) -> None:
        """Raises `UserError` where the values cannot work with a network of `depth` blocks."""
        if not 1 <= self.student_block <= depth:
            raise UserError(
                f"alignment.student_block={self.student_block} is not a block: allowed 1..{depth} (model.depth); the "
                "paper uses 3 for B, 6 for L, 8 for XL"
            )
        if self.teacher_block > depth:
            raise UserError(
                f"alignment.teacher_block={self.teacher_block} is beyond model.depth={depth}: allowed "
                f"{self.student_block}..{depth}; the paper uses 8 for SiT-B, 16 for SiT-L, 20 for SiT-XL"
            )
        if self.teacher_block < self.student_block:
            raise UserError(
                f"alignment.teacher_block={self.teacher_block} is before alignment.student_block={self.student_block}: "
                "the student learns from the same or a later block of the teacher; raise teacher_block or lower "
                "student_block"
            )
        if self.distance not in DISTANCES:
            raise UserError(f"alignment.distance={self.distance!r} is unknown; allowed: {', '.join(DISTANCES)}")
        if not self.beta > 0:
            raise UserError(f"alignment.beta={self.beta} must be above 0; the paper uses 0.05")
        if not self.weight >= 0:
            raise UserError(
                f"alignment.weight={self.weight} must not be negative; alignment.enabled=False trains the baseline"
            )
        if self.weight_schedule not in WEIGHT_SCHEDULES:
            raise UserError(
                f"alignment.weight_schedule={self.weight_schedule!r} is unknown; allowed: {', '.join(WEIGHT_SCHEDULES)}"
            )
        if self.weight_decay_start < 0 or self.weight_decay_steps < 1 or self.weight_decay_stair < 1:
            raise UserError(
                f"alignment.weight_decay_start={self.weight_decay_start}, "
                f"weight_decay_steps={self.weight_decay_steps}, weight_decay_stair={self.weight_decay_stair}: the "
                "start is a step from 0, the other two are numbers of steps from 1"
            )

    def weight_at(self, step: jax.Array) -> jax.Array:
        """lambda at a step (counted from 0), float32."""
        if self.weight_schedule == "constant":
            return jnp.float32(self.weight)
        stair = self.weight_decay_stair
        passed = jnp.maximum(step - self.weight_decay_start, 0) // stair * stair
        return self.weight * 0.1 ** (passed.astype(jnp.float32) / self.weight_decay_steps)

    def loss(self, student: jax.Array, teacher: jax.Array) -> jax.Array:
        """L_sa: the mean distance of the student's (projected) tokens to the teacher's, (B,N,D) each; a scalar.

        No gradient flows into `teacher`.
        """
        return mean_distance(self.distance, student, teacher, self.beta)
