"""Mean and covariance of features, accumulated batch by batch in float64."""

import dataclasses

import numpy as np

from sra_jax.errors import UserError


@dataclasses.dataclass
class Moments:
    """Running moments of feature vectors of length D.

    Sums of squares are kept about the running mean, so features with a large mean lose no digits, and two sets merge
    exactly as if they had been one (Chan, Golub, LeVeque: "Updating formulae and a pairwise algorithm", 1979).

    Attributes:
      count: how many vectors were seen.
      mean: (D,) float64.
      scatter: (D,D) float64, the sum over vectors of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, width: int) -> "Moments":
        return cls(0, np.zeros(width), np.zeros((width, width)))

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Moments of features (N,D), any N."""
        features = np.asarray(features, np.float64)
        if not len(features):
            return cls.empty(features.shape[1])
        mean = features.mean(axis=0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def update(self, features: np.ndarray) -> None:
        """Adds features (N,D)."""
        self.merge(Moments.of(features))

    def merge(self, other: "Moments") -> None:
        """Adds the vectors that another accumulator has seen: of another batch, device or process."""
        if not other.count:
            return
        count = self.count + other.count
        shift = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += np.outer(shift, shift * (self.count * other.count / count))
        self.mean = self.mean + shift * (other.count / count)
        self.count = count

    def statistics(self) -> "GaussianStatistics":
        """Mean and unbiased covariance (divisor count - 1).

        Raises:
          UserError: fewer than two vectors.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        return GaussianStatistics(self.mean, self.scatter / (self.count - 1))


@dataclasses.dataclass(frozen=True)
class GaussianStatistics:
    """Mean (D,) and covariance (D,D), float64: all that a Frechet distance needs to know of a set."""

    mean: np.ndarray
    covariance: np.ndarray
