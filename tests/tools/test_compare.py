"""tools/compare.py: a run beside the losses that its recipe is expected to have."""

import json
import shutil

import numpy as np
import pytest

from sra_jax.benchmarks import curves
from tests.in_process import call

STEPS = np.arange(1, 25)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_run):
    """Folders of four runs whose losses fall alike but for their seeds, and a curve of three of them."""
    folder = tmp_path_factory.mktemp("runs")
    config = json.loads((tiny_run / "config.json").read_text())
    for seed in range(4):
        generator = np.random.default_rng(seed)
        (folder / str(seed)).mkdir()
        (folder / str(seed) / "config.json").write_text(json.dumps({**config, "seed": seed}))
        losses = np.exp(-STEPS / 10) + generator.normal(0, 0.01) + generator.normal(0, 0.05, len(STEPS))
        with (folder / str(seed) / "metrics.jsonl").open("w") as file:
            for step, loss in zip(STEPS.tolist(), losses.tolist(), strict=True):
                print(json.dumps({"step": step, "loss_denoising": loss, "loss_alignment": 1 - loss}), file=file)
    workdirs = ",".join(str(folder / str(seed)) for seed in (0, 1, 2))
    call("compare", f"--workdir={workdirs}", f"--make={folder / 'curve.json'}", "--name=tiny")
    return folder


def test_a_run_with_another_seed_is_within_the_band(runs, tmp_path):
    figure = tmp_path / "compare.png"
    done = call("compare", f"--workdir={runs / '3'}", f"--curve={runs / 'curve.json'}", f"--output={figure}")
    assert done.stdout == "within the band of tiny, steps 5 to 24\n"
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_run_that_leaves_it_is_told_where(runs, tmp_path):
    workdir = shutil.copytree(runs / "3", tmp_path / "run")
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["step"] > 12:
            record["loss_denoising"] *= 2
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = call("compare", f"--workdir={workdir}", f"--curve={runs / 'curve.json'}", code=1)
    first, last = done.stdout.splitlines()
    assert first.startswith("loss_denoising: above the band from step 1")
    assert "to 24, at most" in first
    assert last == "outside the band of tiny, steps 5 to 24"


def test_the_curve_of_a_run_s_own_recipe_is_found(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "FOLDER", tmp_path)
    assert "no reference curves lie in" in call("compare", f"--workdir={runs / '3'}", code=2).stderr
    shutil.copy(runs / "curve.json", tmp_path / "tiny.json")
    assert "within the band of tiny" in call("compare", f"--workdir={runs / '3'}").stdout
    other = shutil.copytree(runs / "3", tmp_path / "run")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"learning_rate": 0.002', '"learning_rate": 0.004'))
    done = call("compare", f"--workdir={other}", code=2)
    assert "no reference curve is of this run's recipe; the nearest, tiny, differs in" in done.stderr
    assert "optimizer.learning_rate: 0.002 -> 0.004" in done.stderr


@pytest.mark.parametrize(
    "workdirs, said", [("0,1,1", "at least 3 runs of different seeds"), ("0,1", "at least 3 runs of different seeds")]
)
def test_curves_that_cannot_be_made(runs, tmp_path, workdirs, said):
    folders = ",".join(str(runs / one) for one in workdirs.split(","))
    done = call("compare", f"--workdir={folders}", f"--make={tmp_path / 'curve.json'}", code=2)
    assert said in done.stderr
    assert not (tmp_path / "curve.json").exists()
