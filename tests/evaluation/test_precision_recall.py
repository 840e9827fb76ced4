import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from sra_jax.errors import UserError
from sra_jax.evaluation import devices
from sra_jax.evaluation import precision_recall as precision_recall_lib
from sra_jax.evaluation.precision_recall import precision_recall, squared_radii
from sra_jax.models import blas


def brute_force(samples, reference, neighbours):
    def distances(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    sample_radii = np.sort(distances(samples, samples), axis=1)[:, neighbours]
    reference_radii = np.sort(distances(reference, reference), axis=1)[:, neighbours]
    between = distances(samples, reference)
    return (between <= reference_radii).any(1), (between <= sample_radii[:, None]).any(0), sample_radii, reference_radii


@pytest.mark.parametrize("block", [7, 32, 4096])
@pytest.mark.parametrize("neighbours", [1, 3])
def test_equals_brute_force_in_any_blocks(block, neighbours):
    generator = np.random.default_rng(0)
    samples = generator.standard_normal((70, 5)) * 1.2 + 100
    reference = generator.standard_normal((45, 5)) + 100
    result = precision_recall(
        samples.astype(np.float32), reference.astype(np.float32), neighbours=neighbours, block=block
    )
    covered, reference_covered, sample_radii, reference_radii = brute_force(samples, reference, neighbours)
    np.testing.assert_array_equal(result.samples_covered, covered)
    np.testing.assert_array_equal(result.reference_covered, reference_covered)
    np.testing.assert_allclose(result.samples_radii, sample_radii, rtol=1e-3)
    np.testing.assert_allclose(result.reference_radii, reference_radii, rtol=1e-3)
    assert 0 < result.precision < 1
    assert result.precision == covered.mean()
    assert result.recall == reference_covered.mean()


@pytest.mark.skipif(blas.refusal() is not None, reason=f"{blas.refusal()}")
def test_equals_brute_force_by_a_blas(monkeypatch):
    """As one device computes it on some CPUs."""
    called = []

    def multiply(*arguments):
        called.append(arguments)
        return by_blas(*arguments)

    by_blas = blas.multiply
    monkeypatch.setattr(blas, "multiply", multiply)
    monkeypatch.setattr(blas, "SMALLEST", 0)
    monkeypatch.setattr(blas, "gains", lambda: True)
    monkeypatch.setattr(devices, "_local_mesh", lambda: Mesh(np.array(jax.local_devices()[:1]), ("data",)))
    generator = np.random.default_rng(1)
    samples, reference = (generator.standard_normal((count, 6)).astype(np.float32) for count in (83, 52))
    result = precision_recall(samples, reference, block=32)
    covered, reference_covered, sample_radii, _ = brute_force(samples, reference, 3)
    assert called
    np.testing.assert_array_equal(result.samples_covered, covered)
    np.testing.assert_array_equal(result.reference_covered, reference_covered)
    np.testing.assert_allclose(result.samples_radii, sample_radii, rtol=1e-3)


@pytest.mark.parametrize("length", [5, 4096, 4097, 10_000, 50_000])
def test_blocks_are_about_full(length):
    """10,000 vectors are three blocks of 3,336, not of 4,096: what fills a block is computed, too."""
    block = precision_recall_lib._block_size(4096, length)
    blocks, count = -(-length // block), jax.local_device_count()
    assert block <= 4096 and block % count == 0
    assert blocks == -(-length // 4096)
    assert blocks * block - length < blocks * count


def test_equal_and_distant_sets():
    features = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    assert precision_recall(features, features)[:2] == (1, 1)
    assert precision_recall(features, features + 50)[:2] == (0, 0)


def test_repeated_images_have_radius_zero():
    features = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)
    np.testing.assert_array_equal(squared_radii(features), 0)


def test_what_cannot_be_computed():
    features = np.zeros((3, 4), np.float32)
    with pytest.raises(UserError, match="more than 3 images, got 3"):
        precision_recall(features, features)
    with pytest.raises(UserError, match="width 4 and 5"):
        precision_recall(features, np.zeros((9, 5), np.float32))
