import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sra_jax.models.autoencoder import (
    Autoencoder,
    AutoencoderConfig,
    AutoencoderKL,
    GroupNorm,
    abstract_model,
    map_slices,
)


@pytest.fixture(scope="module")
def autoencoder(tiny_vae):
    return Autoencoder(tiny_vae.config, tiny_vae.params)


def images(count, side=16):
    return np.random.default_rng(0).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


def test_the_default_is_stable_diffusions_size():
    _, shapes = abstract_model(AutoencoderConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_group_norm_by_its_definition():
    rng = np.random.default_rng(0)
    norm = GroupNorm(6, groups=3)
    scale, bias = rng.normal(size=(2, 6))
    norm.scale.set_value(jnp.asarray(scale, jnp.float32))
    norm.bias.set_value(jnp.asarray(bias, jnp.float32))
    x = rng.normal(100.0, 2.0, (2, 4, 5, 6))  # a mean that a difference of squares would not survive
    grouped = x.reshape(2, 20, 3, 2)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=2e-5)


@pytest.mark.parametrize(("batch", "slice_size", "shards"), [(7, 3, 1), (6, 2, 1), (4, 9, 1), (12, 2, 2), (20, 3, 4)])
def test_slices_are_the_whole(batch, slice_size, shards):
    x = jnp.arange(batch * 2.0).reshape(batch, 2)

    def function(part):
        return {"sum": part.sum(-1), "square": part**2}

    sliced = jax.jit(lambda x: map_slices(function, x, slice_size, shards))(x)
    jax.tree.map(np.testing.assert_array_equal, sliced, function(x))


def test_devices_and_slices_change_nothing(autoencoder):
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("data",))
    batch = images(3 * len(devices))
    split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    whole, parts = autoencoder.encode(batch, slice_size=2), autoencoder.encode(split, slice_size=2)
    assert len(parts[0].sharding.device_set) == len(devices)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_mesh_may_have_axes_that_do_not_split_the_batch(autoencoder):
    mesh = Mesh(np.array(jax.devices()).reshape(1, -1), ("data", "model"))
    latents = jnp.ones((3, 8, 8, 4))
    split = jax.device_put(latents, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(autoencoder.decode_uint8(split), autoencoder.decode_uint8(latents))


def test_bfloat16_stays_close(tiny_vae, autoencoder):
    half = Autoencoder(tiny_vae.config, tiny_vae.params, dtype=jnp.bfloat16)
    exact, rounded = autoencoder.encode(images(2)), half.encode(images(2))
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == jnp.float32
        difference = np.abs(one - other).max() / np.abs(one).max()
        assert 0 < difference < 0.05


def test_scaling_with_a_shift_and_back():
    config = AutoencoderConfig(scaling_factor=0.25, shift_factor=3.0)
    np.testing.assert_allclose(config.scale(jnp.array([3.0, 7.0])), [0.0, 1.0])
    np.testing.assert_allclose(config.unscale(config.scale(jnp.array([-2.0, 5.5]))), [-2.0, 5.5])


def test_downsampling_is_that_of_the_latents():
    config = AutoencoderConfig(block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=3)
    graphdef, shapes = abstract_model(config)

    def shape_of(job, *size):
        argument = jax.ShapeDtypeStruct(size, jnp.float32)
        return jax.eval_shape(lambda params, x: job(nnx.merge(graphdef, params), x), shapes, argument)

    mean, std = shape_of(AutoencoderKL.encode, 2, 32, 24, 3)
    assert mean.shape == std.shape == (2, 32 // config.downsampling, 24 // config.downsampling, 3)
    assert shape_of(AutoencoderKL.decode, *mean.shape).shape == (2, 32, 24, 3)
