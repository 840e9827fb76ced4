"""DDPM and DDIM on data whose best denoiser is known: x0 ~ N(MEAN, STD^2), independently for each latent."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax.diffusion.gaussian import GaussianDiffusion
from sra_jax.diffusion.gaussian_samplers import check_ddim, check_ddpm, ddim, ddpm
from sra_jax.diffusion.guidance import Guidance
from sra_jax.errors import UserError

MEAN, STD = 1.5, 0.6
UNGUIDED = Guidance(null=10)


def exact_denoiser(process: GaussianDiffusion):
    """E[e | x_t] of the Gaussian data; `process` with a fixed variance."""
    alphas_cumprod = jnp.asarray(process.coefficients.alphas_cumprod, jnp.float32)

    def denoise(x, t, y):
        signal = alphas_cumprod[t][:, None, None, None]
        return jnp.sqrt(1 - signal) * (x - jnp.sqrt(signal) * MEAN) / (signal * STD**2 + 1 - signal)

    return denoise


def exact_learned_denoiser(process: GaussianDiffusion, steps):
    """The noise as above, and the code at which the learned variance is that of q(x_{i-1} | x_i): x0's uncertainty
    given x_i adds to the posterior's variance."""
    tables = process.respaced(steps)
    unknown_x0 = STD**2 * (1 - tables.alphas_cumprod) / (tables.alphas_cumprod * STD**2 + 1 - tables.alphas_cumprod)
    variance = tables.posterior_variance + tables.posterior_mean_coef1**2 * unknown_x0
    smallest = tables.posterior_log_variance_clipped
    code = 2 * (np.log(variance) - smallest) / (np.log(tables.betas) - smallest) - 1
    of_timestep = np.zeros(process.num_steps)
    of_timestep[tables.timesteps] = code
    noise = exact_denoiser(process)

    def denoise(x, t, y):
        codes = jnp.asarray(of_timestep, jnp.float32)[t][:, None, None, None]
        return jnp.concatenate([noise(x, t, y), jnp.broadcast_to(codes, x.shape)], axis=-1)

    return denoise


def mean_and_std(sampler, process, denoise, num_steps: int, **options) -> tuple[float, float]:
    """Of the sampler's output, without sampling: it is affine in its normals, so one row of the batch answers to each
    of them. x_T has the data's own mean and deviation there; row 0 has no noise, row 1 has x_T's, row 2 + i that of
    step i."""
    rows = num_steps + 2
    signal = process.coefficients.alphas_cumprod[-1]
    start = jnp.full((rows, 1, 1, 1), np.sqrt(signal) * MEAN).at[1].add(np.sqrt(signal * STD**2 + 1 - signal))

    def step_noise(i):
        return jnp.zeros((rows, 1, 1, 1)).at[2 + i].set(1.0)

    run = jax.jit(lambda x: sampler(process, denoise, x, jnp.zeros(rows, jnp.int32), step_noise, **options))
    output = np.asarray(run(start), np.float64).ravel()
    return output[0], np.sqrt(np.square(output[1:] - output[0]).sum())


@pytest.mark.parametrize("steps", [10, "4,8,2"])
def test_ddpm_with_the_exact_variance_recovers_the_data_in_few_steps(steps):
    """Every reverse step is exact for Gaussian data, so few steps are as good as many, but for the last step, which
    gives the mean of x0 given x at the least noisy step."""
    process = GaussianDiffusion()
    tables = process.respaced(steps)
    last = tables.alphas_cumprod[0]
    expected_std = np.sqrt(STD**2 - STD**2 * (1 - last) / (last * STD**2 + 1 - last))
    mean, std = mean_and_std(
        ddpm, process, exact_learned_denoiser(process, steps), len(tables.timesteps), steps=steps, guidance=UNGUIDED
    )
    np.testing.assert_allclose([mean, std], [MEAN, expected_std], rtol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_with_a_fixed_variance_recovers_the_data_in_many_steps(variance):
    process = GaussianDiffusion(variance=variance)
    mean, std = mean_and_std(ddpm, process, exact_denoiser(process), 1000, steps=1000, guidance=UNGUIDED)
    np.testing.assert_allclose([mean, std], [MEAN, STD], rtol=0.01)


@pytest.mark.parametrize(("schedule", "eta"), [("linear", 0.0), ("cosine", 0.0), ("linear", 0.6)])
def test_ddim_recovers_the_data_in_many_steps(schedule, eta):
    process = GaussianDiffusion(schedule=schedule, variance="fixed_small")
    mean, std = mean_and_std(ddim, process, exact_denoiser(process), 1000, steps=1000, guidance=UNGUIDED, eta=eta)
    np.testing.assert_allclose([mean, std], [MEAN, STD], rtol=0.01)


@pytest.mark.parametrize("steps", [20, "ddim25"])
def test_ddim_with_eta_one_is_ddpm_with_the_small_variance(steps):
    process = GaussianDiffusion(variance="fixed_small")
    start = jax.random.normal(jax.random.key(0), (2, 3, 3, 2))

    def step_noise(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), i), start.shape)

    arguments = (process, exact_denoiser(process), start, jnp.zeros(2, jnp.int32), step_noise)
    ancestral = jax.jit(lambda: ddpm(*arguments, steps=steps, guidance=UNGUIDED))()
    implicit = jax.jit(lambda: ddim(*arguments, steps=steps, guidance=UNGUIDED, eta=1.0))()
    np.testing.assert_allclose(implicit, ancestral, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_noise_is_eta_of_the_posterior_deviation(eta):
    """Two steps of a network that predicts 0, where the noise of the first is only scaled by the second."""
    process = GaussianDiffusion(variance="fixed_small")
    tables = process.respaced(2)
    start, labels = jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, jnp.int32)

    def denoise(x, t, y):
        return jnp.zeros_like(x)

    x = ddim(process, denoise, start, labels, lambda i: start + 1.0, steps=2, guidance=UNGUIDED, eta=eta)
    expected = eta * np.sqrt(tables.posterior_variance[1]) * tables.sqrt_recip_alphas_cumprod[0]
    np.testing.assert_allclose(x, np.full((1, 1, 1, 1), expected), rtol=1e-5)


def recording_denoiser(calls: list, channels_out: int):
    """Predicts the label in every channel and notes the size and time of each evaluation as it runs."""

    def denoise(x, t, y):
        jax.debug.callback(lambda t, y: calls.append((t.tolist(), y.tolist())), t, y, ordered=True)
        return jnp.broadcast_to(y[:, None, None, None].astype(jnp.float32), (*x.shape[:3], channels_out))

    return denoise


@pytest.mark.parametrize("sampler", [ddpm, ddim])
def test_network_sees_original_timesteps_and_guides_in_the_interval_only(sampler):
    calls: list = []
    guidance = Guidance(null=7, scale=2.0, low=222, high=555)
    start, labels = jnp.ones((2, 1, 1, 1)), jnp.array([3, 4], jnp.int32)
    run = jax.jit(
        lambda x, y: sampler(
            GaussianDiffusion(), recording_denoiser(calls, 2), x, y, lambda i: jnp.zeros_like(x), steps=10,
            guidance=guidance,
        )
    )
    run(start, labels).block_until_ready()
    jax.effects_barrier()
    assert [times[0] for times, _ in calls] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    for times, seen_labels in calls:
        guided = 222 <= times[0] <= 555
        assert seen_labels == ([3, 4, 7, 7] if guided else [3, 4])
        assert times == [times[0]] * len(seen_labels)


@pytest.mark.parametrize(("guided_channels", "expected"), [(None, [7 + 2 * (3 - 7)] * 4), (3, [-1, -1, -1, 3])])
def test_guidance_leaves_the_variance_to_the_conditional_branch(guided_channels, expected):
    """With a network that predicts its label: noise w y + (1 - w) null where guided, variance code always y."""
    process = GaussianDiffusion()
    guidance = Guidance(null=7, scale=2.0, channels=guided_channels)
    start, labels = jnp.full((1, 1, 1, 4), 0.5), jnp.array([3], jnp.int32)
    unit = jnp.ones((1, 1, 1, 4))
    noisy, quiet = (
        ddpm(
            process, recording_denoiser([], 8), start, labels, lambda i, amount=amount: (i == 0) * amount * unit,
            steps=2, guidance=guidance,
        )
        for amount in (1.0, 0.0)
    )
    # Two steps, t = 999 and t = 0, by hand. The network does not look at x, so noise only rides on x.
    tables = process.respaced(2)
    after_first = (
        tables.posterior_mean_coef1[1]
        * (tables.sqrt_recip_alphas_cumprod[1] * 0.5 - tables.sqrt_recipm1_alphas_cumprod[1] * np.array(expected))
        + tables.posterior_mean_coef2[1] * 0.5
    )
    scale, noise_scale = tables.sqrt_recip_alphas_cumprod[0], tables.sqrt_recipm1_alphas_cumprod[0]
    final = scale * after_first - noise_scale * np.array(expected)
    np.testing.assert_allclose(quiet[0, 0, 0], final, rtol=1e-4)
    smallest, largest = tables.posterior_log_variance_clipped[1], np.log(tables.betas[1])
    std = np.exp((smallest + (3 + 1) / 2 * (largest - smallest)) / 2)
    np.testing.assert_allclose((noisy - quiet)[0, 0, 0], [std * scale] * 4, rtol=1e-3)


def test_state_is_float32_whatever_the_network_computes_in():
    process = GaussianDiffusion()
    start = jnp.ones((2, 2, 2, 3), jnp.bfloat16)

    def denoise(x, t, y):
        assert x.dtype == jnp.float32
        return jnp.concatenate([x, x], axis=-1).astype(jnp.bfloat16) * 0.1

    for sampler in (ddpm, ddim):
        x = sampler(process, denoise, start, jnp.zeros(2, jnp.int32), jnp.zeros_like, steps=3, guidance=UNGUIDED)
        assert x.dtype == jnp.float32
        assert x.shape == start.shape


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (ddpm, {"steps": 1001}, "at most 1000"),
        (ddim, {"steps": "ddim300"}, "ddim250 or ddim334"),
        (ddim, {"steps": 10, "eta": 1.5}, "eta=1.5 is out of range"),
        (ddim, {"steps": 10, "eta": float("nan")}, "eta=nan is out of range"),
        (ddpm, {"steps": 10, "guidance": Guidance(null=7, scale=2.0, channels=5)}, "1 .. 4, or None"),
        (ddpm, {"steps": 10, "guidance": Guidance(null=7, scale=2.0, channels=0)}, "1 .. 4, or None"),
    ],
)
def test_impossible_options_are_refused_before_the_network_runs(sampler, options, message):
    def denoise(x, t, y):
        raise AssertionError("the network must not run")

    start = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(UserError, match=message):
        sampler(
            GaussianDiffusion(), denoise, start, jnp.zeros(1, jnp.int32), lambda i: start,
            **{"guidance": UNGUIDED, **options},
        )


def test_checks_accept_what_the_samplers_run_and_refuse_what_they_refuse():
    process = GaussianDiffusion()
    for steps in (250, "10,15,20", "ddim25"):
        check_ddpm(process, SimpleNamespace(steps=steps))
        check_ddim(process, SimpleNamespace(steps=steps, eta=0.5))
    for check in (check_ddpm, check_ddim):
        with pytest.raises(UserError, match="at most 1000"):
            check(process, SimpleNamespace(steps=1001, eta=0.0))
    with pytest.raises(UserError, match="eta=-1 is out of range"):
        check_ddim(process, SimpleNamespace(steps=10, eta=-1))
