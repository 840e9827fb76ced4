"""The EMAs of a run as its checkpoints hold them, and power functions of other lengths made from these afterwards.

A profile that was not tracked is the weighted sum of the tracked ones at the steps that are saved, with the weights
that come nearest to it by least squares in the inner product of profiles (Karras et al., 2024, arXiv 2312.02696,
appendix C).
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.config.profiles import TEACHER, Profile, profile
from sra_jax.errors import UserError
from sra_jax.runs import PROFILES
from sra_jax.runs.checkpoints import Checkpoints

Snapshot = tuple[float, int]
"""A power function's exponent gamma, and the step of its end."""


def inner(a: Snapshot, b: Snapshot) -> float:
    """The integral over time of the product of two profiles, each zero after its end."""
    (gamma_a, end_a), (gamma_b, end_b) = sorted((a, b), key=lambda one: one[1])
    ratio = (end_a / end_b) ** gamma_b
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * end_b)


def combination(snapshots: Sequence[Snapshot], wanted: Snapshot) -> tuple[np.ndarray, float]:
    """The sum of snapshots nearest to a profile.

    Returns:
      Their weights, and what is left of the profile: the norm of the difference over its own, 0 for an exact sum.
    """
    products = np.array([[inner(one, other) for other in snapshots] for one in snapshots])
    aims = np.array([inner(one, wanted) for one in snapshots])
    scale = 1 / np.sqrt(np.diag(products))  # of one length each, for a well-conditioned system
    weights = scale * np.linalg.lstsq(products * scale * scale[:, None], aims * scale, rcond=1e-12)[0]
    rest = 1 - (2 * aims @ weights - weights @ products @ weights) / inner(wanted, wanted)
    return weights, float(np.sqrt(max(rest, 0.0)))


def restore(checkpoints: Checkpoints, config: ConfigDict, abstract: Any, step: int, name: str = "") -> Any:
    """One EMA of a checkpoint: the teacher's, one that was tracked, or a power function made from those that were.

    Args:
      checkpoints: of the run.
      config: the run's.
      abstract: shapes and shardings of a tree of parameters.
      step: of the checkpoint.
      name: `teacher`, `0.999`, `power:0.05`; empty for the run's `ema.sampled`.

    Raises:
      UserError: no such EMA, or a checkpoint that cannot be read.
    """
    if (name or config.ema.sampled) == TEACHER:
        return checkpoints.restore_item("ema", abstract, step)
    wanted = profile("--ema" if name else "ema.sampled", name or config.ema.sampled)
    tracked = config_lib.profiles_of(config)
    layout = {one.name: abstract for one in tracked}
    if wanted in tracked:
        return checkpoints.restore_item(PROFILES, layout, step)[wanted.name]
    powers = [one for one in tracked if one.width is not None]
    if wanted.width is None or not powers:
        there = ", ".join([TEACHER, *(one.name for one in tracked)])
        raise UserError(
            f"--ema={wanted.name} was not tracked; there are {there}. Power functions of other lengths can be made "
            "where some were tracked (--config.ema.profiles=power:0.05,power:0.1)"
        )
    return _reconstructed(checkpoints, layout, powers, wanted, step)


def _reconstructed(
    checkpoints: Checkpoints, layout: dict[str, Any], powers: Sequence[Profile], wanted: Profile, step: int
) -> Any:
    steps = [saved for saved in checkpoints.steps() if saved <= step]
    snapshots = [(one.gamma, saved) for saved in steps for one in powers]
    weights, rest = combination(snapshots, (wanted.gamma, step))
    if jax.process_index() == 0:
        print(
            f"{wanted.name} is made from {len(snapshots)} snapshots, {', '.join(one.name for one in powers)} at "
            f"{len(steps)} step(s); {rest:.1%} of it is not in them", file=sys.stderr,
        )  # fmt: skip
    total = None
    shares = iter(weights)
    for saved in steps:
        trees = checkpoints.restore_item(PROFILES, layout, saved)
        for one in powers:
            share = np.float32(next(shares))
            scaled = jax.tree.map(lambda x, share=share: share * x, trees[one.name])
            total = scaled if total is None else jax.tree.map(jax.numpy.add, total, scaled)
    return total
