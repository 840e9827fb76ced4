import numpy as np
import pytest

from sra_jax.errors import UserError
from sra_jax.evaluation.inception_score import InceptionScore, inception_score


def test_bounds():
    assert inception_score(np.zeros((50, 10))) == pytest.approx(1)
    sure = 1e4 * np.eye(10)[np.arange(50) % 10]
    assert inception_score(sure) == pytest.approx(10)


def test_definition_with_a_short_last_split():
    logits = np.random.default_rng(0).standard_normal((25, 6)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for split in (probabilities[:10], probabilities[10:20], probabilities[20:]):
        divergence = (split * np.log(split / split.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert inception_score(logits, split_size=10) == pytest.approx(np.mean(scores), rel=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 10, 25, 100])
def test_batches_do_not_matter(batch):
    logits = np.random.default_rng(0).standard_normal((53, 6))
    score = InceptionScore(split_size=20)
    for start in range(0, 53, batch):
        score.update(logits[start : start + batch])
    assert score.result() == pytest.approx(inception_score(logits, split_size=20), rel=1e-12)


def test_probabilities_that_underflow_are_no_nan():
    logits = np.zeros((4, 3), np.float32)
    logits[:, 0] = 1e5
    assert inception_score(logits) == pytest.approx(1)


def test_nothing():
    with pytest.raises(UserError, match="at least one"):
        InceptionScore().result()
