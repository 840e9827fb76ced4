"""Denoising diffusion (DDPM) with a learned variance, the process of DiT.

x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) e with integer t = 0 (least noisy) .. num_steps - 1 (noise). The network
predicts the noise e and, for `variance="learned_range"`, a code that places the reverse step's log variance between its
two extremes. Sources: Ho et al. (2020, arXiv 2006.11239), "DDPM" below; Nichol and Dhariwal (2021, arXiv 2102.09672),
"improved DDPM" below; Peebles and Xie (2023, arXiv 2212.09748), DiT. Latents are (B,H,W,C).
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.errors import UserError

SCHEDULES = ("linear", "cosine")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")


@dataclasses.dataclass(frozen=True, eq=False)
class Coefficients:
    """The tables of a chain of S noise steps, each (S,) float64 on the host, read-only.

    A table is read at positions i in the chain, 0 the least noisy; `timesteps` are the times that the network knows
    these positions by. Symbols: beta_i, alpha_i = 1 - beta_i, abar_i = alpha_0 ... alpha_i.

    Attributes:
      timesteps: (S,) int32, ascending, in the time of the process that the network was trained on.
      betas: beta_i.
      alphas_cumprod, alphas_cumprod_prev: abar_i; abar_{i-1}, with 1 before the first.
      sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: sqrt(abar), sqrt(1 - abar).
      sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod: sqrt(1 / abar), sqrt(1 / abar - 1).
      posterior_variance: variance of q(x_{i-1} | x_i, x0), DDPM equation 7; 0 at position 0.
      posterior_log_variance_clipped: its logarithm; position 0 repeats position 1, where it is finite.
      posterior_mean_coef1, posterior_mean_coef2: factors of x0 and x_i in the mean of q(x_{i-1} | x_i, x0).
    """

    timesteps: np.ndarray
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    def __post_init__(self) -> None:
        # The tables of a process are computed once and shared by all who ask.
        for field in dataclasses.fields(self):
            getattr(self, field.name).setflags(write=False)

    @classmethod
    def from_betas(cls, betas: np.ndarray, timesteps: np.ndarray) -> "Coefficients":
        """The tables of a chain with noise variances `betas` (S,), S >= 2, known to the network by `timesteps` (S,)."""
        betas = np.array(betas, np.float64)
        alphas = 1 - betas
        alphas_cumprod = np.cumprod(alphas)
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        return cls(
            timesteps=np.array(timesteps, np.int32),
            betas=betas,
            alphas_cumprod=alphas_cumprod,
            alphas_cumprod_prev=alphas_cumprod_prev,
            sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
            sqrt_one_minus_alphas_cumprod=np.sqrt(1 - alphas_cumprod),
            sqrt_recip_alphas_cumprod=np.sqrt(1 / alphas_cumprod),
            sqrt_recipm1_alphas_cumprod=np.sqrt(1 / alphas_cumprod - 1),
            posterior_variance=posterior_variance,
            posterior_log_variance_clipped=np.log(np.append(posterior_variance[1], posterior_variance[1:])),
            posterior_mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
            posterior_mean_coef2=(1 - alphas_cumprod_prev) * np.sqrt(alphas) / (1 - alphas_cumprod),
        )


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """The DDPM process; see `sra_jax.diffusion.process.Process` for what its methods promise.

    Attributes:
      num_steps: T, the number of noise steps that the network is trained on; times are 0 .. T-1.
      schedule: "linear", betas from 1e-4 to 0.02 at T = 1000 and scaled by 1000 / T elsewhere (DDPM section 4), or
        "cosine" (improved DDPM equation 17).
      variance: of the reverse step. "learned_range": between the two fixed ones, placed by C more output channels
        (improved DDPM equation 15) and trained by the variational bound. "fixed_small": the posterior's; "fixed_large":
        beta; both DDPM section 3.2, trained by the noise's error alone.
      teacher_time_min: the least noisy time that the teacher is shown: 1 as in the SRA authors' code, where a student
        at t = 0 meets a teacher at 1, or 0 as in their paper.

    Raises:
      UserError: a value that is not among these, or too few steps for the schedule.
    """

    num_steps: int = 1000
    schedule: str = "linear"
    variance: str = "learned_range"
    teacher_time_min: int = 1

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"process.schedule={self.schedule!r} is unknown; allowed: {', '.join(SCHEDULES)}")
        if self.variance not in VARIANCES:
            raise UserError(f"process.variance={self.variance!r} is unknown; allowed: {', '.join(VARIANCES)}")
        # 20 linear steps or fewer would need a last beta of 1 or more.
        fewest = 21 if self.schedule == "linear" else 2
        if not _is_integer(self.num_steps) or self.num_steps < fewest:
            raise UserError(
                f"process.num_steps={self.num_steps!r} is impossible: the {self.schedule} schedule needs an integer of "
                f"at least {fewest}; DiT trains on 1000. To sample in fewer steps, lower sampling.steps"
            )
        if not _is_integer(self.teacher_time_min) or self.teacher_time_min not in (0, 1):
            raise UserError(
                f"process.teacher_time_min={self.teacher_time_min!r} is impossible; allowed: 1 (as in the SRA authors' "
                "code) and 0 (as in their paper)"
            )

    @property
    def time_extent(self) -> float:
        """T: fractions of the time range refer to it."""
        return float(self.num_steps)

    @property
    def coefficients(self) -> Coefficients:
        """The tables of all T steps."""
        return _coefficients(self.num_steps, self.schedule)

    def respaced(self, steps: int | str | Sequence[int]) -> Coefficients:
        """The tables of the shorter chain through the timesteps that `steps` keeps: see `respaced_timesteps`.

        The kept x_t have the distribution that they have in the long chain: new betas are 1 - abar / (abar of the kept
        step before), and all else follows from them (improved DDPM section 4).
        """
        timesteps = respaced_timesteps(self.num_steps, steps)
        kept = self.coefficients.alphas_cumprod[timesteps]
        return Coefficients.from_betas(1 - kept / np.append(1.0, kept[:-1]), timesteps)

    def output_channels(self, channels: int) -> int:
        """2C with a learned variance, C otherwise."""
        return 2 * channels if self.variance == "learned_range" else channels

    def sample_time(self, key: jax.Array, batch: int) -> jax.Array:
        """Training times (batch,) int32, uniform in 0 .. T-1."""
        return jax.random.randint(key, (batch,), 0, self.num_steps, jnp.int32)

    def teacher_time(self, key: jax.Array, t: jax.Array, interval: tuple[float, float]) -> jax.Array:
        """The teacher's times (B,) int32: t minus an integer offset, truncated by `truncate_teacher_time`.

        Args:
          key: of the draw.
          t: the student's times (B,) int32.
          interval: (low, high), 0 <= low <= high <= 1, fractions of T. The offset is uniform in
            floor(low T) .. floor(high T) - 1; where that is empty, as for low = high, it is floor(low T).

        Raises:
          UserError: an interval outside of [0, 1] or with low > high.
        """
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"alignment.interval=({low}, {high}) is out of range: 0 <= low <= high <= 1 are fractions of the "
                f"{self.num_steps} timesteps; the paper uses (0.0, 0.2)"
            )
        # Binary fractions fall short of decimal ones: 0.29 * 100 < 29.
        first, stop = (math.floor(fraction * self.num_steps + 1e-6) for fraction in (low, high))
        offset = jax.random.randint(key, t.shape, first, max(stop, first + 1), jnp.int32)
        return self.truncate_teacher_time(t, offset)

    def truncate_teacher_time(self, t: jax.Array, offset: jax.Array) -> jax.Array:
        """max(t - offset, teacher_time_min) for student times t (B,) and offsets >= 0 (B,), both int32."""
        return jnp.clip(t - offset, self.teacher_time_min, self.num_steps - 1)

    def signal_to_noise(self, t: jax.Array) -> jax.Array:
        """alpha_bar / (1 - alpha_bar) at integer times of any shape."""
        tables = self.coefficients
        return jnp.asarray(np.square(tables.sqrt_alphas_cumprod / tables.sqrt_one_minus_alphas_cumprod))[t]

    def perturb(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """x_t (B,H,W,C) float32 of clean latents and standard normal noise (B,H,W,C) at t (B,): DDPM equation 4."""
        tables = self.coefficients
        return at(tables.sqrt_alphas_cumprod, t) * x0 + at(tables.sqrt_one_minus_alphas_cumprod, t) * noise

    def loss(self, prediction: jax.Array, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """The denoising loss of each example (B,) float32.

        The mean squared error of the noise and, with a learned variance, the variational bound's term at t in bits per
        dimension. The bound trains the variance only: its gradient stops at the mean (improved DDPM section 3.1).

        Args:
          prediction: the network's output at x_t (B,H,W,C or 2C): the noise, then the variance code.
          x0: clean latents (B,H,W,C).
          noise: standard normal (B,H,W,C).
          t: (B,) int32.
        """
        predicted_noise, code = self.split(prediction, x0.shape[-1])
        error = jnp.mean(jnp.square(noise - predicted_noise), axis=(1, 2, 3))
        if code is None:
            return error
        x_t = self.perturb(x0, noise, t)
        frozen_mean = jnp.concatenate([jax.lax.stop_gradient(predicted_noise), code], axis=-1)
        return error + self.variational_bound_term(frozen_mean, x0, x_t, t)

    def variational_bound_term(self, prediction: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """L_t of the variational bound (B,) float32, in bits per dimension: DDPM equation 5.

        For t > 0 the Kullback-Leibler divergence from q(x_{t-1} | x_t, x0) to the network's step; at t = 0 the negative
        log likelihood of x0 in bins of 1/127.5, the width of 8-bit pixels, which DiT keeps for latents.

        Args:
          prediction: (B,H,W,C or 2C); x0, x_t: (B,H,W,C); t: (B,) int32.
        """
        tables = self.coefficients
        mean, log_variance, _ = self.reverse_step(tables, prediction, x_t, t)
        divergence = normal_kl(
            posterior_mean(tables, x0, x_t, t), at(tables.posterior_log_variance_clipped, t), mean, log_variance
        )
        likelihood = discretized_log_likelihood(x0, mean, log_variance / 2)
        nats = jnp.mean(jnp.where(t[:, None, None, None] == 0, -likelihood, divergence), axis=(1, 2, 3))
        return nats / math.log(2)

    def reverse_step(
        self, tables: Coefficients, prediction: jax.Array, x_t: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The network's p(x_{i-1} | x_i): mean, log variance and implied x0, each (B,H,W,C) float32.

        Args:
          tables: of the whole chain or of a respaced one.
          prediction: the network's output at (x_t, tables.timesteps[position]), (B,H,W,C or 2C).
          x_t: (B,H,W,C).
          position: i in the chain, (B,) int32.
        """
        noise, code = self.split(prediction, x_t.shape[-1])
        x0 = predicted_x0(tables, noise, x_t, position)
        mean = posterior_mean(tables, x0, x_t, position)
        smallest = tables.posterior_log_variance_clipped
        if code is not None:
            fraction = (code + 1) / 2
            log_variance = fraction * at(np.log(tables.betas), position) + (1 - fraction) * at(smallest, position)
        elif self.variance == "fixed_large":
            # beta_0 says little about x0 given x_1; improved DDPM's code puts the posterior's variance there too.
            largest = np.log(np.append(tables.posterior_variance[1], tables.betas[1:]))
            log_variance = jnp.broadcast_to(at(largest, position), x_t.shape)
        else:
            log_variance = jnp.broadcast_to(at(smallest, position), x_t.shape)
        return mean, log_variance, x0

    def split(self, prediction: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
        """The noise (B,H,W,C) and the variance code (B,H,W,C), None if the variance is fixed; both float32."""
        if prediction.shape[-1] != self.output_channels(channels):
            raise ValueError(
                f"variance={self.variance!r} needs {self.output_channels(channels)} output channels for latents of "
                f"{channels}, but the network gave {prediction.shape[-1]}"
            )
        prediction = prediction.astype(jnp.float32)
        if self.variance != "learned_range":
            return prediction, None
        return prediction[..., :channels], prediction[..., channels:]


@functools.cache
def _coefficients(num_steps: int, schedule: str) -> Coefficients:
    if schedule == "linear":
        scale = 1000 / num_steps
        betas = np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    else:
        progress = np.arange(num_steps + 1, dtype=np.float64) / num_steps
        alphas_cumprod = np.cos((progress + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    return Coefficients.from_betas(betas, np.arange(num_steps))


def at(table: np.ndarray, t: jax.Array) -> jax.Array:
    """`table` (S,) float64 at t (B,), rounded to float32 as late as that, (B,1,1,1) to multiply latents."""
    return jnp.asarray(table, jnp.float32)[t][:, None, None, None]


def predicted_x0(tables: Coefficients, noise: jax.Array, x_t: jax.Array, position: jax.Array) -> jax.Array:
    """x0 (B,H,W,C) that `noise` (B,H,W,C) was added to, for x_t (B,H,W,C) at positions (B,): DDPM equation 4 solved."""
    sqrt_recip = at(tables.sqrt_recip_alphas_cumprod, position)
    return sqrt_recip * x_t - at(tables.sqrt_recipm1_alphas_cumprod, position) * noise


def posterior_mean(tables: Coefficients, x0: jax.Array, x_t: jax.Array, position: jax.Array) -> jax.Array:
    """The mean of q(x_{i-1} | x_i, x0) (B,H,W,C) at positions i (B,): DDPM equation 7."""
    return at(tables.posterior_mean_coef1, position) * x0 + at(tables.posterior_mean_coef2, position) * x_t


def normal_kl(mean1: jax.Array, log_variance1: jax.Array, mean2: jax.Array, log_variance2: jax.Array) -> jax.Array:
    """KL(N(mean1, e^log_variance1) || N(mean2, e^log_variance2)) in nats, elementwise."""
    return 0.5 * (
        log_variance2
        - log_variance1
        + jnp.exp(log_variance1 - log_variance2)
        + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
        - 1
    )


def discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """The log probability of x's bin under N(mean, e^(2 log_std)) in nats, elementwise: DDPM section 3.3.

    The 256 bins are centred on -1, -1 + 2/255, .. 1; the outermost two reach to infinity. As in improved DDPM's code,
    the normal distribution function is the tanh approximation of Page (1977), and probabilities end at 1e-12.
    """

    def cumulative(x: jax.Array) -> jax.Array:
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    half_bin = 1 / 255
    inverse_std = jnp.exp(-log_std)
    upper = cumulative((x - mean + half_bin) * inverse_std)
    lower = cumulative((x - mean - half_bin) * inverse_std)
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def respaced_timesteps(num_steps: int, steps: int | str | Sequence[int]) -> np.ndarray:
    """The timesteps that a shorter chain keeps, ascending (S,) int32, S >= 2: improved DDPM section 4 and its code.

    Args:
      num_steps: T, the steps of the whole chain.
      steps: one of
        250 or "250": so many, spread evenly from 0 to T - 1;
        (10, 15, 20) or "10,15,20": the T steps cut into equal sections, least noisy first (the first T mod n are longer
        by one), and so many kept of each, spread evenly from its first step to its last; a lone one is the first;
        "ddim25": so many at the smallest whole stride that gives exactly that number, from 0 (Song et al., 2020).

    Raises:
      UserError: none of these, or more steps than there are.
    """
    if isinstance(steps, str) and steps.startswith("ddim"):
        return _strided_timesteps(num_steps, steps)
    counts = _section_counts(steps)
    if sum(counts) > num_steps:
        raise UserError(
            f"sampling.steps={steps!r} asks for {sum(counts)} sampling steps, but the process has {num_steps}: "
            f"choose at most {num_steps}"
        )
    if sum(counts) < 2:
        raise UserError(f"sampling.steps={steps!r}: sampling needs at least 2 steps; DiT is evaluated with 250")
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = num_steps // len(counts) + (section < num_steps % len(counts))
        if count > size:
            raise UserError(
                f"sampling.steps={steps!r}: section {section + 1} of {len(counts)} has {size} of the {num_steps} "
                f"timesteps and cannot keep {count}; each section keeps at most its length"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed in floating point, ties to even: as the published chains were made.
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return np.array(kept, np.int32)


def _section_counts(steps: int | str | Sequence[int]) -> list[int]:
    if isinstance(steps, str):
        parts: list[object] = [
            int(part) if part.strip().isdecimal() and part.isascii() else None for part in steps.split(",")
        ]
    elif isinstance(steps, Sequence):
        parts = list(steps)
    else:
        parts = [steps]
    counts = [int(part) for part in parts if _is_integer(part) and part >= 1]
    if not parts or len(counts) < len(parts):
        raise _unreadable(steps)
    return counts


def _strided_timesteps(num_steps: int, steps: str) -> np.ndarray:
    count = steps.removeprefix("ddim")
    if not (count.isdecimal() and count.isascii()):
        raise _unreadable(steps)
    # From the widest stride to the narrowest, so that the narrowest of each count stays.
    strides = {len(range(0, num_steps, stride)): stride for stride in range(num_steps - 1, 0, -1)}
    if int(count) not in strides:
        fewer = [kept for kept in strides if kept < int(count)]
        more = [kept for kept in strides if kept > int(count)]
        nearest = [f"ddim{kept}" for kept in (*sorted(fewer)[-1:], *sorted(more)[:1])]
        raise UserError(
            f"sampling.steps={steps!r}: no whole stride keeps exactly {count} of the {num_steps} timesteps; "
            f"nearest: {' or '.join(nearest)}"
        )
    return np.arange(0, num_steps, strides[int(count)], dtype=np.int32)


def _unreadable(steps: object) -> UserError:
    return UserError(
        f"sampling.steps={steps!r} is no step count; allowed: a positive integer (250), one for each of several "
        "sections ('10,15,20'), or 'ddim' with a positive integer ('ddim25')"
    )


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
