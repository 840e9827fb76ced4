"""Where methods are looked up by name and added up: a new one is its file and a line here."""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax.diffusion.process import Process
from sra_jax.errors import UserError
from sra_jax.methods.delta_fm import DeltaFM
from sra_jax.methods.dispersive import Dispersive
from sra_jax.methods.dts_as import DualTimes
from sra_jax.methods.groups import token_times
from sra_jax.methods.layersync import LayerSync
from sra_jax.methods.method import Draws, Method, View
from sra_jax.methods.repa import REPA, ConvREPA
from sra_jax.methods.self_flow import SelfFlow
from sra_jax.methods.sra import Alignment
from sra_jax.methods.sra2 import SRA2
from sra_jax.models.flops import Shape
from sra_jax.models.mmdit import MMDiTConfig

NONE = "none"
"""The name of the baseline: the denoising loss alone."""

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (SelfFlow, DualTimes, Alignment, LayerSync, Dispersive, DeltaFM, SRA2, REPA, ConvREPA)
}
"""In the order in which they draw: those that give tokens their times come first."""


def names_of(text: str) -> tuple[str, ...]:
    """The methods of a sum such as "sra+dispersive", in the registry's order; none for the baseline.

    Raises:
      UserError: an unknown or repeated name, or the baseline beside a method.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name != NONE and name not in METHODS:
            raise UserError(
                f"method.name={text!r}: {name!r} is unknown; allowed: {NONE}, {', '.join(METHODS)}, and sums such as "
                "sra+dispersive"
            )
    if len(names) > 1 and (NONE in names or len(set(names)) < len(names)):
        raise UserError(f"method.name={text!r}: a sum names each method once, and {NONE!r} stands alone")
    return tuple(name for name in METHODS if name in names)


def defaults(name: str) -> dict[str, Any]:
    """The keys of a method with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(METHODS[name])}


@dataclasses.dataclass(frozen=True)
class Methods:
    """A sum of methods, asked as one by the train step: one pass of the student, at most one of a teacher.

    Attributes:
      parts: the methods; empty for the baseline.
    """

    parts: tuple[Method, ...] = ()

    def __iter__(self) -> Iterator[Method]:
        return iter(self.parts)

    @property
    def name(self) -> str:
        """As users write it."""
        return "+".join(part.name for part in self.parts) or NONE

    @property
    def student_taps(self) -> tuple[int, ...]:
        """Blocks that any of them taps, ascending."""
        return tuple(sorted({tap for part in self.parts for tap in part.student_taps}))

    @property
    def teaching(self) -> Method | None:
        """The one that asks for a teacher."""
        return next((part for part in self.parts if part.teacher_taps), None)

    @property
    def teacher_taps(self) -> tuple[int, ...]:
        """Blocks of the teacher that are tapped, ascending; empty: no teacher."""
        return tuple(sorted(set(self.teaching.teacher_taps))) if self.teaching else ()

    @property
    def groups(self) -> int:
        """Times of an example of the student."""
        return max((part.groups for part in self.parts), default=1)

    @property
    def separates(self) -> bool:
        """Whether the student's tokens attend within their group only."""
        return any(part.separates for part in self.parts)

    def sizes(self, shape: Shape) -> tuple[int, ...] | None:
        """Where the student's tokens attend within groups: the sizes of these, if every example has the same."""
        return next((part.sizes(shape) for part in self.parts if part.separates), None)

    def together(self, batch_size: int) -> int:
        """How many consecutive examples a microbatch must not part."""
        return max((part.together(batch_size) for part in self.parts), default=1)

    @property
    def feature_widths(self) -> tuple[int, ...]:
        """Channels of the stored features that one of them compares with; empty: none are needed."""
        return next((part.feature_widths for part in self.parts if part.feature_widths), ())

    @property
    def correcting(self) -> Method | None:
        """The one whose shift of the velocity is taken back while sampling."""
        return next((part for part in self.parts if part.latent_means), None)

    def heads(self, shape: Shape) -> dict[str, Callable[[nnx.Rngs], nnx.Module]]:
        """Makers of all heads, by the names of their parameters."""
        return {name: make for part in self.parts for name, make in part.heads(shape).items()}

    def head_flops(self, shape: Shape) -> float:
        """Operations of all heads' forward pass for one example."""
        return sum(part.head_flops(shape) for part in self.parts)

    def draw(self, key: jax.Array, given: Draws, process: Process, shape: Shape) -> dict[str, jax.Array]:
        """What all of them draw or replace, beside what is given. Each draws the same alone and in a sum."""
        drawn: dict[str, jax.Array] = {}
        for part in self.parts:
            own = key if isinstance(part, Alignment) else jax.random.fold_in(key, zlib.crc32(part.name.encode()))
            drawn |= part.draw(own, {**given, **drawn}, process, shape)
        return drawn

    def student_view(self, example: Draws, shape: Shape) -> View:
        """What the student is shown."""
        return View(example["t"], example["y"], example.get("groups"), self.separates, self.sizes(shape))

    def weights_at(self, step: jax.Array) -> dict[str, jax.Array]:
        """The weight of each term at a step."""
        return {part.name: part.weight_at(step) for part in self.parts}

    def check(self, process: str, shape: Shape, batch_size: int, microbatch: int) -> None:
        """Raises `UserError` where one of them cannot work, or two not together.

        Args:
          process: name of the noise process.
          shape: the network's.
          batch_size: examples of the global batch.
          microbatch: examples of one of its parts.
        """
        for part in self.parts:
            if process not in part.processes:
                raise UserError(
                    f"method.name={self.name!r}: {part.name} is defined for process.name="
                    f"{' or '.join(map(repr, part.processes))} only, not for {process!r}; use a sit_* recipe"
                )
            if isinstance(shape, MMDiTConfig) and (part.groups > 1 or part.separates):
                raise UserError(
                    f"method.name={self.name!r}: {part.name} gives tokens of an image times of their own, and "
                    "model.name=mmdit has one time an image; take another method, or a recipe with labels"
                )
            part.check(shape, batch_size, microbatch)
        for one, other in itertools.combinations(self.parts, 2):
            if one.exclusive and other.exclusive and (bool(one.teacher_taps) == bool(other.teacher_taps)):
                raise UserError(
                    f"method.name={self.name!r}: {one.name} decides {one.exclusive}, and {other.name} "
                    f"{other.exclusive}; take one of the two"
                )


def build(name: str, keys: Mapping[str, Mapping[str, Any]]) -> Methods:
    """The methods of a sum with their keys.

    Args:
      name: as `names_of` reads it.
      keys: of each method that is named, its keys.
    """
    return Methods(tuple(METHODS[part](**keys[part]) for part in names_of(name)))


def noisier_teachers(
    methods: Methods, process: Process, shape: Shape, key: jax.Array, count: int = 256
) -> jax.Array:
    """Tokens whose teacher is noisier than their student, by signal-to-noise ratio: none, if all is right.

    Time may run either way, and a method that is written for the one shows its teacher the noisier input under the
    other.

    Args:
      methods: with a teacher.
      process: gives the ratio.
      shape: the network's.
      key: of the draws.
      count: examples to draw.

    Returns:
      (count, N) bool.

    Raises:
      ValueError: the methods have no teacher.
    """
    teaching = methods.teaching
    if teaching is None:
        raise ValueError(f"{methods.name} has no teacher")
    drawn = {
        "x0": jnp.zeros((count, shape.input_size, shape.input_size, shape.channels)),
        "e": jnp.zeros((count, shape.input_size, shape.input_size, shape.channels)),
        "label": jnp.zeros(count, jnp.int32), "y": jnp.zeros(count, jnp.int32),
        "t": process.sample_time(jax.random.fold_in(key, 0), count),
    }  # fmt: skip
    drawn |= methods.draw(jax.random.fold_in(key, 1), drawn, process, shape)
    tokens = (count, shape.tokens)
    views = (methods.student_view(drawn, shape), teaching.teacher_view(drawn, shape))

    student, teacher = (
        jnp.broadcast_to(view.t[:, None] if view.groups is None else token_times(view.t, view.groups), tokens)
        for view in views
    )
    noisier = process.signal_to_noise(teacher) < process.signal_to_noise(student) * (1 - 1e-6)
    return noisier & (student >= process.teacher_time_min)
