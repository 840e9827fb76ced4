"""The DDPM process against float64 computations written out from the papers' equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from sra_jax.diffusion.gaussian import (
    GaussianDiffusion,
    discretized_log_likelihood,
    normal_kl,
    respaced_timesteps,
)
from sra_jax.errors import UserError

LATENTS = (5, 4, 4, 3)  # B,H,W,C
TIMES = np.array([0, 1, 40, 500, 999], np.int32)


def normals(seed: int, shape: tuple[int, ...] = LATENTS) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_linear_schedule_covers_the_same_noise_with_any_step_count():
    full, quarter = (GaussianDiffusion(num_steps=steps).coefficients for steps in (1000, 250))
    np.testing.assert_allclose(full.betas[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    np.testing.assert_allclose(quarter.betas[[0, -1]], [4e-4, 0.08], rtol=1e-12)
    np.testing.assert_allclose(np.log(quarter.alphas_cumprod[-1]), np.log(full.alphas_cumprod[-1]), rtol=0.05)


def test_cosine_schedule_follows_its_formula_until_the_last_betas_are_capped():
    tables = GaussianDiffusion(schedule="cosine").coefficients
    signal = [np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(1001)]
    np.testing.assert_allclose(tables.alphas_cumprod[:999], np.array(signal[1:1000]) / signal[0], rtol=1e-9)
    assert tables.betas[-1] == 0.999


def test_posterior_is_that_of_bayes():
    """q(x_{i-1} | x_i, x0) from the product of the two Gaussians q(x_i | x_{i-1}) and q(x_{i-1} | x0)."""
    tables = GaussianDiffusion().coefficients
    i = np.arange(1, 1000)
    beta, before = tables.betas[i], tables.alphas_cumprod[i - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    np.testing.assert_allclose(tables.posterior_variance[i], 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(tables.posterior_mean_coef1[i], np.sqrt(before) / (1 - before) / precision, rtol=1e-9)
    np.testing.assert_allclose(tables.posterior_mean_coef2[i], np.sqrt(1 - beta) / beta / precision, rtol=1e-9)


def test_processes_are_values_with_shared_read_only_tables():
    process = GaussianDiffusion()
    assert process.coefficients is GaussianDiffusion().coefficients
    assert hash(process) == hash(GaussianDiffusion())
    assert process.time_extent == 1000
    with pytest.raises(ValueError, match="read-only"):
        process.coefficients.betas[0] = 0.5


def test_perturb_by_steps_equals_perturb_at_once():
    """The variance and the signal of x_t, by running x_i = sqrt(1 - beta_i) x_{i-1} + sqrt(beta_i) e_i."""
    process = GaussianDiffusion()
    signal, variance, expected = 1.0, 0.0, {}
    for t, beta in enumerate(np.linspace(1e-4, 0.02, 1000)):
        signal, variance = np.sqrt(1 - beta) * signal, (1 - beta) * variance + beta
        expected[t] = (signal, np.sqrt(variance))
    x0, noise = normals(0), normals(1)
    x_t = process.perturb(jnp.asarray(x0), jnp.asarray(noise), jnp.asarray(TIMES))
    assert x_t.dtype == jnp.float32
    for row, t in enumerate(TIMES):
        np.testing.assert_allclose(x_t[row], expected[t][0] * x0[row] + expected[t][1] * noise[row], atol=2e-6)


def float64_bound_term(prediction, x0, noise, t, t_max=1000):
    """L_t in bits per dimension for one example, in numpy float64, one equation a line."""
    betas = np.linspace(1e-4, 0.02, t_max)
    abar = np.cumprod(1 - betas)
    before = abar[t - 1] if t > 0 else 1.0
    eps, code = np.split(prediction.astype(np.float64), 2, axis=-1)
    x_t = np.sqrt(abar[t]) * x0 + np.sqrt(1 - abar[t]) * noise
    x0_hat = (x_t - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])

    def posterior(clean):
        weights = np.sqrt(before) * betas[t], np.sqrt(1 - betas[t]) * (1 - before)
        return (weights[0] * clean + weights[1] * x_t) / (1 - abar[t])

    place = max(t, 1)
    smallest = np.log(betas[place] * (1 - abar[place - 1]) / (1 - abar[place]))
    log_variance = smallest + (code + 1) / 2 * (np.log(betas[t]) - smallest)
    mean, variance = posterior(x0_hat), np.exp(log_variance)
    if t > 0:
        true_variance = np.exp(smallest)
        nats = 0.5 * (np.log(variance / true_variance) - 1 + (true_variance + (posterior(x0) - mean) ** 2) / variance)
        return nats.mean() / np.log(2)

    def cdf(z):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    upper, lower = (cdf((x0 + side / 255 - mean) / np.sqrt(variance)) for side in (1, -1))
    upper[x0 > 0.999], lower[x0 < -0.999] = 1.0, 0.0
    return -np.log(np.maximum(upper - lower, 1e-12)).mean() / np.log(2)


def test_loss_is_the_noise_error_plus_the_bound_in_float64():
    process = GaussianDiffusion()
    x0, noise = np.clip(0.5 * normals(2), -1, 1), normals(3)  # clipped: both tails of the t = 0 likelihood occur
    x0[0, 0, 0] = [-1, 1, 0]
    prediction = np.concatenate([noise + 0.3 * normals(4), 0.7 * normals(5)], axis=-1)
    loss = process.loss(*(jnp.asarray(array) for array in (prediction, x0, noise, TIMES)))
    for row, t in enumerate(TIMES):
        error = np.square(0.3 * normals(4)[row].astype(np.float64)).mean()
        bound = float64_bound_term(prediction[row], x0[row].astype(np.float64), noise[row].astype(np.float64), t)
        np.testing.assert_allclose(loss[row] - error, bound, rtol=2e-4, err_msg=f"t = {t}")


def test_bound_trains_the_variance_alone():
    process, fixed = GaussianDiffusion(), GaussianDiffusion(variance="fixed_small")
    x0, noise, t = jnp.asarray(normals(6)), jnp.asarray(normals(7)), jnp.asarray(TIMES)
    prediction = jnp.concatenate([noise + 0.1, 0.2 * noise], axis=-1)
    gradient = jax.grad(lambda p: process.loss(p, x0, noise, t).sum())(prediction)
    of_noise_error = jax.grad(lambda p: fixed.loss(p, x0, noise, t).sum())(prediction[..., :3])
    np.testing.assert_array_equal(gradient[..., :3], of_noise_error)
    assert np.all(np.abs(gradient[..., 3:]).sum(axis=(1, 2, 3)) > 0)


def test_loss_rejects_a_network_with_the_wrong_channels():
    x0 = jnp.zeros(LATENTS)
    with pytest.raises(ValueError, match="needs 6 output channels for latents of 3, but the network gave 3"):
        GaussianDiffusion().loss(x0, x0, x0, jnp.asarray(TIMES))


def test_kl_against_an_integral():
    grid = np.linspace(-12, 12, 200_001)
    first, second = norm(0.3, np.exp(0.2 / 2)), norm(-0.4, np.exp(-0.5 / 2))
    integrand = first.pdf(grid) * (first.logpdf(grid) - second.logpdf(grid))
    expected = np.trapezoid(integrand, grid)
    divergence = normal_kl(jnp.float32(0.3), jnp.float32(0.2), jnp.float32(-0.4), jnp.float32(-0.5))
    np.testing.assert_allclose(divergence, expected, rtol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.9, 0.1), (-3.0, 1.0), (0.1, 0.02)])
def test_discretized_likelihood_is_a_distribution_over_256_bins(mean, std):
    bins = jnp.linspace(-1, 1, 256)
    probability = np.exp(discretized_log_likelihood(bins, jnp.float32(mean), jnp.log(jnp.float32(std))))
    np.testing.assert_allclose(probability.sum(), 1, atol=1e-5)
    edges = np.concatenate([[-np.inf], (bins[1:] + bins[:-1]) / 2, [np.inf]])
    np.testing.assert_allclose(probability, np.diff(norm(mean, std).cdf(edges)), atol=3e-4)


def test_variances_lie_between_the_posterior_and_beta():
    x_t, t = jnp.asarray(normals(8)), jnp.asarray(TIMES)
    noise = jnp.asarray(normals(9))
    fixed = {}
    for variance in ("fixed_small", "fixed_large"):
        process = GaussianDiffusion(variance=variance)
        assert process.output_channels(3) == 3
        fixed[variance] = process.reverse_step(process.coefficients, noise, x_t, t)[1]
    learned = GaussianDiffusion()
    assert learned.output_channels(3) == 6
    for code, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        prediction = jnp.concatenate([noise, jnp.full(LATENTS, code)], axis=-1)
        log_variance = learned.reverse_step(learned.coefficients, prediction, x_t, t)[1]
        rows = slice(None) if variance == "fixed_small" else slice(1, None)  # at t = 0 the fixed one is not beta
        np.testing.assert_allclose(log_variance[rows], fixed[variance][rows], rtol=1e-6)


def test_training_times_are_uniform_integers():
    t = np.asarray(GaussianDiffusion(num_steps=50).sample_time(jax.random.key(0), 50_000))
    assert t.dtype == np.int32
    counts = np.bincount(t, minlength=50)
    assert counts.shape == (50,)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000)


def test_teacher_offsets_fill_the_interval():
    t = jnp.full(20_000, 600, jnp.int32)
    offset = 600 - np.asarray(GaussianDiffusion().teacher_time(jax.random.key(1), t, (0.1, 0.2)))
    assert offset.dtype == np.int32
    np.testing.assert_array_equal(np.unique(offset), np.arange(100, 200))


@pytest.mark.parametrize(
    ("num_steps", "interval", "offset"), [(1000, (0.2, 0.2), 200), (1000, (0.0, 0.0), 0), (100, (0.29, 0.29), 29)]
)
def test_teacher_offset_is_fixed_where_the_interval_is_a_point(num_steps, interval, offset):
    t = jnp.arange(num_steps - 20, num_steps, dtype=jnp.int32)
    s = GaussianDiffusion(num_steps=num_steps).teacher_time(jax.random.key(2), t, interval)
    np.testing.assert_array_equal(s, t - offset)


@pytest.mark.parametrize("least", [0, 1])
def test_teacher_time_is_truncated_at_the_least_noisy_time(least):
    process = GaussianDiffusion(teacher_time_min=least)
    t = jnp.array([0, 1, 5, 999], jnp.int32)
    for offset, expected in (([0, 1, 7, 199], [least, least, least, 800]), ([0, 0, 0, 0], [least, 1, 5, 999])):
        np.testing.assert_array_equal(process.truncate_teacher_time(t, jnp.array(offset)), expected)


@pytest.mark.parametrize("interval", [(-0.1, 0.2), (0.2, 0.1), (0.0, 1.1), (float("nan"), 0.2)])
def test_teacher_time_rejects_an_impossible_interval(interval):
    with pytest.raises(UserError, match="0 <= low <= high <= 1"):
        GaussianDiffusion().teacher_time(jax.random.key(0), jnp.zeros(2, jnp.int32), interval)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "cos"}, "'cos' is unknown; allowed: linear, cosine"),
        ({"variance": "learned"}, "'learned' is unknown; allowed: learned_range"),
        ({"num_steps": 20}, "at least 21"),
        ({"num_steps": 1, "schedule": "cosine"}, "at least 2"),
        ({"num_steps": 1000.0}, "integer"),
        ({"teacher_time_min": 2}, "allowed: 1"),
        ({"teacher_time_min": True}, "allowed: 1"),
    ],
)
def test_impossible_parameters_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        GaussianDiffusion(**arguments)


def test_fewest_steps_of_each_schedule_work():
    for process in (GaussianDiffusion(num_steps=21), GaussianDiffusion(num_steps=2, schedule="cosine")):
        tables = process.coefficients
        assert np.all((tables.betas > 0) & (tables.betas < 1))
        assert np.all(np.isfinite(tables.posterior_log_variance_clipped))


@pytest.mark.parametrize("num_steps", [100, 1000, 1003])
@pytest.mark.parametrize("counts", [(2,), (7,), (50,), (100,), (10, 15, 20), (3, 1, 4, 1), (5, 5)])
def test_sections_keep_evenly_spread_timesteps(num_steps, counts):
    kept = respaced_timesteps(num_steps, counts)
    assert kept.dtype == np.int32
    assert np.all(np.diff(kept) > 0)
    sections = np.array_split(np.arange(num_steps), len(counts))  # its first sections are the longer ones too
    for section, count in zip(sections, counts, strict=True):
        inside = kept[(kept >= section[0]) & (kept <= section[-1])]
        assert len(inside) == count
        exact = np.linspace(section[0], section[-1], count)
        assert np.abs(inside - exact).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("num_steps", [100, 1000, 1003])
def test_ddim_respacing_is_the_first_stride_that_gives_the_count_or_refused(num_steps):
    for count in range(2, 101):
        found = (range(0, num_steps, s) for s in range(1, num_steps) if len(range(0, num_steps, s)) == count)
        expected = next(found, None)
        if expected is None:
            with pytest.raises(UserError, match="no whole stride"):
                respaced_timesteps(num_steps, f"ddim{count}")
        else:
            np.testing.assert_array_equal(respaced_timesteps(num_steps, f"ddim{count}"), expected)


def test_forms_of_one_respacing_agree():
    forms = [respaced_timesteps(1000, steps) for steps in ("10,15,20", " 10, 15, 20", (10, 15, 20), [10, 15, 20])]
    for form in forms[1:]:
        np.testing.assert_array_equal(form, forms[0])
    np.testing.assert_array_equal(respaced_timesteps(1000, 250), respaced_timesteps(1000, "250"))
    np.testing.assert_array_equal(respaced_timesteps(1000, 1000), np.arange(1000))


def test_respaced_chain_has_the_noise_of_the_long_one():
    process = GaussianDiffusion()
    tables = process.respaced("10,15,20")
    np.testing.assert_array_equal(tables.timesteps, respaced_timesteps(1000, "10,15,20"))
    long = process.coefficients.alphas_cumprod
    np.testing.assert_allclose(tables.alphas_cumprod, long[tables.timesteps], rtol=1e-10)
    for i, (t, before) in enumerate(zip(tables.timesteps[1:], tables.timesteps[:-1], strict=True), start=1):
        kept_signal = np.prod(1 - process.coefficients.betas[before + 1 : t + 1])
        np.testing.assert_allclose(1 - tables.betas[i], kept_signal, rtol=1e-10)
    everything = process.respaced(1000)
    np.testing.assert_allclose(everything.betas, process.coefficients.betas, rtol=1e-9)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (1001, "asks for 1001 sampling steps, but the process has 1000: choose at most 1000"),
        ("600,600", "asks for 1200"),
        ((10, 400, 10), r"section 2 of 3 has 333 .* cannot keep 400"),
        ("ddim300", "nearest: ddim250 or ddim334"),
        ("ddim2000", "nearest: ddim1000$"),
        (1, "at least 2 steps"),
        ("ddim1", "nearest: ddim2$"),
        (0, "is no step count"),
        (-5, "is no step count"),
        (250.0, "is no step count"),
        (True, "is no step count"),
        ("", "is no step count"),
        ("ddim", "is no step count"),
        ("ddim25,25", "is no step count"),
        ("10,,20", "is no step count"),
        ("٢٥", "is no step count"),
        ("ddim٢٥", "is no step count"),
        ((10, 0), "is no step count"),
        ((), "is no step count"),
        (None, "is no step count"),
    ],
)
def test_impossible_respacings_are_refused(steps, message):
    with pytest.raises(UserError, match=message):
        respaced_timesteps(1000, steps)
