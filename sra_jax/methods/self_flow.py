"""Self-Flow (Chefer et al., arXiv 2603.06507, section 3.4 and appendix A.3); no training code was released.

Two times t, s ~ p(t) an example, each token drawn into a mask M with probability R_M:

    tau_i = s for i in M, else t;   x_tau = (1 - tau) x0 + tau e, token by token
    teacher: the EMA at min(t, s) for all tokens, same x0, e and labels
    L = L_gen(tau) + gamma * mean over all tokens of (1 - cos(j(h_l), stop_gradient(h*_k)))

The paper's term is - cos, which differs by a constant. Of an example's times there are two, so its modulations are
computed twice and selected a token, where the released network computes them for every token.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax.diffusion.process import Process
from sra_jax.errors import UserError
from sra_jax.methods.distances import mean_distance
from sra_jax.methods.heads import Head, head_flops
from sra_jax.methods.method import Draws, Method, Seen, Term, View, check_pair, check_weight
from sra_jax.models.flops import Shape

HEAD = "self_flow_head"


@dataclasses.dataclass(frozen=True)
class SelfFlow(Method):
    """Which block learns from which, and how many tokens have the other time.

    Attributes:
      student_block: l, 0.3 of the depth in the paper, counted from 1.
      teacher_block: k >= l, 0.7 of the depth; the teacher runs blocks 1..k only.
      weight: gamma.
      share: R_M, the probability with which a token has the second time.
    """

    student_block: int = 4
    teacher_block: int = 8
    weight: float = 0.8
    share: float = 0.25

    name: ClassVar[str] = "self_flow"
    processes: ClassVar[tuple[str, ...]] = ("interpolant",)
    own_head: ClassVar[str] = HEAD
    foreign_head: ClassVar[str] = "projector"
    exclusive: ClassVar[str] = "the times of tokens and what the teacher sees"

    @property
    def student_taps(self) -> tuple[int, ...]:
        return (self.student_block,)

    @property
    def teacher_taps(self) -> tuple[int, ...]:
        return (self.teacher_block,)

    @property
    def groups(self) -> int:
        return 2

    def heads(self, shape: Shape) -> Mapping[str, Callable[[nnx.Rngs], nnx.Module]]:
        return {HEAD: lambda rngs: Head(shape, rngs=rngs)}

    def head_flops(self, shape: Shape) -> float:
        return head_flops(shape)

    def draw(self, key: jax.Array, given: Draws, process: Process, shape: Shape) -> dict[str, jax.Array]:
        """t (B,2): the times of the tokens outside of M and in M; groups (B,N): 1 in M; s (B,): the smaller time."""
        time_key, mask_key = jax.random.split(key)
        t = given["t"]
        uniform = jax.random.uniform(mask_key, (t.shape[0], shape.tokens))
        return self.arranged(t, process.sample_time(time_key, t.shape[0]), uniform)

    def arranged(self, t: jax.Array, second: jax.Array, uniform: jax.Array) -> dict[str, jax.Array]:
        """What `draw` returns, of the two times (B,) and of the numbers (B,N) that decide which tokens are in M."""
        masked = (uniform < self.share).astype(jnp.int32)
        return {"t": jnp.stack([t, second], axis=1), "groups": masked, "s": jnp.minimum(t, second)}

    def teacher_view(self, example: Draws, shape: Shape) -> View:
        del shape
        return View(example["s"], example["y"])

    def loss(self, seen: Seen) -> Term:
        """The mean over all tokens, masked or not."""
        h, target = seen.student[self.student_block], seen.teacher[self.teacher_block]
        projected = seen.head(HEAD, h)
        return Term(mean_distance("cosine", projected, target), h, projected, target)

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        del batch_size, microbatch
        hint = "the paper uses 0.3 and 0.7 of the depth: 8 and 20 for XL/2"
        check_pair(self.key, self.student_block, self.teacher_block, "teacher_block", shape.depth, hint)
        check_weight(f"{self.key}.weight", self.weight)
        if not 0 <= self.share <= 1:
            raise UserError(f"{self.key}.share={self.share} is out of range: 0 <= share <= 1; the paper uses 0.25")
