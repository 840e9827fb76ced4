"""The Frechet distance between two Gaussians (FID, sFID) and its value for infinitely many samples.

Heusel et al., "GANs trained by a two time-scale update rule", arXiv 1706.08500, equation 6; Chong and Forsyth,
"Effectively unbiased FID and Inception Score and where to find them", arXiv 1911.07023.
"""

import numpy as np
import scipy.linalg

from sra_jax.errors import UserError
from sra_jax.evaluation.statistics import GaussianStatistics, gaussian_statistics

WELL_CONDITIONED = 1e-9
"""Reciprocal condition number from which no eigenvalue of a covariance is a rounding error."""


def covariance_factor(covariance: np.ndarray) -> np.ndarray:
    """F of shape (D,R) with F F^T = covariance, R its numerical rank, float64.

    Cholesky's where the covariance is far from losing rank, in a tenth of the time. Else by eigenvalues, of which those
    below D * epsilon * (the largest) are rounding errors, of either sign, and are left out.
    """
    factor, failed = scipy.linalg.lapack.dpotrf(covariance, lower=1, clean=1)
    if not failed:
        norm = np.abs(covariance).sum(axis=0).max()
        reciprocal, _ = scipy.linalg.lapack.dpocon(factor, norm, uplo="L")
        if reciprocal > WELL_CONDITIONED:
            return factor
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    noise = len(covariance) * np.finfo(np.float64).eps * max(eigenvalues[-1], 0)
    kept = eigenvalues > noise
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])


def frechet_distance(
    first: GaussianStatistics, second: GaussianStatistics, *, second_factor: np.ndarray | None = None
) -> float:
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

    With S1 = A A^T and S2 = B B^T (`covariance_factor`), the last trace is the sum of the singular values of A^T B. No
    root of a matrix that need not be symmetric, no square root of rounding errors: covariances without full rank (fewer
    samples than features) are as good as any, and equal sets give zero to rounding.

    Args:
      first, second: statistics of features of the same length.
      second_factor: `covariance_factor(second.covariance)`, where many are compared with the same second one.

    Raises:
      UserError: lengths differ, or a value is not finite.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(f"statistics of {len(first.mean)} and of {len(second.mean)} features cannot be compared")
    for statistics in (first, second):
        if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.covariance).all()):
            raise UserError(
                "statistics hold NaN or infinite values: the file or the features they come from are broken"
            )
    if second_factor is None:
        second_factor = covariance_factor(second.covariance)
    overlap = covariance_factor(first.covariance).T @ second_factor
    root_trace = np.linalg.svd(overlap, compute_uv=False).sum()
    shift = np.asarray(first.mean, np.float64) - second.mean
    distance = shift @ shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * root_trace
    return float(max(distance, 0.0))


def fid_infinity(features: np.ndarray, reference: GaussianStatistics, *, points: int = 15, seed: int = 0) -> float:
    """The Frechet distance extrapolated to infinitely many samples.

    FID of N samples is too large by an amount proportional to 1/N. It is measured on random subsets of `points` sizes
    between a tenth of the samples and all, and a straight line in 1/N is continued to 1/N = 0. The line describes FID
    only where N is larger than the number of features. The reference is taken as it is.

    Args:
      features: (N,D) of the samples.
      reference: statistics of the reference set.
      points: how many subsets, at least 2.
      seed: of the subsets.

    Raises:
      UserError: fewer than 20 samples.
    """
    if len(features) < 20:
        raise UserError(f"fid_infinity needs at least 20 samples, got {len(features)}")
    generator = np.random.default_rng(seed)
    factor = covariance_factor(reference.covariance)
    sizes = np.linspace(len(features) // 10, len(features), points).astype(int)
    distances = []
    for size in sizes:
        subset = np.sort(generator.choice(len(features), size, replace=False))
        statistics = gaussian_statistics(features[subset])
        distances.append(frechet_distance(statistics, reference, second_factor=factor))
    _, intercept = np.polyfit(1 / sizes, distances, deg=1)
    return float(intercept)
