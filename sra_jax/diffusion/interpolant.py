"""Flow-based process of SiT (Ma et al., 2024): x_t = alpha_t x0 + sigma_t e, t in [0, 1], 0 = data, 1 = noise."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.errors import UserError

PATHS = ("linear", "cosine")
TIME_DISTRIBUTIONS = ("uniform", "logit_normal")


def expand(t: jax.Array, x: jax.Array) -> jax.Array:
    """t (B,) shaped to multiply x (B,...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """A path between data and noise with velocity prediction.

    Attributes:
      path: "linear" (alpha = 1 - t, sigma = t) or "cosine" (alpha = cos(pi t / 2), sigma = sin(pi t / 2)).
      time_distribution: how training times are drawn: "uniform" on [0, 1), or "logit_normal", the sigmoid of a
        standard normal (Esser et al., 2024).

    Raises:
      UserError: an unknown path or distribution.
    """

    path: str = "linear"
    time_distribution: str = "uniform"

    time_extent: ClassVar[float] = 1.0
    teacher_time_min: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise UserError(f"process.path={self.path!r} is unknown; allowed: {', '.join(PATHS)}")
        if self.time_distribution not in TIME_DISTRIBUTIONS:
            raise UserError(
                f"process.time_distribution={self.time_distribution!r} is unknown; allowed: "
                f"{', '.join(TIME_DISTRIBUTIONS)}"
            )

    def output_channels(self, channels: int) -> int:
        """The velocity has as many channels as the latents."""
        return channels

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        """Training times (batch,) float32 in [0, 1)."""
        if self.time_distribution == "uniform":
            return jax.random.uniform(key, (batch,))
        return jax.nn.sigmoid(jax.random.normal(key, (batch,)))

    def teacher_time(self, key: jax.Array, t: jax.Array, interval: tuple[float, float]) -> jax.Array:
        """s = max(t - k, 0) with k ~ U[low, high) for each t, of any shape; low = high fixes k."""
        low, high = interval
        offset = low + (high - low) * jax.random.uniform(key, t.shape)
        return jnp.maximum(t - offset, 0.0)

    def coefficients(self, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """alpha, sigma and their derivatives alpha', sigma' at t, each of t's shape."""
        if self.path == "linear":
            return 1 - t, t, -jnp.ones_like(t), jnp.ones_like(t)
        angle = t * (np.pi / 2)
        alpha, sigma = jnp.cos(angle), jnp.sin(angle)
        return alpha, sigma, -np.pi / 2 * sigma, np.pi / 2 * alpha

    def mean_rate(self) -> float:
        """E[alpha'_t] over the training times; -1 where they are uniform, for alpha falls from 1 to 0."""
        if self.path == "linear" or self.time_distribution == "uniform":
            return -1.0
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)  # over the normal behind the times
        times = 1 / (1 + np.exp(-nodes))
        return float(weights @ (-np.pi / 2 * np.sin(np.pi / 2 * times)) / weights.sum())

    def signal_to_noise(self, t: jax.Array) -> jax.Array:
        """alpha^2 / sigma^2 at times of any shape; infinite at t = 0."""
        alpha, sigma, _, _ = self.coefficients(t)
        return jnp.square(alpha / sigma)

    def perturb(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """x_t = alpha_t x0 + sigma_t noise, (B,H,W,C), for times (B,) or (B,H,W)."""
        alpha, sigma, _, _ = self.coefficients(expand(t, x0))
        return alpha * x0 + sigma * noise

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """The velocity v = alpha'_t x0 + sigma'_t noise, (B,H,W,C)."""
        _, _, alpha_rate, sigma_rate = self.coefficients(expand(t, x0))
        return alpha_rate * x0 + sigma_rate * noise

    def loss(self, prediction: jax.Array, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Mean over H, W, C of the squared error of the velocity, (B,) float32."""
        error = prediction.astype(jnp.float32) - self.target(x0, noise, t)
        return jnp.square(error).mean(axis=tuple(range(1, error.ndim)))

    def score(self, velocity: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """Score of x_t's marginal from the velocity there (SiT, eq. 7), for scalar t in (0, 1]; (B,H,W,C).

        Written without the quotient alpha / alpha', which is 0/0 at t = 0 of the cosine path.
        """
        alpha, sigma, alpha_rate, sigma_rate = self.coefficients(t)
        return (alpha * velocity - alpha_rate * x) / (alpha_rate * sigma**2 - alpha * sigma_rate * sigma)

    def velocity(self, score: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        """The inverse of `score`: velocity of the flow whose marginal at t in (0, 1) has this score; (B,H,W,C)."""
        alpha, sigma, alpha_rate, sigma_rate = self.coefficients(t)
        return (alpha_rate * x + (alpha_rate * sigma**2 - alpha * sigma_rate * sigma) * score) / alpha
