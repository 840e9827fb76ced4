"""What the tools that sample are told on the command line."""

from collections.abc import Sequence
from typing import Any

from absl import flags

from sra_jax import cli, values
from sra_jax import config as config_lib
from sra_jax.errors import UserError

SCHEMES = ("balanced", "uniform")


def define_sampling_flags() -> None:
    """Flags of every tool that samples; each replaces the run's own value."""
    flags.DEFINE_string("sampler", None, "Sampler of the run's family, such as sde, ode or heun; default: the run's.")
    flags.DEFINE_string("sampling_steps", None, "Steps of the sampler; default: the run's.")
    cli.number_flag("guidance_scale", None, "1 turns guidance off; default: the run's.", 1.0, 1000.0)
    cli.number_flag("eta", None, "DDIM's noise: 0 is deterministic, 1 as DDPM; default: the run's.", 0.0, 1.0)
    flags.DEFINE_string(
        "guidance_interval", None, "Guide where low <= t <= high, fractions of the time range; default: the run's."
    )
    cli.whole_flag("guidance_channels", None, "Guide the first so many channels; 0: all; default: the run's.", 0, 4096)


def sampling_overrides() -> dict[str, Any]:
    """What the sampling flags replace in the config's `sampling` section.

    Raises:
      UserError: a value that cannot be read.
    """
    given = flags.FLAGS
    overrides: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("sampler", "guidance_scale", "guidance_channels", "eta")
        if getattr(given, name) is not None
    }
    if given.sampling_steps is not None:
        steps = given.sampling_steps
        overrides["steps"] = values.whole("--sampling_steps", steps) if values.INTEGER.fullmatch(steps) else steps
    if given.guidance_interval is not None:
        overrides["guidance_interval"] = config_lib.guidance_interval("--guidance_interval", given.guidance_interval)
    return overrides


def parse_labels(text: str) -> str | Sequence[int]:
    """The --labels flag: a scheme's name, or class numbers with commas between.

    Raises:
      UserError: neither.
    """
    if text in SCHEMES:
        return text
    try:
        return [values.whole("--labels", part) for part in text.split(",")]
    except UserError as error:
        raise UserError(
            f"--labels={values.shown(text)} must be {', '.join(SCHEMES)}, or class numbers such as 3 or 1,5,7"
        ) from error
