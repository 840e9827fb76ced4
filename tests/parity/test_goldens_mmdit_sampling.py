"""Samplers with captions equal REPA's. The goldens' README.t2i.md explains every array; all settings are the file's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax.diffusion.guidance import Guidance
from sra_jax.diffusion.interpolant import Interpolant
from sra_jax.diffusion.registry import SAMPLERS
from sra_jax.interop import mmdit as interop
from tests.parity.test_goldens_mmdit_forward import Network, close, nhwc, state_dict


@pytest.fixture(scope="module")
def sampling(golden):
    """The arrays, the settings, and the network of the file that they name."""
    arrays = golden("mmdit_sampling")
    meta = json.loads(str(arrays["meta/config"]))
    tensors = state_dict(golden(meta["weights_file"].removesuffix(".npz")))
    return arrays, meta, Network(tensors, tensors[interop.POSITION_TABLE], meta["num_heads"], arrays["in/context"])


def test_mmdit_sampling(sampling):
    """Every run, from the stored noise to latents in one program, and what the network was asked on the way."""
    arrays, meta, network = sampling
    assert meta["runs"]
    asked = {key.split("/")[1] for key in arrays if key.startswith("run/")}
    assert asked == meta["runs"].keys()
    grids = set()
    for name, settings in meta["runs"].items():
        grids |= check(name, arrays, network, settings)
    assert grids == {key for key in arrays if key.endswith("/t_steps")}


def check(name, arrays, network, settings):
    """Compare a run; the names of the grids of times that were compared with it."""
    expected = state_dict(arrays, f"run/{name}/")
    sampler = "heun" if settings.get("heun") else settings["kind"]
    increments = nhwc(arrays["sde/noise"]) if "sde/noise" in arrays else None
    guidance = Guidance(
        {"context": arrays["in/context_null"]}, settings["cfg_scale"], settings.get("guidance_low", -np.inf),
        settings.get("guidance_high", np.inf),
    )  # fmt: skip
    rows = len(arrays["in/z"])
    calls = []

    def denoise(x, t, y):
        record = lambda x, t: calls.append((np.asarray(x), float(t[0])))  # noqa: E731
        jax.debug.callback(record, x, t, ordered=True)
        return network.model(x, t, y)[0]

    @jax.jit
    def sample(noise, context):
        return SAMPLERS[sampler].sample(
            Interpolant(settings.get("path_type", "linear")), denoise, noise, {"context": context},
            lambda i: increments[i], steps=settings["num_steps"], guidance=guidance,
        )  # fmt: skip

    latents = sample(nhwc(arrays["in/z"]), jnp.asarray(arrays["in/context"]))
    jax.effects_barrier()
    states, times = zip(*calls, strict=True)
    found = {
        "x": jnp.moveaxis(latents, -1, 1), "eval_t": np.array(times), "eval_batch": np.array([len(x) for x in states]),
        "eval_x": np.moveaxis(np.stack([x[:rows] for x in states]), -1, 2),
    }  # fmt: skip
    assert "x" in expected
    for key, value in expected.items():
        close(found[key], value, f"run/{name}/{key}")
    grids = {
        key: grid for key, grid in arrays.items()
        if key.endswith("/t_steps") and key.startswith(settings["kind"]) and len(grid) == settings["num_steps"] + 1
    }  # fmt: skip
    for grid in grids.values():  # without Heun's second evaluations, which come at the times where the next steps start
        starts = times[:1] + times[1::2] if sampler == "heun" else times
        close(np.append(starts[: len(grid) - 1], 0.0), grid)
    return set(grids)
