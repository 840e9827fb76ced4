"""Kernel Inception distance (Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, section 4)."""

from typing import NamedTuple

import numpy as np

from sra_jax.errors import UserError


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets, and the subsets' size."""

    mean: float
    std: float
    subset_size: int


class _Features(NamedTuple):
    """Features x (N,D) about a centre c.

    Attributes:
      apart: d = x - c, (N,D) in the features' own type.
      along: d.c / D, (N,) float64.
    """

    apart: np.ndarray
    along: np.ndarray


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, float64.

    Products are taken about the second set's mean, in float32 where the features are, which is twice as quick: what
    they have in common, most of them as a rule, is added in float64 and loses no digit.

    Args:
      first, second: features (N,D) and (M,D), at least two of each.
    """
    first, second = np.asarray(first), np.asarray(second)
    width, dtype = second.shape[1], np.result_type(first, second, np.float32)
    # In the features' type and back, so that each is the sum of the centre and of its difference from it.
    centre = second.mean(axis=0, dtype=np.float64).astype(dtype).astype(np.float64)
    x, y = (
        _Features(apart, apart.astype(np.float64) @ centre / width)
        for apart in (np.subtract(features, centre.astype(dtype), dtype=dtype) for features in (first, second))
    )
    one_and_common = 1 + centre @ centre / width

    def roots(x: _Features, y: _Features) -> np.ndarray:
        """x.y / D + 1, (N,M)."""
        products = x.apart @ y.apart.T
        products /= dtype.type(width)
        return (products + x.along[:, None]) + (y.along + one_and_common)

    def sum_of_cubes(x: np.ndarray) -> float:
        return float(np.vdot(x * x, x))

    def mean_of_pairs(x: _Features) -> float:
        matrix = roots(x, x)
        return (sum_of_cubes(matrix) - sum_of_cubes(np.diagonal(matrix))) / (len(matrix) * (len(matrix) - 1))

    between = roots(x, y)
    return mean_of_pairs(x) + mean_of_pairs(y) - 2 * sum_of_cubes(between) / between.size


def kernel_distance(
    samples: np.ndarray, reference: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID of features (N,D) and (M,D): the mean of `squared_mmd` over random subsets.

    Sets smaller than `subset_size` are compared in subsets of the smaller one's size; the result says which. An
    unbiased estimate of a small distance can be below zero.

    Raises:
      UserError: fewer than two features in a set.
    """
    subset_size = min(subset_size, len(samples), len(reference))
    if subset_size < 2:
        raise UserError(f"KID needs at least 2 images in each set, got {len(samples)} and {len(reference)}")
    generator = np.random.default_rng(seed)
    distances = []
    for _ in range(subsets):
        chosen_samples = generator.choice(len(samples), subset_size, replace=False)
        chosen_reference = generator.choice(len(reference), subset_size, replace=False)
        distances.append(squared_mmd(samples[chosen_samples], reference[chosen_reference]))
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)), subset_size)
