"""tools/benchmark.py as a user runs it. Its figures are what they are; only their bookkeeping can be right or wrong."""

import json
import re

import pytest

from configs import sit_b2
from sra_jax import config as config_lib
from tests.conftest import run

SMOKE = "--config=configs/sit_b2.py:smoke"


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


def test_sampler():
    result = json.loads(run("tools/benchmark.py", "sampler", SMOKE, "--repeats=1", "--samples=2").stdout)
    assert (result["samples"], result["steps"]) == (2, 10)
    assert result["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name what to measure: train_step"),
        (("speed", SMOKE), "name what to measure: train_step"),
        (("train_step",), "--config"),
        (("train_step", SMOKE, "--config.model.heads=5"), "heads"),
        (("train_step", SMOKE, "--repeats=0"), "repeats"),
    ],
)
def test_bad_input(arguments, message):
    done = run("tools/benchmark.py", *arguments, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
