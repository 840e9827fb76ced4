"""DDPM and DiT against the authors' code: dit_loss.npz and dit_sampling.npz."""

import json

import jax.numpy as jnp
import numpy as np

from sra_jax.diffusion.gaussian import Coefficients, GaussianDiffusion, respaced_timesteps

SAMPLING_SPECS = ("250", "25", "7", "10,15,20", "ddim25")


def nhwc(array: np.ndarray) -> jnp.ndarray:
    """Goldens are (..., C, H, W)."""
    return jnp.asarray(np.moveaxis(array, -3, -1))


def assert_close(actual, expected, tolerance: float) -> None:
    """Within `tolerance` of the largest magnitude in `expected`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def meta(arrays: dict[str, np.ndarray]) -> dict:
    return json.loads(str(arrays["meta/config"]))


def process_of(arrays: dict[str, np.ndarray]) -> GaussianDiffusion:
    return GaussianDiffusion(num_steps=len(arrays["sched/betas"]))


def assert_tables(tables: Coefficients, arrays: dict[str, np.ndarray], prefix: str) -> None:
    derived = {
        "alphas_cumprod_next": np.append(tables.alphas_cumprod[1:], 0.0),
        "log_one_minus_alphas_cumprod": np.log(1 - tables.alphas_cumprod),
        "betas_first5": tables.betas[:5],
        "betas_last5": tables.betas[-5:],
        "alphas_cumprod_first5": tables.alphas_cumprod[:5],
        "alphas_cumprod_last5": tables.alphas_cumprod[-5:],
    }
    names = [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]
    assert len(names) >= 13
    for name in names:
        if name == "timestep_map":
            np.testing.assert_array_equal(tables.timesteps, arrays[prefix + name])
            continue
        table = derived[name] if name in derived else getattr(tables, name)
        assert table.dtype == np.float64
        np.testing.assert_allclose(table, arrays[prefix + name], rtol=1e-10, atol=0, err_msg=name)


def test_dit_loss_schedule(golden):
    arrays = golden("dit_loss")
    assert_tables(process_of(arrays).coefficients, arrays, "sched/")


def test_dit_loss_teacher_times(golden):
    arrays = golden("dit_loss")
    s = process_of(arrays).truncate_teacher_time(jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/teacher_offset"]))
    np.testing.assert_array_equal(s, arrays["in/t_teacher"])


def test_dit_loss_perturbed_latents(golden):
    arrays = golden("dit_loss")
    x0, noise = nhwc(arrays["in/x0"]), nhwc(arrays["in/noise"])
    for time, perturbed in (("in/t", "loss/x_t"), ("in/t_teacher", "loss/x_t_teacher")):
        x = process_of(arrays).perturb(x0, noise, jnp.asarray(arrays[time]))
        assert_close(x, nhwc(arrays[perturbed]), 1e-6)


def test_dit_loss_terms_from_the_stored_output(golden):
    arrays = golden("dit_loss")
    process = process_of(arrays)
    x0, noise, t = nhwc(arrays["in/x0"]), nhwc(arrays["in/noise"]), jnp.asarray(arrays["in/t"])
    prediction, x_t = nhwc(arrays["loss/model_output"]), nhwc(arrays["loss/x_t"])
    # Each example for itself: the bound's terms differ by orders of magnitude.
    vb = process.variational_bound_term(prediction, x0, x_t, t)
    np.testing.assert_allclose(vb, arrays["loss/vb"], rtol=3e-5)
    loss = process.loss(prediction, x0, noise, t)
    np.testing.assert_allclose(loss, arrays["loss/loss"], rtol=1e-5)
    np.testing.assert_allclose(loss - vb, arrays["loss/mse"], rtol=1e-5)
    mean_only = GaussianDiffusion(num_steps=process.num_steps, variance="fixed_small")
    noise_only = prediction[..., : x0.shape[-1]]
    np.testing.assert_allclose(mean_only.loss(noise_only, x0, noise, t), arrays["loss/mse"], rtol=1e-6)


def test_dit_loss_reverse_step(golden):
    arrays = golden("dit_loss")
    process = process_of(arrays)
    mean, log_variance, x0 = process.reverse_step(
        process.coefficients, nhwc(arrays["loss/model_output"]), nhwc(arrays["loss/x_t"]), jnp.asarray(arrays["in/t"])
    )
    for actual, name in ((mean, "pmv_mean"), (log_variance, "pmv_log_variance"), (x0, "pmv_pred_xstart")):
        for row, expected in zip(actual, nhwc(arrays[f"loss/{name}"]), strict=True):
            assert_close(row, expected, 1e-5)


def test_dit_sampling_respacings(golden):
    arrays = golden("dit_sampling")
    num_steps = process_of(golden("dit_loss")).num_steps
    maps = {key.removeprefix("timestep_map/"): kept for key, kept in arrays.items() if key.startswith("timestep_map/")}
    assert maps
    for spec, kept in maps.items():
        np.testing.assert_array_equal(respaced_timesteps(num_steps, spec), kept, err_msg=spec)


def test_dit_sampling_coefficients(golden):
    arrays = golden("dit_sampling")
    process = process_of(golden("dit_loss"))
    assert_tables(process.respaced(meta(arrays)["timestep_respacing"]), arrays, "resp/")
