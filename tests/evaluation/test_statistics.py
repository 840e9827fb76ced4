import numpy as np
import pytest

from sra_jax.errors import UserError
from sra_jax.evaluation.statistics import Moments, gaussian_statistics


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("block", [1, 16, 1000])
def test_batches_and_merges_equal_the_whole(monkeypatch, offset, block):
    monkeypatch.setattr("sra_jax.evaluation.statistics.BLOCK", block)
    features = np.random.default_rng(0).standard_normal((101, 7)) + offset
    first, second, third = Moments(), Moments(), Moments()
    for start in range(0, 60, 8):
        first.update(features[start : min(start + 8, 60)])
    second.update(features[60:])
    first.merge(second)
    first.merge(Moments())
    third.merge(first)
    first.update(features)  # whoever merged it has its own copy
    assert (first.count, second.count, third.count) == (202, 41, 101)
    statistics = third.statistics()
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), atol=1e-9)


def test_float32_features_are_summed_in_float64():
    features = (np.random.default_rng(0).standard_normal((500, 3)) + 1000).astype(np.float32)
    statistics = gaussian_statistics(features)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.astype(float), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few(count):
    with pytest.raises(UserError, match=f"at least 2 images, got {count}"):
        gaussian_statistics(np.ones((count, 3)))
