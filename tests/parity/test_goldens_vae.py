"""The autoencoder against numbers of the authors' PyTorch stack; every size is read from the golden file."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sra_jax.interop import autoencoder as interop
from sra_jax.models.autoencoder import LOG_VARIANCE_RANGE, Autoencoder, abstract_model
from tests.parity.conftest import GOLDENS

TOLERANCE = 1e-5  # of the largest magnitude in an array



def autoencoders():
    """Names of the file's autoencoders; one that stands for the file where there is none."""
    path = GOLDENS / "vae.npz"
    if not path.exists():
        return ["vae"]
    described = json.loads(str(np.load(path)["meta/config"]))
    return [name for name, value in described.items() if isinstance(value, dict)]


def nhwc(array):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def assert_close(ours, theirs, tolerance=TOLERANCE):
    np.testing.assert_allclose(ours, nhwc(theirs), rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.fixture(scope="module", params=autoencoders())
def vae(request, golden):
    """(config, parameters, golden arrays) of one of the file's autoencoders, names without its prefix."""
    arrays = golden("vae")
    prefix = request.param + "/"
    own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    if not own:
        pytest.skip(f"the golden file has no {prefix}")
    config = interop.config_from_json(json.dumps(json.loads(str(arrays["meta/config"]))[request.param]), request.param)
    tensors = {key.removeprefix("sd/"): array for key, array in own.items() if key.startswith("sd/")}
    return config, interop.params_from_tensors(tensors, config, request.param), own


@pytest.fixture(scope="module")
def model(vae):
    config, params, _ = vae
    graphdef, _ = abstract_model(config)
    return nnx.merge(graphdef, params)


def test_vae_encode(vae):
    config, params, own = vae
    mean, std = Autoencoder(config, params).encode(jnp.asarray(nhwc(own["in/image"])))
    assert_close(mean, own["enc/mean"])
    np.testing.assert_allclose(std, nhwc(own["enc/std"]), rtol=3e-5)
    low, high = LOG_VARIANCE_RANGE
    np.testing.assert_allclose([own["enc/std"].min(), own["enc/std"].max()], np.exp([low / 2, high / 2]), rtol=1e-6)


def test_vae_decode(vae):
    config, params, own = vae
    latents = jnp.asarray(nhwc(own["in/z"]))
    autoencoder = Autoencoder(config, params)
    assert_close(autoencoder.decode(latents), own["dec/image"])
    images = np.clip((nhwc(own["dec/image"]) + 1) / 2 * 255, 0, 255)
    decoded = np.asarray(autoencoder.decode_uint8(config.scale(latents)))
    # truncation: a step away from a whole number at most where float noise crosses it
    assert np.abs(decoded.astype(int) - np.floor(images)).max() <= 1
    assert (decoded == np.floor(images)).mean() > 0.99


def test_vae_encoder_stages(vae, model):
    _, _, own = vae
    images = jnp.asarray(nhwc(own["in/image"]))
    x = model.encoder.conv_in(images)
    for stage in model.encoder.down:
        x = stage(x)
    kept = own["enc/mid"].shape[0]
    mid = model.encoder.mid
    assert_close(mid.attention(mid.resnets[0](x))[:kept], own["enc/attn"])
    assert_close(mid(x)[:kept], own["enc/mid"])
    assert_close(model.encoder(images), own["enc/encoder_out"])
    assert_close(model.quant_conv(model.encoder(images)), own["enc/moments_raw"])


def test_vae_decoder_mid_block(vae, model):
    _, _, own = vae
    x = model.decoder.conv_in(model.post_quant_conv(jnp.asarray(nhwc(own["in/z"]))))
    assert_close(model.decoder.mid(x)[: own["dec/mid"].shape[0]], own["dec/mid"])


def test_vae_norm_epsilon(vae, model):
    _, _, own = vae
    assert_close(model.encoder.norm_out(jnp.asarray(nhwc(own["eps/x_small"]))), own["eps/norm_out"])


def test_vae_names_return_every_tensor(vae):
    _, params, own = vae
    tensors = {key.removeprefix("sd/"): array for key, array in own.items() if key.startswith("sd/")}
    returned = interop.tensors_from_params(params)
    assert returned.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(returned[name], array)
