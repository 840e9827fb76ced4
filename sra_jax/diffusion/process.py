"""What the train step and the tools ask of a noise process; they never ask which one it is."""

from collections.abc import Callable
from typing import Protocol

import jax

Denoiser = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`denoise(x, t, y) -> prediction`: x (B,H,W,C), t (B,) in the process's time, y (B,) labels; (B,H,W,C_out)."""


class Process(Protocol):
    """A forward noise process with its training loss and its samplers. Pure functions; instances are hashable."""

    @property
    def time_extent(self) -> float:
        """The noisiest time, to which fractions of the time range refer: 1 for a flow, the number of steps for DDPM."""

    teacher_time_min: float
    """The least noisy time that a teacher is shown; a student below it may meet a noisier teacher."""

    def output_channels(self, channels: int) -> int:
        """Channels that the network predicts for latents of `channels` channels."""

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        """Training times (batch,), float32 or int32."""

    def teacher_time(self, key: jax.Array, t: jax.Array, interval: tuple[float, float]) -> jax.Array:
        """A less noisy time s <= t for each t, of any shape: t minus a uniform draw from `interval`, a fraction of
        the whole time range, truncated at the least noisy time."""

    def signal_to_noise(self, t: jax.Array) -> jax.Array:
        """alpha^2 / sigma^2 of x_t = alpha x0 + sigma noise at times of any shape; infinite without noise."""

    def perturb(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """x_t (B,H,W,C) of clean latents x0 and standard normal noise; flows also take times (B,H,W)."""

    def loss(self, prediction: jax.Array, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """The denoising loss of each example (B,) float32, from the network's prediction (B,H,W,C_out) at x_t."""


class Flow(Process, Protocol):
    """A process whose network predicts a velocity."""

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """The velocity of x_t (B,H,W,C) at times (B,) or (B,H,W)."""

    def mean_rate(self) -> float:
        """E[alpha'_t] over the training times: times the mean latent, the mean velocity."""
