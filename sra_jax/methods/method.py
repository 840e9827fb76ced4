"""What the train step asks of a method, whichever it is, and what methods are given.

A method adds a term to the denoising loss. It may tap the student's tokens after some blocks, ask for one pass of a
teacher (the EMA, constant) on a less noisy view, put heads on tokens, and draw numbers of its own. It knows neither
data nor devices, and never how many microbatches or devices share the work: what it draws is drawn for the whole global
batch at once.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax import values
from sra_jax.diffusion.process import Process
from sra_jax.errors import UserError
from sra_jax.methods.correction import Correction, LatentMeans
from sra_jax.models.flops import Shape

Draws = Mapping[str, jax.Array]
"""Arrays of a batch by name, their leading axis the examples:

x0 (B,H,W,C) clean latents; e (B,H,W,C) the noise; label (B,) true labels; y (B,) the student's labels, after dropout;
t (B,), or (B,G) with groups (B,N): the student's times; what the methods drew; further arrays of the data set."""


@dataclasses.dataclass(frozen=True)
class View:
    """What a network is shown of a batch beside the latents and the noise.

    Attributes:
      t: times (B,), or (B,G) with `groups`.
      y: labels (B,).
      groups: the group of each token (B,N), or None.
      separate: whether tokens attend within their group only.
      sizes: with `separate`: tokens of each group, where every example has the same; None: unknown.
    """

    t: jax.Array
    y: jax.Array
    groups: jax.Array | None = None
    separate: bool = False
    sizes: tuple[int, ...] | None = None

    @property
    def segments(self) -> jax.Array | None:
        """As the networks take them."""
        return self.groups if self.separate else None


@dataclasses.dataclass(frozen=True)
class Seen:
    """One microbatch as the networks saw it: all that a method's loss may depend on.

    Attributes:
      example: its draws.
      student: tokens (B,N,D) float32 of the student after each block that is tapped.
      teacher: the same of the teacher; empty where none is run.
      prediction: the student's (B,H,W,C_out).
      position_times: the student's times (B,), or (B,H,W) where they differ within an example.
      process: the noise process.
      shape: the network's.
      head: `head(name, tokens)` puts tokens through one of the method's heads.
    """

    example: Draws
    student: Mapping[int, jax.Array]
    teacher: Mapping[int, jax.Array]
    prediction: jax.Array
    position_times: jax.Array
    process: Process
    shape: Shape
    head: Callable[[str, jax.Array], jax.Array]

    @property
    def denoising(self) -> jax.Array:
        """The denoising loss of each example, (B,) float32."""
        return self.process.loss(self.prediction, self.example["x0"], self.example["e"], self.position_times)


@dataclasses.dataclass(frozen=True)
class Term:
    """A method's part of the loss.

    Attributes:
      loss: scalar, before its weight.
      features: the student's tokens that the method works on (B,N,D), before any head; for the log.
      compared: what is compared with the target (...,K); for the log.
      target: with what (...,K); for the log.
    """

    loss: jax.Array
    features: jax.Array | None = None
    compared: jax.Array | None = None
    target: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """The base of all methods: one that taps nothing, draws nothing and knows no teacher.

    The fields of a subclass are its keys in the config, with their defaults.
    """

    name: ClassVar[str] = ""
    """As users write it; also the group of its keys, `method.<name>`."""
    section: ClassVar[str] = ""
    """The section of the config that holds its keys, where it is not `method.<name>`."""
    log: ClassVar[Mapping[str, str]] = {}
    """Names of its metrics that are not `<name>/<metric>`."""
    processes: ClassVar[tuple[str, ...]] = ("interpolant", "gaussian")
    """Names of the noise processes for which it is defined."""
    own_head: ClassVar[str] = ""
    """Name of its head's parameters, where that is `heads.Head` and its authors' checkpoints have it."""
    foreign_head: ClassVar[str] = ""
    """How the names of that head's tensors begin in its authors' checkpoints."""
    foreign_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments that its authors' checkpoints carry, and no other method's."""
    exclusive: ClassVar[str] = ""
    """What it decides alone, so that two methods which do cannot be summed, in words for a message."""

    @property
    def against_growth(self) -> str:
        """What helps where its features and its loss grow without end."""
        return f"lower {self.key}.weight or optimizer.learning_rate, and start from a checkpoint of before"

    @property
    def key(self) -> str:
        """The section of its keys."""
        return self.section or f"method.{self.name}"

    @property
    def student_taps(self) -> tuple[int, ...]:
        """Blocks of the student whose tokens it sees, counted from 1."""
        return ()

    @property
    def teacher_taps(self) -> tuple[int, ...]:
        """Blocks of the teacher whose tokens it sees; the teacher runs up to the last of them. Empty: no teacher."""
        return ()

    @property
    def groups(self) -> int:
        """Times of an example of the student."""
        return 1

    def teacher_groups(self, shape: Shape) -> int | tuple[int, ...]:
        """Times of an example of the teacher; or the sizes of its groups, where tokens attend within their own."""
        del shape
        return 1

    @property
    def separates(self) -> bool:
        """Whether the student's tokens attend within their group only."""
        return False

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Channels of the stored features that it compares with, one number an encoder; empty: it needs none."""
        return ()

    def advice(self, stable_diffusion: bool) -> str | None:
        """A word to the user about the latents: whether they are those of Stable Diffusion's autoencoder is given."""
        del stable_diffusion
        return None

    def sizes(self, shape: Shape) -> tuple[int, ...] | None:
        """Where it separates: the tokens of each group, if every example has the same numbers."""
        del shape
        return None

    @property
    def latent_means(self) -> str:
        """The means of the training set's latents that `correction` needs: "all", "classes", or "" for none."""
        return ""

    def shift(self, label_dropout: float) -> float:
        """How far its loss moves the minimum of the denoising loss away from it: a weight in [0, 1), 0 for not at all.

        Raises:
          UserError: so far that there is no minimum.
        """
        del label_dropout
        return 0.0

    def correction(self, means: LatentMeans, process: Process, num_classes: int, label_dropout: float) -> Correction:
        """What takes the shift back while sampling; asked only of a method with `latent_means`.

        Args:
          means: those that it asks for.
          process: of the noise.
          num_classes: the null label.
          label_dropout: share of labels that the student did not get.
        """
        raise NotImplementedError

    def together(self, batch_size: int) -> int:
        """How many consecutive examples of the global batch its loss compares, and a microbatch must not part."""
        del batch_size
        return 1

    def heads(self, shape: Shape) -> Mapping[str, Callable[[nnx.Rngs], nnx.Module]]:
        """Makers of its heads; their parameters lie in the tree of parameters under these names."""
        del shape
        return {}

    def head_flops(self, shape: Shape) -> float:
        """Operations of the heads' forward pass for one example."""
        del shape
        return 0.0

    def draw(self, key: jax.Array, given: Draws, process: Process, shape: Shape) -> dict[str, jax.Array]:
        """What it draws, or replaces, for the whole global batch.

        Args:
          key: its own.
          given: what is drawn already; also the arrays of the data set.
          process: of the noise.
          shape: the network's.
        """
        del key, given, process, shape
        return {}

    def teacher_view(self, example: Draws, shape: Shape) -> View:
        """What the teacher is shown; asked only of a method with `teacher_taps`."""
        raise NotImplementedError

    def weight_at(self, step: jax.Array) -> jax.Array:
        """The weight of its loss at a step, counted from 0; float32 scalar."""
        del step
        return jnp.float32(self.weight)  # type: ignore[attr-defined]  # every method has the key

    def loss(self, seen: Seen) -> Term:
        """Its loss of a microbatch."""
        raise NotImplementedError

    def check(self, shape: Shape, batch_size: int, microbatch: int) -> None:
        """Raises `UserError` where its keys cannot work.

        Args:
          shape: the network's.
          batch_size: examples of the global batch.
          microbatch: examples of one of its parts.
        """


def check_choice(key: str, value: Any, allowed: Collection[str]) -> None:
    """Raises `UserError` where a key's value is none of the allowed ones."""
    if value not in allowed:
        raise UserError(f"{key}={value!r} is unknown; allowed: {', '.join(allowed)}")


def check_weight(key: str, value: float) -> None:
    """Raises `UserError` where a weight is negative or not finite."""
    if not 0 <= value < float("inf"):
        raise UserError(f"{key}={value} must be a number of at least 0; --config.method.name=none trains the baseline")


def check_block(key: str, block: int, depth: int, hint: str) -> None:
    """Raises `UserError` where there is no such block."""
    if not 1 <= block <= depth:
        raise UserError(f"{key}={block} is not a block: allowed 1..{depth} (model.depth); {hint}")


def check_pair(section: str, student: int, later: int, name: str, depth: int, hint: str) -> None:
    """Raises `UserError` unless the student's block and the one that it learns from are blocks in this order."""
    check_block(f"{section}.student_block", student, depth, hint)
    if later > depth:
        raise UserError(f"{section}.{name}={later} is beyond model.depth={depth}: allowed {student}..{depth}; {hint}")
    if later < student:
        raise UserError(
            f"{section}.{name}={later} is before {section}.student_block={student}: the student learns from the same "
            f"or a later block; raise {name} or lower student_block"
        )


def teacher_interval(key: str, value: Any) -> tuple[float, float]:
    """The bounds of the teacher's offset, fractions of the time range; one number fixes it.

    Raises:
      UserError: something else, or no part of the time range.
    """
    advice = "they are fractions of the process's time range, and the paper uses 0,0.2"
    return values.interval(key, value, fixed=True, advice=advice)
