"""The curves in configs/curves are of the recipes as they are now: who changes one makes its curve anew."""

import json

import pytest

from sra_jax import config as config_lib
from sra_jax.benchmarks import curves
from tests.in_process import call

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


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_run_finds_the_curve_of_its_recipe(path, tmp_path):
    """The curve's own second run, as a folder; with twice the loss at the end it is outside."""
    curve = curves.read(path)
    config = curve.config.copy_and_resolve_references()
    config.seed = curve.seeds[1]
    (tmp_path / "config.json").write_text(config_lib.to_json(config))

    def log(factor):
        rows = [
            {"step": step, **{name: runs[1][i] * (factor if step > curve.steps[-6] else 1)
                              for name, runs in curve.losses.items()}}
            for i, step in enumerate(curve.steps.tolist())
        ]  # fmt: skip
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    log(1)
    done = call("compare", f"--workdir={tmp_path}", f"--output={tmp_path / 'compare.png'}")
    assert f"within the band of {curve.name}, " in done.stdout
    log(2)
    assert "above the band" in call("compare", f"--workdir={tmp_path}", code=1).stdout
