import numpy as np
import pytest
from scipy.linalg import sqrtm

from sra_jax.errors import UserError
from sra_jax.evaluation.frechet import fid_infinity, frechet_distance
from sra_jax.evaluation.statistics import GaussianStatistics, gaussian_statistics


def statistics(seed, count, width=40, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((width, width))
    return gaussian_statistics(generator.standard_normal((count, width)) @ mixing * scale + shift)


def test_closed_form_of_diagonal_gaussians():
    first = GaussianStatistics(np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 0.0]))
    second = GaussianStatistics(np.array([1.0, 1.0, 4.0]), np.diag([9.0, 1.0, 16.0]))
    np.testing.assert_allclose(frechet_distance(first, second), 1 + 4 + 2**2 + 1**2 + 4**2, rtol=1e-12)


def test_equals_the_matrix_root():
    first, second = statistics(0, 500), statistics(1, 400, scale=1.3, shift=0.2)
    root = sqrtm(first.covariance @ second.covariance)
    expected = (
        np.square(first.mean - second.mean).sum()
        + np.trace(first.covariance)
        + np.trace(second.covariance)
        - 2 * np.trace(root).real
    )
    np.testing.assert_allclose(frechet_distance(first, second), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(second, first), expected, rtol=1e-9)


@pytest.mark.parametrize("count", [3, 30, 500])
def test_equal_sets_are_at_distance_zero_with_any_rank(count):
    assert frechet_distance(statistics(0, count), statistics(0, count)) < 1e-6


def test_without_full_rank():
    # Two lines in 40 dimensions: the covariances have rank one, and the distance a closed form.
    u, v = np.zeros(40), np.zeros(40)
    u[0], v[:2] = 2, [3, 4]
    zero = np.zeros(40)
    distance = frechet_distance(GaussianStatistics(zero, np.outer(u, u)), GaussianStatistics(zero, np.outer(v, v)))
    np.testing.assert_allclose(distance, 4 + 25 - 2 * 6, rtol=1e-9)
    few = frechet_distance(statistics(0, 10), statistics(1, 12))
    assert np.isfinite(few)
    assert few > 0


def test_what_cannot_be_compared():
    with pytest.raises(UserError, match="40 and of 30 features"):
        frechet_distance(statistics(0, 50), statistics(0, 50, width=30))
    broken = GaussianStatistics(np.full(40, np.nan), np.eye(40))
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(broken, statistics(0, 50))


def test_fid_infinity_removes_the_bias_of_few_samples():
    width = 16
    features = np.random.default_rng(0).standard_normal((2000, width)).astype(np.float32)
    truth = GaussianStatistics(np.zeros(width), np.eye(width))
    biased = frechet_distance(gaussian_statistics(features), truth)
    unbiased = fid_infinity(features, truth)
    assert abs(unbiased) < 0.5 * biased
    assert unbiased == fid_infinity(features, truth)
    assert unbiased != fid_infinity(features, truth, seed=1)
    with pytest.raises(UserError, match="at least 20"):
        fid_infinity(features[:19], truth)
