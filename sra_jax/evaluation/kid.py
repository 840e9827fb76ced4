"""Kernel Inception distance (Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401, section 4)."""

from typing import NamedTuple

import numpy as np

from sra_jax.errors import UserError


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets, and the subsets' size."""

    mean: float
    std: float
    subset_size: int


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, float64.

    Args:
      first, second: features (N,D) and (M,D), at least two of each.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_of_pairs(x: np.ndarray) -> float:
        matrix = kernel(x, x)
        return (matrix.sum() - np.trace(matrix)) / (len(x) * (len(x) - 1))

    return float(mean_of_pairs(first) + mean_of_pairs(second) - 2 * kernel(first, second).mean())


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
