"""DDPM and DiT against the authors' code: dit_loss.npz and dit_sampling.npz."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.diffusion.gaussian import Coefficients, GaussianDiffusion, respaced_timesteps
from sra_jax.diffusion.guidance import Guidance
from sra_jax.diffusion.registry import SAMPLERS, process_defaults
from sra_jax.interop.pytorch import depth_of, params_from_pytorch, pytorch_from_params
from sra_jax.models.transformer import time_features
from sra_jax.runs.state import Networks
from sra_jax.training.step import total_loss
from tests.parity.stored import blocks, require

TOLERANCE = 3e-5  # one unit in the last place of a frequency times t = 999 shows in the outputs
GRADIENT_TOLERANCE = 1e-4


def nhwc(array: np.ndarray) -> jnp.ndarray:
    """Goldens are (..., C, H, W)."""
    return jnp.asarray(np.moveaxis(array, -3, -1))


def assert_close(actual, expected, tolerance: float, name: str = "") -> None:
    """Within `tolerance` of the largest magnitude in `expected`."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


def meta(arrays: dict[str, np.ndarray]) -> dict:
    return json.loads(str(arrays["meta/config"]))


def state_dict(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def params_of(arrays: dict[str, np.ndarray], prefix: str = "sd/"):
    return jax.tree.map(jnp.asarray, params_from_pytorch(state_dict(arrays, prefix), meta(arrays)["num_heads"]))


def process_of(arrays: dict[str, np.ndarray]) -> GaussianDiffusion:
    return GaussianDiffusion(num_steps=len(arrays["sched/betas"]))


def recipe(arrays: dict[str, np.ndarray]) -> ConfigDict:
    """The config of the golden run of dit_loss.npz."""
    described, tensors = meta(arrays), state_dict(arrays, "sd/")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    config = config_lib.default()
    config.steps = 1
    config.data.update(
        image_size=arrays["in/x0"].shape[-1], channels=channels,
        num_classes=len(tensors["y_embedder.embedding_table.weight"]) - 1,
    )  # fmt: skip
    config.model.update(
        patch=patch, depth=depth_of(tensors), width=width, heads=described["num_heads"],
        mlp_ratio=len(tensors["blocks.0.mlp.fc1.weight"]) / width,
    )  # fmt: skip
    config.process = ConfigDict({"name": "gaussian", **process_defaults("gaussian")})
    config.process.num_steps = len(arrays["sched/betas"])
    config.alignment.update(
        student_block=described["block_out_s"], teacher_block=described["block_out_t"],
        weight=described["align_weight"],
    )  # fmt: skip
    config.sampling.update(sampler="ddpm", eta=0.0)
    config_lib.check(config.lock())
    assert config_lib.process_of(config) == process_of(arrays)
    return config


def assert_tables(tables: Coefficients, arrays: dict[str, np.ndarray], prefix: str) -> None:
    derived = {
        "alphas_cumprod_next": np.append(tables.alphas_cumprod[1:], 0.0),
        "log_one_minus_alphas_cumprod": np.log(1 - tables.alphas_cumprod),
    }
    names = [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]
    assert names
    for name in names:
        if part := re.fullmatch(r"(\w+)_(first|last)(\d+)", name):
            table, count = getattr(tables, part[1]), int(part[3])
            derived[name] = table[:count] if part[2] == "first" else table[-count:]
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
            assert_close(row, expected, 1e-5, name)


def test_dit_loss_forward(golden):
    arrays = golden("dit_loss")
    model = Networks(recipe(arrays)).model(params_of(arrays))
    x, t, y = nhwc(arrays["fwd/x"]), jnp.asarray(arrays["fwd/t"]), jnp.asarray(arrays["fwd/y"])
    stored = blocks(arrays, "fwd/block_#")
    prediction, features = jax.jit(functools.partial(model, taps=tuple(stored)))(x, t, y)
    assert_close(prediction, nhwc(arrays["fwd/out"]), TOLERANCE)
    for (number, expected), tokens in zip(stored.items(), features, strict=True):
        assert_close(tokens, expected, TOLERANCE, f"block {number}")
    np.testing.assert_allclose(time_features(t), arrays["fwd/t_freq"], rtol=0, atol=1e-4)
    assert_close(model.time_embedding(t), arrays["fwd/t_emb"], TOLERANCE)
    assert_close(model.label_embedding(y), arrays["fwd/y_emb"], 1e-7)


def test_dit_loss_published_guidance(golden):
    """On the first three channels; the others are the conditional branch's in the first half, ours, and the null
    label's in the second half, which we do not compute."""
    arrays = golden("dit_loss")
    model = Networks(recipe(arrays)).model(params_of(arrays))
    half = len(arrays["cfg/x"]) // 2
    x, t, y = nhwc(arrays["cfg/x"])[:half], jnp.asarray(arrays["cfg/t"][:half]), jnp.asarray(arrays["cfg/y"][:half])
    guidance = Guidance(int(arrays["cfg/y"][-1]), scale=meta(arrays)["cfg_scale"], channels=3)
    guided = jax.jit(guidance.guide(lambda x, t, y: model(x, t, y)[0]))(x, t, y)
    expected = nhwc(arrays["cfg/out"])
    assert_close(guided, expected[:half], TOLERANCE)
    assert_close(guided[..., :3], expected[half:, ..., :3], TOLERANCE)


def test_dit_loss_total_and_gradients(golden):
    """The train step's loss from latents, times and labels, and its gradient in every parameter."""
    arrays = golden("dit_loss")
    config = recipe(arrays)
    example = {
        "x0": nhwc(arrays["in/x0"]), "e": nhwc(arrays["in/noise"]), "y": jnp.asarray(arrays["in/labels"]),
        "t": jnp.asarray(arrays["in/t"]), "s": jnp.asarray(arrays["in/t_teacher"]),
    }  # fmt: skip
    teacher = params_of(arrays, "ema/")

    def loss(params):
        return total_loss(
            params, teacher, example, {"sra": config.alignment.weight}, networks=Networks(config),
            process=process_of(arrays), methods=config_lib.methods_of(config),
        )  # fmt: skip

    (total, (metrics, _)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params_of(arrays))
    assert_close(total, arrays["loss/total"], TOLERANCE)
    assert_close(metrics["loss_denoising"], arrays["loss/loss"].mean(), TOLERANCE)
    assert_close(metrics["loss_alignment"], arrays["loss/align_sml1"], TOLERANCE)
    tensors = pytorch_from_params(gradients, config.data.channels, config.data.image_size)
    stored = state_dict(arrays, "loss/grad/")
    assert stored
    for name, expected in stored.items():
        assert_close(tensors[name], expected, GRADIENT_TOLERANCE, name)
    norms = [np.linalg.norm(tensors[str(name)]) for name in arrays["param_names"]]
    assert_close(norms, arrays["loss/grad_l2"], GRADIENT_TOLERANCE)
    assert_close(optax.tree.norm(gradients), arrays["loss/grad_norm"], GRADIENT_TOLERANCE)


def test_dit_loss_features(golden):
    """What is aligned: the student's tokens through its head and the teacher's, which stops at its block."""
    arrays = golden("dit_loss")
    config = recipe(arrays)
    networks, student, teacher = Networks(config), params_of(arrays), params_of(arrays, "ema/")
    y = jnp.asarray(arrays["in/labels"])
    prediction, (tokens,) = networks.model(student)(
        nhwc(arrays["loss/x_t"]), jnp.asarray(arrays["in/t"]), y, taps=(config.alignment.student_block,)
    )
    assert_close(prediction, nhwc(arrays["loss/model_output"]), TOLERANCE)
    assert_close(networks.head(student, "head")(tokens), arrays["loss/student_proj"], TOLERANCE)
    last = config.alignment.teacher_block
    _, (tokens,) = networks.model(teacher)(
        nhwc(arrays["loss/x_t_teacher"]), jnp.asarray(arrays["in/t_teacher"]), y, taps=(last,), stop=last
    )
    assert_close(tokens, arrays["loss/teacher_feat"], TOLERANCE)


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


@pytest.mark.parametrize("run", ["ddpm", "ddpm_cfg", "ddim", "ddim_cfg"])
def test_dit_sampling_run(golden, run):
    """From the stored noise to latents inside one jitted program: every state that the network saw, and the result.

    The reference runs guidance on a doubled state of which only the first half reaches the network: that half is ours.
    """
    arrays, weights = golden("dit_sampling"), golden("dit_loss")
    require(arrays, f"run/{run}/x")
    described = meta(arrays)
    model = Networks(recipe(weights)).model(params_of(weights))
    guided = run.endswith("_cfg")
    count = len(arrays["in/z"])
    step_noise = nhwc(arrays["noise/cfg" if guided else "noise/plain"])[:, :count]
    guidance = Guidance(described["null_label"], scale=described["cfg_scale"] if guided else 1.0, channels=3)
    seen = []

    def denoise(x, t, y):
        jax.debug.callback(lambda x, t: seen.append((np.array(x[:count]), int(t[0]), len(x))), x, t, ordered=True)
        return model(x, t, y)[0]

    @jax.jit
    def sample(noise, labels):
        return SAMPLERS[run.removesuffix("_cfg")].sample(
            process_of(weights), denoise, noise, labels, lambda i: step_noise[i],
            steps=described["timestep_respacing"], guidance=guidance,
        )  # fmt: skip

    latents = sample(nhwc(arrays["in/z"]), jnp.asarray(arrays["in/y"]))
    jax.effects_barrier()
    assert_close(latents, nhwc(arrays[f"run/{run}/x"]), TOLERANCE)
    states, times, sizes = zip(*seen, strict=True)
    assert list(times) == arrays["resp/timestep_map"][::-1].tolist()
    assert set(sizes) == {2 * count if guided else count}
    np.testing.assert_array_equal(states[0], nhwc(arrays["in/z"]))
    for state, expected in zip([*states[1:], latents], nhwc(arrays[f"run/{run}/traj"]), strict=True):
        assert_close(state, expected, TOLERANCE)
