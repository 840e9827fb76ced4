"""Mean and covariance of features, accumulated batch by batch in float64."""

import dataclasses

import numpy as np

from sra_jax.errors import UserError

BLOCK = 4096


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
            part = features[start : start + BLOCK]
            rows = np.empty((len(part) + 1, part.shape[1]))
            vectors = rows[:-1]
            vectors[:] = part
            mean = vectors.mean(axis=0)
            vectors -= mean
            # How far the means are apart counts as one more vector: no pass over the (D,D) matrix of its own.
            rows[-1] = self._move_mean(len(part), mean)
            self._add_scatter(rows.T @ rows)

    def _move_mean(self, seen: int, mean: np.ndarray) -> np.ndarray:
        """Takes in the mean of `seen` more vectors; returns (D,), by whose outer product the scatter grows with it."""
        if not self._seen:
            self._seen, self._mean = seen, mean
            return np.zeros_like(mean)
        total = self._seen + seen
        shift = mean - self._mean
        between = shift * np.sqrt(self._seen * seen / total)
        self._mean = self._mean + shift * (seen / total)
        self._seen = total
        return between

    def _add_scatter(self, scatter: np.ndarray) -> None:
        if self._scatter.size:
            self._scatter += scatter
        else:
            self._scatter = scatter

    def merge(self, other: "Moments") -> None:
        """Adds the vectors that another accumulator has seen: of another device or process."""
        self._add_waiting()
        other._add_waiting()
        if other._seen:
            between = self._move_mean(other._seen, other._mean)
            self._add_scatter(other._scatter + np.outer(between, between))

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
