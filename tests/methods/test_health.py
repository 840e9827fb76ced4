"""What is logged of an alignment's health, and the warnings of its two known failures."""

import functools
import json

import numpy as np
import pytest

from sra_jax.methods import health
from sra_jax.methods.dispersive import Dispersive
from sra_jax.methods.health import Watch
from sra_jax.methods.layersync import LayerSync
from sra_jax.methods.sra import Alignment

WIDTH = 64
SRA, SYNC = Alignment(), LayerSync()


@functools.cache
def tokens(rank, count=256, width=WIDTH):
    """(count, width) with `rank` equal singular values."""
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.normal(size=(size, rank)))[0] for size in (count, width))
    return (left @ right.T).astype(np.float32)


@functools.cache
def sampled(name, rank, count):
    """The tokens of a method, and what the log says of them."""
    samples = {name: {"features": tokens(rank, count)}}
    return samples, health.health(samples)


def history(steps, norm=lambda step: 1.0, loss=lambda step: 1.0, rank=lambda step: 40, method=SRA, count=256):
    """(record, samples) of logged steps, as the loop makes them."""
    for step in steps:
        samples, healthy = sampled(method.name, rank(step), count)
        named = {method.log.get("student_norm", f"{method.name}/student_norm"): norm(step),
                 method.log.get("loss", f"{method.name}/loss"): loss(step)}  # fmt: skip
        yield {"step": step, "loss_denoising": 1.0, **named, **healthy}, samples


def warnings(records, methods=(SRA,), before=()):
    """(step, mark, warning) of all that is said."""
    watch = Watch(methods, before)
    return [(record["step"], *said) for record, samples in records for said in watch.look(record, samples).items()]


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_effective_rank_counts_equal_directions(rank):
    assert health.effective_rank(tokens(rank)) == pytest.approx(rank, rel=1e-4)
    assert health.effective_rank(np.zeros((4, 3))) == 0
    assert np.isnan(health.effective_rank(np.full((4, 3), np.inf)))


def doubling(per):
    return lambda step: 2 ** (step / per)


def test_norm_and_loss_that_double_together_are_divergence():
    steps = range(100, 6001, 100)
    said = warnings(history(steps, doubling(900), doubling(800)))
    assert [(step, mark) for step, mark, _ in said] == [(2000, "sra/diverges")]  # the first thousand steps are let be
    assert "from step 1000 to 2000 the norm" in said[0][2]
    assert "2.2 times and the loss 2.4 times" in said[0][2]
    assert "alignment.distance=cosine" in said[0][2]
    late = warnings(history(steps, lambda s: doubling(850)(max(s, 3000)), lambda s: doubling(850)(max(s, 3000))))
    assert [step for step, *_ in late] == [3900]


@pytest.mark.parametrize(
    ("norm", "loss"),
    [
        (doubling(900), lambda step: 1.0), (lambda step: 1.0, doubling(900)), (doubling(1100), doubling(1100)),
        (doubling(100), lambda step: -doubling(100)(step)), (lambda step: np.nan, doubling(100)),
        (lambda step: doubling(100)(min(step, 1000)), lambda step: doubling(100)(min(step, 1000))),
    ],
    ids=["norm alone", "loss alone", "slowly", "below zero", "not finite", "at the beginning"],
)  # fmt: skip
def test_other_growth_is_none(norm, loss):
    assert warnings(history(range(100, 6001, 100), norm, loss)) == []


def test_the_advice_is_the_method_s_own():
    (_, mark, said), = warnings(history((1000, 2000), doubling(500), doubling(500), method=SYNC), (SYNC,))
    assert mark == "layersync/diverges"
    assert "method.layersync.weight" in said
    cosine = Alignment(distance="cosine")
    (_, _, said), = warnings(history((1000, 2000), doubling(500), doubling(500)), (cosine,))
    assert "lower alignment.weight" in said


def test_few_directions_are_a_collapse():
    """Three of 64 are; also when there had been more in the first thousand steps, but not before there were."""
    fall = history(range(100, 3001, 100), rank=lambda step: 40 if step < 500 else 3)
    assert [(step, mark) for step, mark, _ in warnings(fall)] == [(500, "sra/collapses")]
    never = warnings(history(range(100, 3001, 100), rank=lambda step: 2))
    assert [step for step, *_ in never] == [1000]
    assert "2.0 of 64 directions" in never[0][2]
    assert warnings(history(range(100, 3001, 100), rank=lambda step: 4)) == []


def test_a_sample_s_size_bounds_its_rank():
    """Two tokens have two directions at most: no collapse of a width of 64; and one direction of 40 tokens is one."""
    assert warnings(history((1000, 2000), rank=lambda step: 2, count=2)) == []
    assert len(warnings(history((1000, 2000), rank=lambda step: 1, count=40))) == 1


def test_each_method_is_watched_by_its_own_numbers():
    disperse = Dispersive()
    one = history((1000, 2000), doubling(500), doubling(500))
    other = history((1000, 2000), rank=lambda step: 1, method=disperse)
    both = [({**a, **b}, {**c, **d}) for (a, c), (b, d) in zip(one, other, strict=True)]
    said = warnings(both, (SRA, disperse))
    assert [(step, mark) for step, mark, _ in said] == [(1000, "dispersive/collapses"), (2000, "sra/diverges")]


def test_a_resume_neither_repeats_nor_forgets():
    """The records of before, read back from their JSON with the marks that were logged, go on as one run."""
    for cut in (1, 12, 19, 25):
        def run():
            return history(range(100, 3001, 100), doubling(900), doubling(900), lambda step: 40 if step < 500 else 3)

        whole, log, watch = [], [], Watch((SRA,))
        for number, (record, samples) in enumerate(run()):
            if number == cut:
                watch = Watch((SRA,), json.loads(json.dumps(log)))
            said = watch.look(record, samples)
            whole += [(record["step"], mark) for mark in said]
            log.append(record | dict.fromkeys(said, 1.0))
        assert whole == [(500, "sra/collapses"), (1900 + 100, "sra/diverges")]
