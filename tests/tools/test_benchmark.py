"""tools/benchmark.py as a user runs it. Its figures are what they are; only their bookkeeping can be right or wrong."""

import json
import re

import pytest

from configs import sit_b2
from sra_jax import config as config_lib
from tests.conftest import run

SMOKE = "--config=configs/sit_b2.py:smoke"


@pytest.mark.slow
def test_train_step(tmp_path):
    report = tmp_path / "r.json"
    done = run("tools/benchmark.py", "train_step", SMOKE, "--config.batch_size=4", "--repeats=2", f"--json={report}")
    result = json.loads(report.read_text())
    assert json.loads(done.stdout) == result
    config = sit_b2.get_config("smoke")
    config.batch_size = 4
    flops = config_lib.step_flops(config).total
    assert (result["batch_size"], result["dtype"], result["flops"]) == (4, "float32", flops)
    low, high = result["step_seconds_range"]
    assert 0 < low <= result["step_seconds"] <= high
    rounds = re.findall(r"rate ([\d.e+]+), method ([\d.e-]+), baseline ([\d.e-]+)", done.stderr)
    shares = sorted(flops / float(sra) / float(rate) for rate, sra, _ in rounds)
    assert len(shares) == 2
    assert result["matmul_share"] == pytest.approx(sum(shares) / 2, rel=0.01)
    assert result["over_baseline"] == pytest.approx(
        sum(float(sra) / float(baseline) for _, sra, baseline in rounds) / 2, rel=0.01
    )
    assert result["compile_seconds"] > 0
    assert result["peak_memory_bytes"] > 1e8
    assert not any("peer" in name for name in result)


@pytest.mark.slow
def test_sampler():
    result = json.loads(run("tools/benchmark.py", "sampler", SMOKE, "--repeats=1", "--samples=2").stdout)
    assert (result["samples"], result["steps"]) == (2, 10)
    assert result["seconds"] > 0


@pytest.mark.slow
def test_methods():
    """The rows are the methods; what costs nothing by formula costs nothing in the compiled program either."""
    flags = ("--config.batch_size=4", "--repeats=1", "--methods=layersync,self_flow")
    lines = run("tools/benchmark.py", "methods", SMOKE, *flags).stdout.splitlines()
    cells = {line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(cells) == ["layersync", "self_flow"]
    assert cells["layersync"][:2] == ["+0.0%", "+0.0%"]
    formula, compiled = (float(cell.rstrip("%")) for cell in cells["self_flow"][:2])
    assert formula == pytest.approx(compiled, abs=2)


@pytest.mark.slow
def test_start(tmp_path):
    """Each start is a process of its own; the second finds what the first has compiled."""
    done = run("tools/benchmark.py", "start", "--recipes=sit_b2:smoke,t2i_coco:smoke", f"--json={tmp_path / 'r.json'}")
    result = json.loads((tmp_path / "r.json").read_text())
    assert done.stdout.splitlines() == result["markdown"]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in result["markdown"][2:]]
    assert rows == [["sit_b2_smoke", "train"], ["sit_b2_smoke", "sample"], ["t2i_coco_smoke", "train"]]
    for commands in result["recipes"].values():
        for pair in commands.values():
            assert 0 < pair["second"]["cpu_seconds"] < pair["first"]["cpu_seconds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name what to measure: train_step"),
        (("speed", SMOKE), "name what to measure: train_step"),
        (("train_step",), "--config"),
        (("train_step", SMOKE, "--config.model.heads=5"), "heads"),
        (("train_step", SMOKE, "--repeats=0"), "repeats"),
        (("methods", SMOKE, "--methods=sra,selfflow"), "'selfflow' is unknown"),
    ],
)
def test_bad_input(arguments, message):
    done = run("tools/benchmark.py", *arguments, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
