"""The curves in configs/curves are of the recipes as they are now: who changes one makes its curve anew."""

import json

import pytest

from sra_jax import config as config_lib
from sra_jax.benchmarks import curves

SHIPPED = sorted(curves.FOLDER.glob("*.json"))


def test_there_are_some():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_curve_is_of_its_recipe(path):
    curve = curves.read(path)
    recipe = config_lib.load(curve.name)
    assert not curves.without_seed(config_lib.differences(curve.config, recipe))
    assert curves.fitting(recipe).name == curve.name
    last = json.loads(path.read_text())["step"][-1]
    assert last == recipe.steps


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_its_own_runs_are_within_its_band(path):
    curve = curves.read(path)
    for name, runs in curve.losses.items():
        for run in runs:
            assert not curves.follow(curve, name, curve.steps, run).outside()
