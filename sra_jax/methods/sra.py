"""Self-representation alignment (Jiang et al., arXiv 2505.02831, section 3).

The student's tokens after block m, at time t and through a projection head, are pulled towards the tokens after block
n >= m of its own EMA copy, the teacher, at the less noisy time s <= t of the same latents, noise and labels:

    L = L_gen + lambda * mean over tokens of dist(j(h_m), stop_gradient(h*_n))
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax.diffusion.process import Process
from sra_jax.errors import UserError
from sra_jax.methods.distances import DISTANCES, mean_distance
from sra_jax.methods.heads import Head, head_flops
from sra_jax.methods.method import (
    Draws,
    Method,
    Seen,
    Term,
    View,
    check_choice,
    check_pair,
    check_weight,
    teacher_interval,
)
from sra_jax.models.flops import Shape

WEIGHT_SCHEDULES = ("constant", "decay")


@dataclasses.dataclass(frozen=True)
class Alignment(Method):
    """What is aligned to what, how and how strongly.

    Attributes:
      student_block: m, the student's block, counted from 1.
      teacher_block: n >= m, the teacher's block; the teacher runs blocks 1..n only.
      distance: one of `DISTANCES`; the authors advise cosine, with weight 0.5, since July 2026.
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

    student_block: int = 3
    teacher_block: int = 8
    distance: str = "smooth_l1"
    beta: float = 0.05
    weight: float = 0.2
    weight_schedule: str = "constant"
    weight_decay_start: int = 0
    weight_decay_steps: int = 1
    weight_decay_stair: int = 1
    interval: tuple[float, float] = (0.0, 0.2)
    head: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", teacher_interval("alignment.interval", self.interval))

    name: ClassVar[str] = "sra"
    section: ClassVar[str] = "alignment"
    log: ClassVar[Mapping[str, str]] = {
        "loss": "loss_alignment", "weight": "alignment_weight", "student_norm": "student_feature_norm",
        "target_norm": "teacher_feature_norm",
    }  # fmt: skip
    own_head: ClassVar[str] = "head"
    foreign_head: ClassVar[str] = "ap_head"
    exclusive: ClassVar[str] = "what the teacher sees"

    @property
    def against_growth(self) -> str:
        if self.distance.startswith("cosine"):
            return super().against_growth
        return (
            f"{self.distance} grows with the norms: use the authors' later choice, alignment.distance=cosine with "
            "alignment.weight=0.5 and alignment.weight_schedule=constant"
        )

    @property
    def student_taps(self) -> tuple[int, ...]:
        return (self.student_block,)

    @property
    def teacher_taps(self) -> tuple[int, ...]:
        return (self.teacher_block,)

    def heads(self, shape: Shape) -> Mapping[str, Callable[[nnx.Rngs], nnx.Module]]:
        return {"head": lambda rngs: Head(shape, rngs=rngs)} if self.head else {}

    def head_flops(self, shape: Shape) -> float:
        return head_flops(shape) if self.head else 0.0

    def draw(self, key: jax.Array, given: Draws, process: Process, shape: Shape) -> dict[str, jax.Array]:
        """s (B,), the teacher's times: no noisier than t."""
        del shape
        return {"s": process.teacher_time(key, given["t"], self.interval)}

    def teacher_view(self, example: Draws, shape: Shape) -> View:
        del shape
        return View(example["s"], example["y"])  # the student's labels: the authors drop them once for both

    def weight_at(self, step: jax.Array) -> jax.Array:
        """lambda at a step (counted from 0), float32."""
        if self.weight_schedule == "constant":
            return jnp.float32(self.weight)
        stair = self.weight_decay_stair
        passed = jnp.maximum(step - self.weight_decay_start, 0) // stair * stair
        return self.weight * 0.1 ** (passed.astype(jnp.float32) / self.weight_decay_steps)

    def loss(self, seen: Seen) -> Term:
        """L_sa: the mean distance of the student's projected tokens to the teacher's. No gradient reaches these."""
        h, h_teacher = seen.student[self.student_block], seen.teacher[self.teacher_block]
        projected = seen.head("head", h) if self.head else h
        return Term(mean_distance(self.distance, projected, h_teacher, self.beta), h, projected, h_teacher)

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        del batch_size, microbatch
        check_pair(
            "alignment", self.student_block, self.teacher_block, "teacher_block", shape.depth,
            "the paper uses 3 and 8 for SiT-B, 6 and 16 for SiT-L, 8 and 20 for SiT-XL",
        )  # fmt: skip
        check_choice("alignment.distance", self.distance, DISTANCES)
        if not self.beta > 0:
            raise UserError(f"alignment.beta={self.beta} must be above 0; the paper uses 0.05")
        check_weight("alignment.weight", self.weight)
        check_choice("alignment.weight_schedule", self.weight_schedule, WEIGHT_SCHEDULES)
        if self.weight_decay_start < 0 or self.weight_decay_steps < 1 or self.weight_decay_stair < 1:
            raise UserError(
                f"alignment.weight_decay_start={self.weight_decay_start}, "
                f"weight_decay_steps={self.weight_decay_steps}, weight_decay_stair={self.weight_decay_stair}: the "
                "start is a step from 0, the other two are numbers of steps from 1"
            )
