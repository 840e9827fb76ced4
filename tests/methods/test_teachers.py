"""A teacher is never noisier than the student."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sra_jax import config as config_lib
from sra_jax.diffusion.gaussian import GaussianDiffusion
from sra_jax.diffusion.interpolant import PATHS, TIME_DISTRIBUTIONS, Interpolant
from sra_jax.diffusion.registry import PROCESSES
from sra_jax.errors import UserError
from sra_jax.methods.dts_as import TEACHER_TIMES
from sra_jax.methods.registry import Methods, noisier_teachers
from sra_jax.training.loop import check_teacher
from tests.methods.test_sums import TEACHING, recipe


def variants(name):
    """A method with a teacher in all the ways in which it gives it times."""
    (method,) = config_lib.methods_of(recipe(name))
    if name == "sra":
        return [dataclasses.replace(method, interval=interval) for interval in ((0.0, 0.2), (0.5, 1.0), (0.0, 0.0))]
    if name == "self_flow":
        return [dataclasses.replace(method, share=share) for share in (0.0, 0.25, 1.0)]
    ways = [{"teacher_time": way, "ratios": ratios} for way in TEACHER_TIMES for ratios in ((0.25, 0.75), (1.0,))]
    ways += [{"teacher_time": "self_flow", "teacher_mask": False}, {"dual_time": False}, {"whole_share": 0.5},
             {"ratios": (0.5, 0.25, 0.25)}]  # fmt: skip
    return [dataclasses.replace(method, **way) for way in ways]


FLOWS = [Interpolant(path, times) for path in PATHS for times in TIME_DISTRIBUTIONS]


@pytest.mark.parametrize("name", TEACHING)
def test_no_teacher_is_noisier_than_its_student(name):
    shape = config_lib.transformer_of(recipe(name))
    for method in variants(name):
        processes = [*FLOWS, GaussianDiffusion()] if "gaussian" in method.processes else FLOWS
        for process in processes:
            for seed in range(3):
                noisier = noisier_teachers(Methods((method,)), process, shape, jax.random.key(seed), count=64)
                assert not noisier.any(), (method, process)


@dataclasses.dataclass(frozen=True)
class Reversed(Interpolant):
    """A flow in which 1 is data, with the teacher's times of one in which 0 is: the trap."""

    def coefficients(self, t):
        alpha, sigma, alpha_rate, sigma_rate = super().coefficients(1 - t)
        return alpha, sigma, -alpha_rate, -sigma_rate


@pytest.mark.parametrize("name", TEACHING)
def test_a_process_whose_time_runs_the_other_way_is_refused(name, monkeypatch):
    monkeypatch.setitem(PROCESSES, "interpolant", Reversed)
    config = recipe(name)
    noisier = noisier_teachers(
        config_lib.methods_of(config), Reversed(), config_lib.transformer_of(config), jax.random.key(0)
    )
    assert float(jnp.mean(noisier)) > 0.2
    with pytest.raises(UserError, match="shows the teacher a noisier input than the student") as raised:
        check_teacher(config)
    assert "\n" not in str(raised.value)
    monkeypatch.undo()
    check_teacher(config)
