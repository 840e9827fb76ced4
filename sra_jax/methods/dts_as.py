"""Dual-time scheduling and attention separation, "From SRA to Self-Flow" (Jiang et al., arXiv 2607.02508).

The tokens of an example fall into random groups of fixed sizes, each at a time t_g ~ p(t) of its own (dual-time
scheduling), and attend to their own group only (attention separation), in the student and the teacher:

    teacher: the EMA at s_g = max(t_g - k_g, 0), k_g ~ U[0, 0.2) a group, the same groups; the true labels
    L = L_gen + w * mean of (1 - cos(j(h_m), stop_gradient(h*_n)))

Sampling uses full attention. The authors' code takes the cosine over the token axis (`cosine_tokens`) and, with the
teacher at the smallest time, gives groups after the first clean latents; here every group has that time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax import values
from sra_jax.diffusion.process import Process
from sra_jax.errors import UserError
from sra_jax.methods.distances import DISTANCES, mean_distance
from sra_jax.methods.groups import counts, random_groups, shares
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

HEAD = "dts_as_head"
TEACHER_TIMES = ("sra", "self_flow", "same")


@dataclasses.dataclass(frozen=True)
class DualTimes(Method):
    """How tokens are grouped, who attends to whom, and what the teacher sees.

    Attributes:
      student_block: m, counted from 1.
      teacher_block: n >= m; the teacher runs blocks 1..n only.
      weight: w.
      distance: one of `DISTANCES`; cosine_tokens is what the authors' code computes.
      beta: of smooth_l1.
      ratios: shares of the groups; one number r means r and 1 - r, and 1 means a single group.
      dual_time: whether each group has a time of its own; otherwise all have the first one's.
      separate: attention separation.
      teacher_time: "sra", each group's time less a draw from `interval`; "self_flow", the smallest of the example's
        times; "same", the student's times.
      interval: of teacher_time=sra, fractions of the time range.
      teacher_mask: whether the teacher's tokens are in groups and separated as the student's are; without it the
        teacher attends to all and has one time, which only teacher_time=self_flow gives.
      whole_share: share of examples that are left whole, in the last of two groups; the paper's best is 0.25.

    Raises:
      UserError: an interval that is none.
    """

    student_block: int = 3
    teacher_block: int = 8
    weight: float = 0.5
    distance: str = "cosine"
    beta: float = 0.05
    ratios: tuple[float, ...] = (0.25, 0.75)
    dual_time: bool = True
    separate: bool = True
    teacher_time: str = "sra"
    interval: tuple[float, float] = (0.0, 0.2)
    teacher_mask: bool = True
    whole_share: float = 0.0

    name: ClassVar[str] = "dts_as"
    processes: ClassVar[tuple[str, ...]] = ("interpolant",)
    own_head: ClassVar[str] = HEAD
    foreign_head: ClassVar[str] = "ap_head"
    foreign_arguments: ClassVar[tuple[str, ...]] = ("teacher_t", "teacher_mask", "full_sample_prob")
    exclusive: ClassVar[str] = "the times of tokens and what the teacher sees"

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", teacher_interval(f"{self.key}.interval", self.interval))

    @property
    def student_taps(self) -> tuple[int, ...]:
        return (self.student_block,)

    @property
    def teacher_taps(self) -> tuple[int, ...]:
        return (self.teacher_block,)

    @property
    def groups(self) -> int:
        return len(shares(self.ratios))

    def teacher_groups(self, shape: Shape) -> int | tuple[int, ...]:
        if not self.teacher_mask:
            return 1
        return (self.sizes(shape) if self.separates else None) or self.groups

    @property
    def separates(self) -> bool:
        return self.separate and self.groups > 1

    def sizes(self, shape: Shape) -> tuple[int, ...] | None:
        """Not known where examples are left whole."""
        return None if self.whole_share else tuple(counts(self.ratios, shape.tokens).tolist())

    def heads(self, shape: Shape) -> Mapping[str, Callable[[nnx.Rngs], nnx.Module]]:
        return {HEAD: lambda rngs: Head(shape, rngs=rngs)}

    def head_flops(self, shape: Shape) -> float:
        return head_flops(shape)

    def draw(self, key: jax.Array, given: Draws, process: Process, shape: Shape) -> dict[str, jax.Array]:
        """t (B,G) and groups (B,N), or t (B,) with one group; s, the teacher's times, (B,G) or (B,); true labels."""
        time_key, order_key, whole_key, offset_key = jax.random.split(key, 4)
        first = given["t"]
        batch, groups = first.shape[0], self.groups
        if groups == 1:
            t = first
        elif self.dual_time:
            later = process.sample_time(time_key, batch * (groups - 1)).reshape(batch, groups - 1)
            t = jnp.concatenate([first[:, None], later], axis=1)
        else:
            t = jnp.broadcast_to(first[:, None], (batch, groups))
        order = jax.random.uniform(order_key, (batch, shape.tokens))
        whole = jax.random.uniform(whole_key, (batch,))
        earlier = process.teacher_time(offset_key, t, self.interval) if self.teacher_time == "sra" else t
        return {"label": given["label"], **self.arranged(t, earlier, order, whole)}

    def arranged(self, t: jax.Array, earlier: jax.Array, order: jax.Array, whole: jax.Array) -> dict[str, jax.Array]:
        """t, groups and s of `draw`.

        Args:
          t: times of the groups (B,G), or (B,) where there is one.
          earlier: of teacher_time=sra, a less noisy time for each; t otherwise.
          order: numbers (B,N) whose order is the random order of the tokens.
          whole: numbers (B,) in 0..1; an example whose number is below `whole_share` is left whole.
        """
        s = earlier
        if self.teacher_time == "self_flow" and self.groups > 1:
            s = t.min(axis=1)
            s = jnp.broadcast_to(s[:, None], t.shape) if self.teacher_mask else s
        if self.groups == 1:
            return {"t": t, "s": s}
        of_token = random_groups(order, counts(self.ratios, order.shape[1]))
        return {"t": t, "groups": jnp.where(whole[:, None] < self.whole_share, self.groups - 1, of_token), "s": s}

    def teacher_view(self, example: Draws, shape: Shape) -> View:
        if example["s"].ndim == 1:
            return View(example["s"], example["label"])
        sizes = self.sizes(shape) if self.separates else None
        return View(example["s"], example["label"], example["groups"], self.separates, sizes)

    def loss(self, seen: Seen) -> Term:
        h, target = seen.student[self.student_block], seen.teacher[self.teacher_block]
        projected = seen.head(HEAD, h)
        return Term(mean_distance(self.distance, projected, target, self.beta), h, projected, target)

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        del batch_size, microbatch
        hint = "the authors use 3 and 8 for B/2, 8 and 20 for XL/2"
        check_pair(self.key, self.student_block, self.teacher_block, "teacher_block", shape.depth, hint)
        check_weight(f"{self.key}.weight", self.weight)
        check_choice(f"{self.key}.distance", self.distance, DISTANCES)
        check_choice(f"{self.key}.teacher_time", self.teacher_time, TEACHER_TIMES)
        if not self.beta > 0:
            raise UserError(f"{self.key}.beta={self.beta} must be above 0; the authors use 0.05")
        self._check_groups(shape)

    def _check_groups(self, shape: Shape) -> None:
        if not self.ratios:
            raise UserError(f"{self.key}.ratios is empty: shares of groups are numbers above 0, such as 0.25,0.75")
        for ratio in self.ratios:
            values.number(f"{self.key}.ratios={values.shown(self.ratios)}: a share", ratio, 0, open_low=True)
        if not counts(self.ratios, shape.tokens).all():
            raise UserError(
                f"{self.key}.ratios={self.ratios} leaves a group without any of the {shape.tokens} tokens: make its "
                "share larger"
            )
        if not self.teacher_mask and self.groups > 1 and self.teacher_time != "self_flow":
            raise UserError(
                f"{self.key}.teacher_mask=False with teacher_time={self.teacher_time!r}: a teacher without groups has "
                "one time an example, which only teacher_time=self_flow gives"
            )
        if not 0 <= self.whole_share <= 1:
            raise UserError(f"{self.key}.whole_share={self.whole_share} is out of range: 0 <= whole_share <= 1")
        if self.whole_share and self.groups != 2:
            raise UserError(
                f"{self.key}.whole_share={self.whole_share} is for two groups, not for {self.groups}: set it to 0, or "
                "two ratios"
            )
