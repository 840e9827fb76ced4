"""Where processes and samplers are looked up by name: a new one is its file and a line here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sra_jax.diffusion import flow_samplers, gaussian_samplers
from sra_jax.diffusion.gaussian import GaussianDiffusion
from sra_jax.diffusion.interpolant import Interpolant
from sra_jax.diffusion.process import Process
from sra_jax.errors import UserError

PROCESSES: dict[str, type[Any]] = {
    "interpolant": Interpolant,
    "gaussian": GaussianDiffusion,
}


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler and how the config speaks of it.

    Attributes:
      process: name of the process that it samples from.
      sample: `sample(process, denoise, noise, labels, step_noise, *, steps, guidance, **options) -> latents`.
      check: `check(process, sampling)` raises `UserError` where the config's sampling section cannot work.
      options: keys of the config's sampling section beyond the common ones, with their defaults; they are passed on.
    """

    process: str
    sample: Callable[..., jax.Array]
    check: Callable[[Any, Any], None]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _whole_steps(process: Process, sampling: Any) -> None:
    if not isinstance(sampling.steps, int) or sampling.steps < 1:
        raise UserError(f"sampling.steps={sampling.steps!r} must be a whole number, at least 1; the paper uses 250")


SAMPLERS: dict[str, Sampler] = {
    "ode": Sampler("interpolant", flow_samplers.euler, _whole_steps),
    "heun": Sampler("interpolant", flow_samplers.heun, _whole_steps),
    "sde": Sampler("interpolant", flow_samplers.euler_maruyama, _whole_steps),
    "ddpm": Sampler("gaussian", gaussian_samplers.ddpm, gaussian_samplers.check_ddpm),
    "ddim": Sampler("gaussian", gaussian_samplers.ddim, gaussian_samplers.check_ddim, {"eta": 0.0}),
}


def process_defaults(name: str) -> dict[str, Any]:
    """The fields of a process with their defaults: its keys in the config."""
    return {field.name: field.default for field in dataclasses.fields(PROCESSES[name])}
