import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax.errors import UserError
from sra_jax.methods import distances
from sra_jax.methods.distances import DISTANCES, mean_distance
from sra_jax.methods.sra import Alignment
from sra_jax.models.transformer import TransformerConfig

SHAPE = TransformerConfig(32, 4, 4, 1000, patch=2, depth=12, width=768, heads=12)


def features(seed, shape=(2, 5, 7)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_for_equal_features_and_positive_otherwise(distance):
    a, b = features(0), features(1)
    assert float(mean_distance(distance, a, a)) == pytest.approx(0, abs=1e-6)
    assert float(mean_distance(distance, a, b)) > 0.01


@pytest.mark.parametrize("distance", DISTANCES)
def test_no_gradient_reaches_the_teacher(distance):
    student, teacher = jax.grad(mean_distance, argnums=(1, 2))(distance, features(0), features(1))
    assert np.any(student)
    np.testing.assert_array_equal(teacher, 0)


def test_distances_against_their_definitions():
    """Entry by entry in float64."""
    a, b = features(2), features(3)
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d = np.abs(x - y)
    beta = 0.3

    def one_minus_cosine(u, v):
        return 1 - u @ v / np.sqrt((u @ u) * (v @ v))

    expected = {
        "smooth_l1": np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean(),
        "l1": d.mean(),
        "l2": (d**2).mean(),
        "cosine": np.mean([one_minus_cosine(x[b, n], y[b, n]) for b in range(2) for n in range(5)]),
        "cosine_tokens": np.mean([one_minus_cosine(x[b, :, d], y[b, :, d]) for b in range(2) for d in range(7)]),
    }
    assert expected.keys() == set(DISTANCES)
    for name, value in expected.items():
        assert float(mean_distance(name, a, b, beta)) == pytest.approx(value, rel=1e-5)


def test_cosine_of_a_zero_token_has_a_finite_gradient():
    gradient = jax.grad(lambda a: distances.cosine(a, features(1), axis=-1).sum())(features(0).at[0, 0].set(0))
    assert np.isfinite(gradient).all()


def test_smooth_l1_is_smooth():
    """Value and slope meet where it turns linear."""
    beta = 0.05
    around = jnp.array([beta * (1 - 1e-4), beta * (1 + 1e-4)])
    value, slope = jax.vmap(jax.value_and_grad(lambda d: distances.smooth_l1(d, 0.0, beta)))(around)
    assert float(jnp.ptp(value)) < 1e-4
    assert float(jnp.ptp(slope)) < 1e-3


def test_weight_decays_as_the_authors_do():
    """2 * 0.1^g with g = 1 until epoch 149 and 1 + (epoch - 149) / 1000 after it; an epoch has 5,004 steps."""
    epoch_steps = 5004
    decaying = Alignment(
        1, 1, weight=0.2, weight_schedule="decay", weight_decay_start=149 * epoch_steps,
        weight_decay_steps=1000 * epoch_steps, weight_decay_stair=epoch_steps,
    )  # fmt: skip
    for step in (0, 100, 149 * epoch_steps, 150 * epoch_steps - 1, 150 * epoch_steps, 799 * epoch_steps + 17):
        epoch = step // epoch_steps
        g = 1 if epoch <= 149 else (epoch - 149) / 1000 + 1
        assert float(decaying.weight_at(jnp.int32(step))) == pytest.approx(2 * 0.1**g, rel=1e-5)
    assert float(Alignment(1, 1, weight=0.5).weight_at(jnp.int32(10**6))) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_block": 0}, r"student_block=0 is not a block: allowed 1\.\.12"),
        ({"student_block": 13, "teacher_block": 13}, r"student_block=13"),
        ({"teacher_block": 13}, r"teacher_block=13 is beyond model.depth=12.*the paper uses 3 and 8"),
        ({"student_block": 9}, r"teacher_block=8 is before alignment.student_block=9"),
        ({"distance": "mse"}, r"'mse' is unknown; allowed: smooth_l1, l1, l2, cosine, cosine_tokens"),
        ({"beta": 0.0}, r"beta=0.0 must be above 0"),
        ({"weight": -1.0}, r"weight=-1.0"),
        ({"weight_schedule": "linear"}, r"allowed: constant, decay"),
        ({"weight_decay_steps": 0}, r"weight_decay_steps=0"),
        ({"interval": (0.3, 0.2)}, r"interval=0.3,0.2 must be two numbers low,high"),
        ({"interval": (-0.1, 0.2)}, r"interval"),
        ({"interval": (0.0, 1.5)}, r"interval"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(UserError, match=message):
        Alignment(**{"student_block": 3, "teacher_block": 8} | changes).check(SHAPE, 256, 256)


def test_the_paper_s_ablations_are_allowed():
    for student, teacher in [(6, 10), (4, 8), (4, 10), (4, 12), (2, 6), (2, 8), (3, 8), (3, 3)]:
        for interval in [(0.0, 0.0), (0.1, 0.1), (0.2, 0.2), (0.0, 0.1), (0.0, 0.2), (0.0, 0.3)]:
            Alignment(student, teacher, interval=interval, head=False).check(SHAPE, 256, 256)
