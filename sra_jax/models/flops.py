"""Analytic floating-point operations of the networks: multiplications and additions of matrix products, 2 a pair.

Norms, activations, softmax and losses are left out, as in the field's model FLOPs. So is what a remat policy computes
again: it is work of the machine, not of the model.
"""

import dataclasses

from sra_jax.models.transformer import TIME_FREQUENCIES, TransformerConfig


def block_flops(shape: TransformerConfig) -> float:
    """Forward pass of one block for one example."""
    tokens, width = shape.tokens, shape.width
    hidden = int(width * shape.mlp_ratio)
    projections = 2 * tokens * width * (3 * width + width)  # query, key, value; output
    attention = 2 * 2 * tokens**2 * width  # scores; weighted sum
    mlp = 2 * 2 * tokens * width * hidden
    modulation = 2 * width * 6 * width
    return projections + attention + mlp + modulation


def input_flops(shape: TransformerConfig) -> float:
    """The layers whose input is data, so that no gradient goes below them: patch embedding, first layer of time."""
    return 2 * shape.tokens * shape.patch**2 * shape.channels * shape.width + 2 * TIME_FREQUENCIES * shape.width


def forward_flops(shape: TransformerConfig, stop: int | None = None) -> float:
    """Forward pass for one example: all of it, or the embeddings and blocks 1..stop."""
    width = shape.width
    embeddings = input_flops(shape) + 2 * width * width
    if stop is not None:
        return embeddings + stop * block_flops(shape)
    final = 2 * width * 2 * width + 2 * shape.tokens * width * shape.patch**2 * shape.output_channels
    return embeddings + shape.depth * block_flops(shape) + final


def head_flops(shape: TransformerConfig) -> float:
    """Forward pass of the projection head D -> 2D -> D for one example."""
    return 2 * 2 * shape.tokens * shape.width * 2 * shape.width


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """One training step of a batch.

    Attributes:
      student: forward and backward pass, the backward pass being twice the forward pass, but for `input_flops`.
      head: the projection head's, forward and backward.
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
    shape: TransformerConfig, batch_size: int, teacher_blocks: int | None = None, head: float = 0.0
) -> StepFlops:
    """One training step.

    Args:
      shape: the network's.
      batch_size: examples.
      teacher_blocks: how many blocks the teacher runs; None: there is no teacher.
      head: forward pass of the method's heads for one example.
    """
    student = 3 * forward_flops(shape) - input_flops(shape)
    teacher = 0.0 if teacher_blocks is None else forward_flops(shape, teacher_blocks)
    return StepFlops(batch_size * student, batch_size * 3 * head, batch_size * teacher)
