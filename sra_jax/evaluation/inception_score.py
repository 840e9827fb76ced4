"""Inception score (Salimans et al., arXiv 1606.03498, section 4), with the splits of ADM's evaluation suite."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sra_jax.errors import UserError

SPLIT_SIZE = 5000

BLOCK = 128
"""Samples at a time: their class scores stay in a core's cache."""


class InceptionScore:
    """Accumulates class scores in the order of the samples; memory does not grow with them beyond one number a split.

    Consecutive samples form splits of `split_size`, the last one shorter. A split's score is
    exp(mean over samples of KL(p(y|x) || p(y))); the result is the plain average over splits. Samples sorted by class
    would score low: each split would see few classes.
    """

    def __init__(self, split_size: int = SPLIT_SIZE):
        self.split_size = split_size
        self.scores: list[float] = []
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.probability_sum: np.ndarray | float = 0.0  # (C,)
        self.negative_entropy_sum = 0.0

    def update(self, logits: np.ndarray) -> None:
        """Adds class scores (N,C), before the softmax, any N."""
        with ThreadPoolExecutor() as threads:
            while len(logits):
                part, logits = np.split(logits, [self.split_size - self.seen])
                blocks = (part[start : start + BLOCK] for start in range(0, len(part), BLOCK))
                for probabilities, negative_entropy in threads.map(_sums, blocks):
                    self.probability_sum = self.probability_sum + probabilities
                    self.negative_entropy_sum += negative_entropy
                self.seen += len(part)
                if self.seen == self.split_size:
                    self.scores.append(self._score())
                    self._clear()

    def _score(self) -> float:
        marginal = self.probability_sum / self.seen
        marginal_entropy = -(marginal * np.log(marginal, where=marginal > 0, out=np.zeros_like(marginal))).sum()
        return float(np.exp(self.negative_entropy_sum / self.seen + marginal_entropy))

    def result(self) -> float:
        """The score of everything seen so far.

        Raises:
          UserError: nothing was seen.
        """
        scores = self.scores + ([self._score()] if self.seen else [])
        if not scores:
            raise UserError("an inception score needs at least one sample")
        return float(np.mean(scores))


def _sums(logits: np.ndarray) -> tuple[np.ndarray, float]:
    """Over samples, of class scores (N,C): probabilities (C,), and the negative entropy of each sample's."""
    scores = np.subtract(logits, logits.max(axis=1, keepdims=True), dtype=np.float64)
    weights = np.exp(scores)
    totals = weights.sum(axis=1)
    expected_scores = np.einsum("nc,nc->n", weights, scores) / totals
    return (1 / totals) @ weights, (expected_scores - np.log(totals)).sum()


def inception_score(logits: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """The score of class scores (N,C), in [1, C]."""
    score = InceptionScore(split_size)
    score.update(logits)
    return score.result()
