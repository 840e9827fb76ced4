import numpy as np
import pytest

from sra_jax.errors import UserError
from sra_jax.evaluation.kid import kernel_distance, squared_mmd


def test_definition():
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((5, 3)), generator.standard_normal((6, 3)) + 1

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    within_first = np.mean([kernel(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j])
    within_second = np.mean([kernel(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j])
    between = np.mean([kernel(x, y) for x in first for y in second])
    assert squared_mmd(first, second) == pytest.approx(within_first + within_second - 2 * between, rel=1e-12)


@pytest.mark.parametrize("shift", [0, 10, 100])
def test_single_precision_loses_no_digits_to_what_features_share(shift):
    generator = np.random.default_rng(0)
    first, second = (
        (generator.standard_normal((200, 64)) + shift + more).astype(np.float32) for more in (0, 0.01)
    )
    exact = squared_mmd(first.astype(np.float64), second.astype(np.float64))
    assert squared_mmd(first, second) == pytest.approx(exact, rel=2e-5, abs=1e-9)


def test_unbiased():
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 1000, 8)).astype(np.float32)
    same = kernel_distance(first, second, subsets=50, subset_size=100)
    assert abs(same.mean) < 3 * same.std / 50**0.5 + 1e-3
    assert same == kernel_distance(first, second, subsets=50, subset_size=100)
    assert kernel_distance(first, second + 1, subsets=5, subset_size=100).mean > 0.5


def test_small_sets_are_compared_in_subsets_of_their_size():
    features = np.random.default_rng(0).standard_normal((30, 4))
    result = kernel_distance(features, features[:20], subsets=3)
    assert result.subset_size == 20
    with pytest.raises(UserError, match="at least 2 images in each set, got 30 and 1"):
        kernel_distance(features, features[:1])
