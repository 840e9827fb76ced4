"""Samplers of the flow process: Euler and Heun for the probability flow, Euler-Maruyama for the SDE.

All share one signature, `sampler(process, denoise, noise, labels, step_noise, *, steps, guidance)`, and run from
noise at t = 1 to latents at t = 0 inside one compiled program, in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.diffusion.guidance import Guidance, loop
from sra_jax.diffusion.interpolant import Interpolant
from sra_jax.diffusion.process import Denoiser

LAST_STEP = 0.04
"""The time from which the SDE sampler takes its last, deterministic step (SiT, appendix)."""

StepNoise = Callable[[jax.Array], jax.Array]


def euler(
    process: Interpolant, denoise: Denoiser, noise: jax.Array, labels: jax.Array, step_noise: StepNoise, *, steps: int,
    guidance: Guidance,
) -> jax.Array:
    """Euler steps along the velocity on a uniform grid.

    Args:
      process: the flow.
      denoise: the network, `denoise(x, t, y) -> velocity`.
      noise: standard normals (B,H,W,C), the state at t = 1.
      labels: (B,) int.
      step_noise: unused; deterministic.
      steps: number of steps, at least 1; one evaluation each.
      guidance: scale and interval in t.

    Returns:
      Latents (B,H,W,C) float32.
    """
    del process, step_noise
    grid = np.linspace(1.0, 0.0, steps + 1)

    def step(x: jax.Array, i: jax.Array, denoise: Denoiser) -> jax.Array:
        t, _, dt = _at(grid, i)
        return x + dt * denoise(x, _batch(t, x), labels)

    return loop(step, noise.astype(jnp.float32), guidance.active(grid[:-1]), denoise, guidance)


def heun(
    process: Interpolant, denoise: Denoiser, noise: jax.Array, labels: jax.Array, step_noise: StepNoise, *, steps: int,
    guidance: Guidance,
) -> jax.Array:
    """Heun's second-order steps, the last one Euler's: 2 * steps - 1 evaluations. Arguments as `euler`.

    Both slopes of a step are guided or not by the time at which the step starts, as in the authors' code.
    """
    del process, step_noise
    grid = np.linspace(1.0, 0.0, steps + 1)
    active = guidance.active(grid[:-1])

    def step(x: jax.Array, i: jax.Array, denoise: Denoiser) -> jax.Array:
        t, t_next, dt = _at(grid, i)
        slope = denoise(x, _batch(t, x), labels)
        corrected = denoise(x + dt * slope, _batch(t_next, x), labels)
        return x + dt * (slope + corrected) / 2

    def last(x: jax.Array, i: jax.Array, denoise: Denoiser) -> jax.Array:
        t, _, dt = _at(grid, i + steps - 1)
        return x + dt * denoise(x, _batch(t, x), labels)

    x = loop(step, noise.astype(jnp.float32), active[:-1], denoise, guidance)
    return loop(last, x, active[-1:], denoise, guidance)


def euler_maruyama(
    process: Interpolant, denoise: Denoiser, noise: jax.Array, labels: jax.Array, step_noise: StepNoise, *, steps: int,
    guidance: Guidance,
) -> jax.Array:
    """Euler-Maruyama on the reverse SDE with diffusion w_t = 2t (the paper's sampler). Arguments as `euler`.

    steps - 1 stochastic steps on a uniform grid from 1 to 0.04, then one step to 0 along the drift alone.
    `step_noise(i)` gives standard normals (B,H,W,C) for step i = 0 .. steps - 2.
    """
    grid = np.append(np.linspace(1.0, LAST_STEP, steps), 0.0)
    active = guidance.active(grid[:-1])

    def drift(x: jax.Array, t: jax.Array, denoise: Denoiser) -> jax.Array:
        velocity = denoise(x, _batch(t, x), labels)
        return velocity - t * process.score(velocity, x, t)  # w_t / 2 = t

    def step(x: jax.Array, i: jax.Array, denoise: Denoiser) -> jax.Array:
        t, _, dt = _at(grid, i)
        return x + dt * drift(x, t, denoise) + jnp.sqrt(2 * t * -dt) * step_noise(i)

    def last(x: jax.Array, i: jax.Array, denoise: Denoiser) -> jax.Array:
        t, _, dt = _at(grid, i + steps - 1)
        return x + dt * drift(x, t, denoise)

    x = loop(step, noise.astype(jnp.float32), active[:-1], denoise, guidance)
    return loop(last, x, active[-1:], denoise, guidance)


def _at(grid: np.ndarray, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Start, end and (negative) length of step i, float32 scalars; the length is rounded once, from float64."""
    times = jnp.asarray(grid, jnp.float32)
    return times[i], times[i + 1], jnp.asarray(np.diff(grid), jnp.float32)[i]


def _batch(t: jax.Array, x: jax.Array) -> jax.Array:
    """One time for every example."""
    return jnp.full(x.shape[:1], t)
