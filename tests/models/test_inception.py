import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sra_jax.interop.inception import random_parameters
from sra_jax.models import inception
from sra_jax.models.inception import Inception, resize_bilinear_tf1


def resize_pixel_by_pixel(image, height, width):
    """The definition, one output pixel at a time."""
    out = np.empty((height, width, image.shape[2]))
    for i in range(height):
        for j in range(width):
            y, x = i * image.shape[0] / height, j * image.shape[1] / width
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


@pytest.mark.parametrize(
    ("before", "after"), [((5, 9), (23, 11)), ((23, 17), (7, 8)), ((8, 8), (8, 8)), ((1, 1), (3, 2))]
)
def test_resize(before, after):
    images = np.random.default_rng(0).integers(0, 256, (2, *before, 3), dtype=np.uint8)
    expected = np.stack([resize_pixel_by_pixel(image.astype(float), *after) for image in images])
    np.testing.assert_allclose(resize_bilinear_tf1(images, after), expected, atol=1e-3)


def test_average_pool_divides_by_the_pixels_inside():
    x = np.random.default_rng(0).standard_normal((2, 5, 4, 3), dtype=np.float32)
    expected = np.empty_like(x)
    for i in range(5):
        for j in range(4):
            expected[:, i, j] = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean(axis=(1, 2))
    np.testing.assert_allclose(inception._average_pool(jnp.asarray(x)), expected, atol=1e-6)


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_valid_convolution_and_max_pool(side, stride):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, side, side, 4), dtype=np.float32))
    convolution = inception.Convolution(4, 6, 3, stride=stride, valid=True)
    expected = nnx.Conv(4, 6, (3, 3), stride, padding="VALID", rngs=nnx.Rngs(0))
    expected.kernel[...] = convolution.kernel[...]
    np.testing.assert_allclose(convolution(x), expected(x), atol=1e-5)
    pooled = nnx.max_pool(x, (3, 3), (stride, stride), "VALID")
    np.testing.assert_array_equal(inception._max_pool(x, stride), pooled)


def test_features_are_of_each_image_alone():
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    graphdef, _ = nnx.split(nnx.eval_shape(Inception))
    run = jax.jit(lambda parameters, images: nnx.merge(graphdef, parameters)(images))
    parameters = random_parameters()
    features = run(parameters, images)
    assert [values.shape for values in features] == [(3, 2048), (3, 1008), (3, 2023)]
    assert all(values.dtype == jnp.float32 and np.isfinite(values).all() for values in features)
    other = run(parameters, images[[2, 0, 1]])
    for values, reordered in zip(features, other, strict=True):
        np.testing.assert_allclose(reordered, np.asarray(values)[[2, 0, 1]], rtol=1e-4, atol=1e-5)
        assert np.abs(np.asarray(values)[0] - np.asarray(values)[1]).max() > 0.01
    np.testing.assert_allclose(features.logits, np.asarray(features.pool) @ parameters["fc"]["kernel"], atol=1e-4)
