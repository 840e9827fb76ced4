import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sra_jax.diffusion.guidance import Guidance
from sra_jax.diffusion.interpolant import PATHS, Interpolant
from sra_jax.diffusion.registry import SAMPLERS
from sra_jax.errors import UserError

MEAN, STD = 0.7, 0.4
"""Data whose every entry is N(0.7, 0.4^2): the exact velocity and score are known in closed form."""


def marginal(process, t):
    """Mean and standard deviation of x_t."""
    alpha, sigma, _, _ = process.coefficients(t)
    return alpha * MEAN, jnp.sqrt((alpha * STD) ** 2 + sigma**2)


def exact_score(process, x, t):
    mean, std = marginal(process, t)
    return (mean - x) / std**2


def exact_velocity(process, x, t):
    """E[alpha' x0 + sigma' e | x_t] of the jointly Gaussian x0, e and x_t."""
    alpha, sigma, alpha_rate, sigma_rate = process.coefficients(t)
    mean, std = marginal(process, t)
    data = MEAN + alpha * STD**2 / std**2 * (x - mean)
    noise = sigma / std**2 * (x - mean)
    return alpha_rate * data + sigma_rate * noise


@pytest.mark.parametrize("path", PATHS)
def test_ends_of_the_path(path):
    process = Interpolant(path)
    x0, noise = jnp.full((2, 1, 1, 1), 3.0), jnp.full((2, 1, 1, 1), 5.0)
    np.testing.assert_allclose(process.perturb(x0, noise, jnp.array([0.0, 1.0])).ravel(), [3, 5], atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_target_is_the_path_s_derivative(path):
    process = Interpolant(path)
    x0, noise = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 2, 2, 1)), jnp.float32) for i in range(2))
    t = jnp.array([0.1, 0.5, 0.9])
    _, slope = jax.jvp(lambda t: process.perturb(x0, noise, t), (t,), (jnp.ones_like(t),))
    np.testing.assert_allclose(process.target(x0, noise, t), slope, atol=1e-5)
    np.testing.assert_allclose(process.loss(slope, x0, noise, t), 0, atol=1e-9)
    np.testing.assert_allclose(process.loss(slope + 2, x0, noise, t), 4, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
def test_velocity_and_score_of_a_gaussian(path, t):
    process = Interpolant(path)
    x = jnp.linspace(-2, 2, 9).reshape(1, 3, 3, 1)
    velocity = exact_velocity(process, x, jnp.float32(t))
    score = process.score(velocity, x, jnp.float32(t))
    np.testing.assert_allclose(score, exact_score(process, x, t), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(process.velocity(score, x, jnp.float32(t)), velocity, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["ode", "heun", "sde"])
def test_samplers_recover_a_gaussian(path, name):
    """With the exact velocity every sampler ends in N(0.7, 0.4^2)."""
    process = Interpolant(path)
    keys = jax.random.split(jax.random.key(0))
    noise = jax.random.normal(keys[0], (64, 8, 8, 1))

    def denoise(x, t, y):
        return exact_velocity(process, x, t.reshape(-1, 1, 1, 1))

    samples = jax.jit(
        lambda noise: SAMPLERS[name].sample(
            process, denoise, noise, jnp.zeros(64, int),
            lambda i: jax.random.normal(jax.random.fold_in(keys[1], i), noise.shape), steps=200, guidance=Guidance(1),
        )
    )(noise)  # fmt: skip
    assert samples.dtype == jnp.float32
    assert np.mean(samples) == pytest.approx(MEAN, abs=0.02)
    assert np.std(samples) == pytest.approx(STD, abs=0.02)


def test_heun_is_of_second_order():
    """Halving the step divides Heun's error by four and Euler's by two."""
    process = Interpolant("cosine")
    noise = jnp.linspace(-2, 2, 16).reshape(16, 1, 1, 1)

    def denoise(x, t, y):
        return exact_velocity(process, x, t.reshape(-1, 1, 1, 1))

    def sample(name, steps):
        return SAMPLERS[name].sample(
            process, denoise, noise, jnp.zeros(16, int), None, steps=steps, guidance=Guidance(1)
        )  # fmt: skip

    exact = MEAN + STD * noise
    errors = {name: [np.abs(sample(name, n) - exact).max() for n in (20, 40)] for name in ("ode", "heun")}
    assert errors["ode"][0] / errors["ode"][1] == pytest.approx(2, rel=0.15)
    assert errors["heun"][0] / errors["heun"][1] > 3  # its last step is Euler's


@pytest.mark.parametrize("interval", [(0.0, 0.2), (0.1, 0.3), (0.2, 0.2), (0.0, 0.0)])
def test_teacher_time(interval):
    low, high = interval
    t = jnp.linspace(0, 1, 5001)
    s = Interpolant().teacher_time(jax.random.key(0), t, interval)
    np.testing.assert_array_equal(s >= 0, True)
    offset = np.asarray(t - s)[np.asarray(s) > 0]
    assert offset.min() >= low - 1e-6
    assert offset.max() <= high + 1e-6
    assert offset.mean() == pytest.approx((low + high) / 2, abs=0.005)
    np.testing.assert_array_equal(np.asarray(s)[np.asarray(t) < low], 0)


def test_time_distributions():
    uniform = np.asarray(Interpolant().sample_time(jax.random.key(1), 20_000))
    logit = np.asarray(Interpolant(time_distribution="logit_normal").sample_time(jax.random.key(1), 20_000))
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(np.log(logit / (1 - logit)), "norm").pvalue > 1e-3


def test_unknown_names():
    with pytest.raises(UserError, match=r"'cos'.*linear, cosine"):
        Interpolant(path="cos")
    with pytest.raises(UserError, match=r"uniform, logit_normal"):
        Interpolant(time_distribution="normal")
