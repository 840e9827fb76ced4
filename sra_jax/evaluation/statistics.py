"""Mean and covariance of features, accumulated batch by batch in float64."""

import dataclasses

import numpy as np

from sra_jax.errors import UserError

BLOCK = 2048


class Moments:
    """Running moments of feature vectors of length D.

    Sums of squares are kept about the running mean, so features with a large mean lose no digits, and two sets merge
    exactly as if they had been one (Chan, Golub, LeVeque: "Updating formulae and a pairwise algorithm", 1979). Vectors
    wait until there are BLOCK of them: adding to a (D,D) matrix costs the same for few as for many.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._mean = np.empty(0)  # (D,), from the first block on
        self._scatter = np.empty(0)  # (D,D), sum over vectors of (x - mean)(x - mean)^T
        self._waiting: list[np.ndarray] = []

    @property
    def count(self) -> int:
        """How many vectors were added."""
        return self._seen + sum(map(len, self._waiting))

    def update(self, features: np.ndarray) -> None:
        """Adds features (N,D), any N."""
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= BLOCK:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if self.count == self._seen:
            return
        features, self._waiting = np.concatenate(self._waiting), []
        for start in range(0, len(features), BLOCK):
            block = features[start : start + BLOCK].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            self._combine(len(block), mean, block.T @ block)

    def _combine(self, seen: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if not self._seen:
            self._seen, self._mean, self._scatter = seen, mean, scatter
            return
        total = self._seen + seen
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift * (self._seen * seen / total))
        self._mean = self._mean + shift * (seen / total)
        self._seen = total

    def merge(self, other: "Moments") -> None:
        """Adds the vectors that another accumulator has seen: of another device or process."""
        self._add_waiting()
        other._add_waiting()
        if other._seen:
            self._combine(other._seen, other._mean, other._scatter.copy())

    def statistics(self) -> "GaussianStatistics":
        """Mean and unbiased covariance (divisor count - 1) of all vectors added so far.

        Raises:
          UserError: fewer than two vectors.
        """
        self._add_waiting()
        if self._seen < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self._seen}")
        return GaussianStatistics(self._mean, self._scatter / (self._seen - 1))


def gaussian_statistics(features: np.ndarray) -> "GaussianStatistics":
    """Mean and unbiased covariance of features (N,D), N at least 2."""
    moments = Moments()
    moments.update(features)
    return moments.statistics()


@dataclasses.dataclass(frozen=True)
class GaussianStatistics:
    """Mean (D,) and covariance (D,D), float64: all that a Frechet distance needs to know of a set."""

    mean: np.ndarray
    covariance: np.ndarray
