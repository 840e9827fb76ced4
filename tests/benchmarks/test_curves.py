"""Reference curves: what is within their band, and what is not."""

import numpy as np
import pytest

from configs import digits
from sra_jax.benchmarks import curves
from sra_jax.errors import UserError

STEPS = np.arange(10, 1001, 10)


def falling(seed, scatter=0.02):
    return 1 + 3 * np.exp(-STEPS / 200) + np.random.default_rng(seed).normal(0, scatter, len(STEPS))


def curve(seeds=3):
    losses = {"loss_denoising": np.stack([falling(seed) for seed in range(seeds)])}
    return curves.Curve("toy", digits.get_config(), tuple(range(seeds)), STEPS, losses, {})


@pytest.mark.parametrize("seeds", [3, 5])
def test_runs_of_the_same_kind_are_within(seeds):
    inside = [not curves.follow(curve(seeds), "loss_denoising", STEPS, falling(100 + i)).outside() for i in range(50)]
    assert np.mean(inside) > 0.95


def test_a_stretch_that_is_off_is_named():
    run = falling(7)
    run[60:80] += 0.2  # steps 610 to 800
    (first, last, distance), *others = curves.follow(curve(), "loss_denoising", STEPS, run).outside()
    assert not others
    assert 610 <= first <= 650 and 800 <= last <= 840
    assert distance > 1


def test_a_loss_that_is_not_finite_is_outside():
    run = falling(7)
    run[70] = np.nan
    assert curves.follow(curve(), "loss_denoising", STEPS, run).outside()


def test_other_logged_steps():
    every_other = curves.follow(curve(), "loss_denoising", STEPS[1::2], falling(8)[1::2])
    assert every_other.steps[-1] == 1000
    assert not every_other.outside()
    with pytest.raises(UserError, match="0 logged steps in common"):
        curves.follow(curve(), "loss_denoising", STEPS + 1, falling(8))
