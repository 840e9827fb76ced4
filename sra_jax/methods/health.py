"""How an alignment is doing, from a few tokens: how near its target, how large, how many directions are in use.

`Watch` looks at what is logged and warns of the two ways in which alignments are known to fail.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sra_jax.methods.method import Method

WINDOW = 1000
"""Steps over which growth is judged; as many at a run's beginning, when everything grows, are let be."""

GROWTH = 2.0
"""By this factor norm and loss both grow over a window where an alignment diverges."""

COLLAPSED = 0.05
"""Below this share of the directions that features could use they have collapsed."""

Samples = Mapping[str, Mapping[str, Any]]
"""Of each method, by its name, tokens (S,K) as `training.step.sample` takes them."""


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


def health(samples: Samples) -> dict[str, float]:
    """For each method, of its sampled tokens: `<name>/cosine` to the target,
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


class Watch:
    """Warns once of each method whose alignment diverges or whose features collapse.

    What it remembers is in the logged records: norms and losses of the last thousand steps, and a mark
    `<name>/diverges` or `<name>/collapses` (1.0) in the record with which it warned.

    Args:
      methods: of the run.
      records: logged so far, in their order.
    """

    def __init__(self, methods: Iterable[Method], records: Iterable[Mapping[str, float]] = ()):
        self._methods = tuple(methods)
        self._growing: dict[str, list[tuple[int, float, float]]] = {method.name: [] for method in self._methods}
        self._highest_rank = {method.name: 0.0 for method in self._methods}
        self._warned: set[str] = set()
        for record in records:
            self._warned |= {mark for mark in self._marks() if mark in record}
            for method in self._methods:
                self._remember(method, record)
                self._see_rank(method, record)

    def _marks(self) -> list[str]:
        return [f"{method.name}/{mark}" for method in self._methods for mark in ("diverges", "collapses")]

    def look(self, record: Mapping[str, float], samples: Samples) -> dict[str, str]:
        """What is wrong now and has not been said before.

        Args:
          record: of a logged step, with its `step` and what `health` makes of `samples`; later than all before.
          samples: the tokens of that step, for their shapes.

        Returns:
          The marks to log with the record, and of each a warning with advice, one line.
        """
        found: dict[str, str] = {}
        for method in self._methods:
            before = self._remember(method, record)
            if before and f"{method.name}/diverges" not in self._warned:
                found |= _divergence(method, before, self._growing[method.name][-1])
            features = samples.get(method.name, {}).get("features")
            if features is not None and f"{method.name}/collapses" not in self._warned:
                found |= self._collapse(method, record, min(np.shape(features)))
        self._warned |= found.keys()
        return found

    def _remember(self, method: Method, record: Mapping[str, float]) -> tuple[int, float, float] | None:
        """Keep norm and loss of a record; return those of a window before, where there are any."""
        norm, loss = (method.log.get(key, f"{method.name}/{key}") for key in ("student_norm", "loss"))
        if norm not in record or loss not in record or record["step"] < WINDOW:
            return None
        kept = self._growing[method.name]
        kept.append((int(record["step"]), record[norm], record[loss]))
        while len(kept) > 1 and kept[1][0] <= kept[-1][0] - WINDOW:
            kept.pop(0)
        return kept[0] if kept[0][0] <= kept[-1][0] - WINDOW else None

    def _see_rank(self, method: Method, record: Mapping[str, float]) -> tuple[float, float]:
        """The rank of the student's features, and the highest before; NaN is none."""
        rank, highest = record.get(f"{method.name}/student_rank", np.nan), self._highest_rank[method.name]
        self._highest_rank[method.name] = max(highest, rank) if np.isfinite(rank) else highest
        return rank, highest

    def _collapse(self, method: Method, record: Mapping[str, float], most: int) -> dict[str, str]:
        """Few directions are in use after the run's beginning, or after there were more.

        A sample of `most` tokens has no higher rank than that, however wide they are.
        """
        rank, highest = self._see_rank(method, record)
        few = COLLAPSED * most
        if not rank < few or (record["step"] < WINDOW and highest < few):
            return {}
        return {
            f"{method.name}/collapses": f"{method.name}: the student's features collapse at step {record['step']}, "
            f"{rank:.1f} of {most} directions are in use; lower {method.key}.weight and start from a checkpoint of "
            "before"
        }


def _divergence(method: Method, before: tuple[int, float, float], now: tuple[int, float, float]) -> dict[str, str]:
    """The pattern of SRA's issue 7: features and their distances grow together."""
    growths = [new / old for new, old in zip(now[1:], before[1:], strict=True) if old > 0]
    if len(growths) < 2 or not all(growth >= GROWTH for growth in growths):  # NaN is none
        return {}
    return {
        f"{method.name}/diverges": f"{method.name} diverges: from step {before[0]} to {now[0]} the norm of the "
        f"student's features grew {growths[0]:.1f} times and the loss {growths[1]:.1f} times; {method.against_growth}"
    }
