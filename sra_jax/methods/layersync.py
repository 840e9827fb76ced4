"""LayerSync (Haghighi et al., ICLR 2026, arXiv 2510.12581): a deeper block of the same pass is the target.

    L = L_gen - lambda * mean over tokens of cos(h_k, stop_gradient(h_k')),  k' > k

No teacher and no head: the method costs nothing. Its term here is 1 - cos, which differs by a constant. The official
code's mode of several pairs keeps the last pair only, and its default blocks are equal, where the term has no gradient;
neither is offered.
"""

import dataclasses
from typing import ClassVar

from sra_jax.errors import UserError
from sra_jax.methods.distances import mean_distance
from sra_jax.methods.method import Method, Seen, Term, check_pair, check_weight
from sra_jax.models.flops import Shape


@dataclasses.dataclass(frozen=True)
class LayerSync(Method):
    """Which block learns from which.

    Attributes:
      student_block: k, the block that learns, counted from 1.
      target_block: k' > k, the block of the same pass that it learns from; best not among the last fifth.
      weight: lambda.
    """

    student_block: int = 4
    target_block: int = 8
    weight: float = 0.2

    name: ClassVar[str] = "layersync"

    @property
    def student_taps(self) -> tuple[int, ...]:
        return (self.student_block, self.target_block)

    def loss(self, seen: Seen) -> Term:
        """1 - cos over features, the mean over tokens; no gradient reaches the deeper block."""
        h, target = seen.student[self.student_block], seen.student[self.target_block]
        return Term(mean_distance("cosine", h, target), h, h, target)

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        del batch_size, microbatch
        hint = "the authors use 8 and 18 for L/2, 8 and 16 for XL/2"
        check_pair(self.key, self.student_block, self.target_block, "target_block", shape.depth, hint)
        if self.student_block == self.target_block:
            raise UserError(
                f"{self.key}.target_block={self.target_block} is the student's own block, where the term has no "
                f"gradient: name a later one; {hint}"
            )
        check_weight(f"{self.key}.weight", self.weight)
