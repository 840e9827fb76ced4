"""EMAs that are tracked beside the teacher's (`ema.profiles`): constant decays, and power functions of the step.

A power-function profile weighs the parameters of step s at step t by (gamma + 1) s^gamma / t^(gamma + 1) (Karras et
al., 2024, arXiv 2312.02696, section 3): it is as long as a fixed share of the run so far. That share is its name:
sigma_rel, the weights' standard deviation over t,

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax import values
from sra_jax.errors import UserError

TEACHER = "teacher"
"""The name of the EMA that the teacher is."""

POWER = "power:"
LONGEST = 0.28
"""sigma_rel of nearly all steps alike (gamma = 0 is 0.2887)."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """One EMA.

    Attributes:
      name: as users write it.
      decay: share of the old average that a step keeps; None for a power function.
      width: sigma_rel of a power function, in (0, 0.28]; None for a constant decay.
    """

    name: str
    decay: float | None = None
    width: float | None = None

    @property
    def gamma(self) -> float:
        """The exponent of a power function: the positive root of its cubic, by sigma_rel.

        Raises:
          ValueError: of a constant decay, which has none.
        """
        if self.width is None:
            raise ValueError(f"{self.name} is no power function")
        inverse = self.width**-2
        return float(max(np.roots([1, 7, 16 - inverse, 12 - inverse]).real))

    def rate_at(self, step: jax.Array) -> jax.Array:
        """The share of the new parameters in the update that follows `step` others, float32.

        1 - decay, or 1 - (1 - 1/t)^(gamma + 1) with t = step + 1: the first update of a power function takes all.
        """
        if self.decay is not None:
            return jnp.float32(1 - self.decay)
        t = step.astype(jnp.float32) + 1
        return -jnp.expm1((self.gamma + 1) * jnp.log1p(-1 / t))


def profile(key: str, text: str) -> Profile:
    """The profile of a name: `0.9999`, or `power:0.05`.

    Raises:
      UserError: it is none.
    """
    text = text.strip()
    if text.startswith(POWER):
        width = values.number(f"{key}: {POWER}", text.removeprefix(POWER), 0.001, LONGEST)
        return Profile(f"{POWER}{width!r}", width=width)
    if not values.REAL.fullmatch(text):
        raise UserError(
            f"{key}={values.shown(text)} is no EMA: a decay such as 0.9999, or power:S with the relative width S of a "
            "power function, such as power:0.05"
        )
    decay = values.number(key, text, 0, 1, open_high=True)
    return Profile(repr(decay), decay=decay)


def profiles(key: str, text: str) -> tuple[Profile, ...]:
    """Those of `0.999,0.9999` or `power:0.05,power:0.1`; none of an empty text.

    Raises:
      UserError: one is none, or named twice.
    """
    found = tuple(profile(key, part) for part in text.split(",")) if text.strip() else ()
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise UserError(f"{key}={values.shown(text)} names one EMA twice")
    return found
