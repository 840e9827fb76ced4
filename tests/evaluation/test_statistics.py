import numpy as np
import pytest

from sra_jax.errors import UserError
from sra_jax.evaluation.statistics import Moments


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batches_and_merges_equal_the_whole(offset):
    features = np.random.default_rng(0).standard_normal((101, 7)) + offset
    in_batches = Moments.empty(7)
    for start in range(0, 60, 8):
        in_batches.update(features[start : min(start + 8, 60)])
    in_batches.merge(Moments.of(features[60:]))
    in_batches.merge(Moments.empty(7))
    statistics = in_batches.statistics()
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), atol=1e-9)


def test_float32_features_are_summed_in_float64():
    features = (np.random.default_rng(0).standard_normal((500, 3)) + 1000).astype(np.float32)
    statistics = Moments.of(features).statistics()
    np.testing.assert_allclose(statistics.covariance, np.cov(features.astype(float), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few(count):
    with pytest.raises(UserError, match=f"at least 2 images, got {count}"):
        Moments.of(np.ones((count, 3))).statistics()
