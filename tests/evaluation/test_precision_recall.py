import numpy as np
import pytest

from sra_jax.errors import UserError
from sra_jax.evaluation.precision_recall import precision_recall, squared_radii


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
