"""Analytic floating-point operations of the networks: multiplications and additions of matrix products, 2 a pair.

Norms, activations, softmax and losses are left out, as in the field's model FLOPs. So is what a remat policy computes
again: it is work of the machine, not of the model.
"""

import dataclasses
from typing import Any

from sra_jax.models.mmdit import MMDiTConfig
from sra_jax.models.transformer import TIME_FREQUENCIES, TransformerConfig

Shape = TransformerConfig | MMDiTConfig


Groups = int | tuple[int, ...]
"""How many times the tokens of an example have; or the sizes of the groups, where tokens attend within their own."""


def block_flops(shape: TransformerConfig, groups: Groups = 1) -> float:
    """Forward pass of one block for one example."""
    tokens, width = shape.tokens, shape.width
    pairs = tokens**2 if isinstance(groups, int) else sum(size**2 for size in groups)
    hidden = int(width * shape.mlp_ratio)
    projections = 2 * tokens * width * (3 * width + width)  # query, key, value; output
    attention = 2 * 2 * pairs * width  # scores; weighted sum
    mlp = 2 * 2 * tokens * width * hidden
    modulation = _times(groups) * 2 * width * 6 * width
    return projections + attention + mlp + modulation


def _times(groups: Groups) -> int:
    return groups if isinstance(groups, int) else len(groups)


def joint_block_flops(shape: MMDiTConfig, *, last: bool = False) -> float:
    """Forward pass of one joint block for one example; the last one's text ends with its queries, keys and values."""
    text, image, width = shape.context_length, shape.tokens, shape.width
    hidden = int(width * shape.mlp_ratio)
    entrance = 2 * width * 3 * width  # of a token: query, key, value
    rest = 2 * width * width + 2 * 2 * width * hidden  # of a token: output, MLP
    attention = 2 * 2 * (text + image) ** 2 * width
    modulation = 2 * width * (2 + 6 if last else 6 + 6) * width
    return (text + image) * entrance + (image if last else text + image) * rest + attention + modulation


def input_flops(shape: Shape, groups: Groups = 1) -> float:
    """The layers whose input is data, so that no gradient goes below them: of patches, the time and the caption."""
    of_time = _times(groups) * 2 * TIME_FREQUENCIES * shape.width
    patches = 2 * shape.tokens * shape.patch**2 * shape.channels * shape.width + of_time
    if isinstance(shape, TransformerConfig):
        return patches
    return patches + 2 * (shape.context_length + shape.pooled) * shape.context_width * shape.width


def forward_flops(shape: Shape, stop: int | None = None, groups: Groups = 1) -> float:
    """Forward pass for one example: all of it, or the embeddings and blocks 1..stop."""
    width, blocks = shape.width, shape.depth if stop is None else stop
    result = input_flops(shape, groups) + _times(groups) * 2 * width * width
    if isinstance(shape, TransformerConfig):
        result += blocks * block_flops(shape, groups)
    else:
        result += 2 * shape.pooled * width * width + min(blocks, shape.depth - 1) * joint_block_flops(shape)
        result += joint_block_flops(shape, last=True) if blocks == shape.depth else 0.0
    if stop is None:
        result += _times(groups) * 2 * width * 2 * width
        result += 2 * shape.tokens * width * shape.patch**2 * shape.output_channels
    return result


def matrix_parameters(shape: Shape) -> float:
    """Weights of all linear layers, nearly all parameters: an example of one token takes each of them once."""
    single: dict[str, Any] = {"input_size": shape.patch}
    if isinstance(shape, MMDiTConfig):
        single["context_length"] = 1
    return forward_flops(dataclasses.replace(shape, **single)) / 2


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """One training step of a batch.

    Attributes:
      student: forward and backward pass, the backward pass being twice the forward pass, but for `input_flops`.
      head: the methods' heads, forward and backward.
      teacher: forward pass of blocks 1..n.
    """

    student: float
    head: float
    teacher: float

    @property
    def total(self) -> float:
        """All three."""
        return self.student + self.head + self.teacher


def train_step_flops(
    shape: Shape, batch_size: int, teacher_blocks: int | None = None, head: float = 0.0, groups: Groups = 1,
    teacher_groups: Groups = 1,
) -> StepFlops:
    """One training step.

    Args:
      shape: the network's.
      batch_size: examples.
      teacher_blocks: how many blocks the teacher runs; None: there is no teacher.
      head: forward pass of the method's heads for one example.
      groups, teacher_groups: times of an example, the student's and the teacher's.
    """
    student = 3 * forward_flops(shape, groups=groups) - input_flops(shape, groups)
    teacher = 0.0 if teacher_blocks is None else forward_flops(shape, teacher_blocks, teacher_groups)
    return StepFlops(batch_size * student, batch_size * 3 * head, batch_size * teacher)
