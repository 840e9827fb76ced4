"""Samplers of `GaussianDiffusion`: from noise to latents, on any part of the steps that the network was trained on.

Both are pure functions that may be jitted as a whole; steps, guidance and options shape the program and stay on the
host. The state is float32.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.diffusion.gaussian import Coefficients, GaussianDiffusion, at, predicted_x0, respaced_timesteps
from sra_jax.diffusion.guidance import Guidance, loop
from sra_jax.diffusion.process import Denoiser
from sra_jax.errors import UserError


def ddpm(
    process: GaussianDiffusion,
    denoise: Denoiser,
    noise: jax.Array,
    labels: jax.Array,
    step_noise: Callable[[jax.Array], jax.Array],
    *,
    steps: int | str | Sequence[int],
    guidance: Guidance,
) -> jax.Array:
    """Ancestral sampling with the process's variance: DDPM algorithm 2; DiT is evaluated so, with 250 steps.

    Args:
      process: the process that the network was trained on.
      denoise: the network, called at the process's own timesteps (int32).
      noise: the start x_T, standard normal (N,H,W,C).
      labels: (N,) int32.
      step_noise: standard normals (N,H,W,C) of step i, a traced int32 counted from the noisiest.
      steps: what part of the timesteps is visited: see `sra_jax.diffusion.gaussian.respaced_timesteps`.
      guidance: `low` and `high` in the process's timesteps. All C noise channels are guided unless `channels` says
        fewer (3 is DiT's published form); a learned variance is always the conditional branch's.

    Returns:
      Latents (N,H,W,C) float32.

    Raises:
      UserError: steps that the process does not have, or more guided channels than the latents have.
    """

    def move(tables: Coefficients, x: jax.Array, position: jax.Array, prediction: jax.Array, i: jax.Array) -> jax.Array:
        mean, log_variance, _ = process.reverse_step(tables, prediction, x, position)
        not_last = (position > 0)[:, None, None, None]
        return mean + not_last * jnp.exp(log_variance / 2) * step_noise(i)

    return _descend(process, denoise, noise, labels, move, steps, guidance)


def ddim(
    process: GaussianDiffusion,
    denoise: Denoiser,
    noise: jax.Array,
    labels: jax.Array,
    step_noise: Callable[[jax.Array], jax.Array],
    *,
    steps: int | str | Sequence[int],
    guidance: Guidance,
    eta: float = 0.0,
) -> jax.Array:
    """DDIM (Song et al., 2020, arXiv 2010.02502, equations 12 and 16). A learned variance is ignored.

    Args:
      eta: share of the posterior's standard deviation that each step adds as noise, 0 .. 1: 0 is deterministic and
        `step_noise` is not called; 1 is ancestral sampling with `fixed_small` variance.
      The others: as for `ddpm`.

    Returns:
      Latents (N,H,W,C) float32.

    Raises:
      UserError: as for `ddpm`, or eta outside of [0, 1].
    """
    _check_eta(eta)

    def move(tables: Coefficients, x: jax.Array, position: jax.Array, prediction: jax.Array, i: jax.Array) -> jax.Array:
        predicted_noise, _ = process.split(prediction, x.shape[-1])
        x0 = predicted_x0(tables, predicted_noise, x, position)
        variance = eta**2 * tables.posterior_variance
        direction = np.sqrt(1 - tables.alphas_cumprod_prev - variance)
        x = at(np.sqrt(tables.alphas_cumprod_prev), position) * x0 + at(direction, position) * predicted_noise
        return x + at(np.sqrt(variance), position) * step_noise(i) if eta > 0 else x

    return _descend(process, denoise, noise, labels, move, steps, guidance)


def check_ddpm(process: GaussianDiffusion, sampling: Any) -> None:
    """Raises `UserError` where `ddpm` cannot run with `sampling.steps`."""
    respaced_timesteps(process.num_steps, sampling.steps)


def check_ddim(process: GaussianDiffusion, sampling: Any) -> None:
    """Raises `UserError` where `ddim` cannot run with `sampling.steps` and `sampling.eta`."""
    check_ddpm(process, sampling)
    _check_eta(sampling.eta)


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise UserError(f"sampling.eta={eta} is out of range: 0 (deterministic) <= eta <= 1 (as noisy as DDPM)")


def _descend(
    process: GaussianDiffusion,
    denoise: Denoiser,
    noise: jax.Array,
    labels: jax.Array,
    move: Callable[[Coefficients, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
    steps: int | str | Sequence[int],
    guidance: Guidance,
) -> jax.Array:
    """Visit the kept timesteps from the noisiest on; `move` makes x_{i-1} of x_i and the network's prediction there."""
    tables = process.respaced(steps)
    channels = noise.shape[-1]
    if guidance.channels is not None and not 1 <= guidance.channels <= channels:
        raise UserError(
            f"guidance.channels={guidance.channels} is impossible for latents of {channels} channels; allowed: "
            f"1 .. {channels}, or None for all; published DiT results guide 3 of 4"
        )
    if guidance.channels is None and process.output_channels(channels) > channels:
        guidance = dataclasses.replace(guidance, channels=channels)

    def step(x: jax.Array, i: jax.Array, denoiser: Denoiser) -> jax.Array:
        position = jnp.full(x.shape[:1], len(tables.timesteps) - 1 - i, jnp.int32)
        t = jnp.asarray(tables.timesteps)[position]
        return move(tables, x, position, denoiser(x, t, labels), i)

    return loop(step, noise.astype(jnp.float32), guidance.active(tables.timesteps[::-1]), denoise, guidance)
