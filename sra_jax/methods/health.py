"""How an alignment is doing, from a few tokens: how near its target, how large, how many directions are in use."""

from collections.abc import Mapping

import numpy as np


def effective_rank(tokens: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007), of tokens (S,K): 1..min(S,K).

    0 for tokens that are all zero; NaN for tokens that are not finite.
    """
    if not np.isfinite(tokens).all():
        return float("nan")
    values = np.linalg.svd(tokens.astype(np.float64), compute_uv=False)
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def mean_cosine(one: np.ndarray, other: np.ndarray) -> float:
    """The mean over tokens of the cosine of two arrays (S,K); tokens of zeros count as 0."""
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(axis=-1) / np.maximum(lengths, np.finfo(np.float32).tiny)).mean())


def health(samples: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """For each method, of its sampled tokens as `training.step.sample` gives them: `<name>/cosine` to the target,
    `<name>/student_rank` and `<name>/target_rank`, as far as it has them."""
    values: dict[str, float] = {}
    for name, parts in samples.items():
        parts = {key: np.asarray(part, np.float32) for key, part in parts.items()}
        if "target" in parts:
            values[f"{name}/cosine"] = mean_cosine(parts["compared"], parts["target"])
            values[f"{name}/target_rank"] = effective_rank(parts["target"])
        if "features" in parts:
            values[f"{name}/student_rank"] = effective_rank(parts["features"])
    return values
