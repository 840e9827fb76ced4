"""What a run says of its time adds up, also over restarts."""

import json
import time

import jax
import pytest

from configs import digits
from sra_jax import config as config_lib
from sra_jax.distributed.chips import CHIPS, TPU_KINDS, peak_flops
from sra_jax.training.clock import Clock


def test_parts_of_a_stretch():
    config = digits.get_config()
    clock = Clock(config, time.perf_counter(), [], 0)
    with clock.part("data"):
        time.sleep(0.05)
    with clock.part("saving"):
        time.sleep(0.1)
    clock.tick(5)
    report = clock.report()
    assert report["time/data_seconds"] >= 0.01 and report["time/saving_seconds"] >= 0.02
    seconds = 1 / report["steps_per_second"]
    assert report["time/data_seconds"] + report["time/saving_seconds"] <= seconds * 1.001
    assert report["examples_per_second"] == pytest.approx(config.batch_size * report["steps_per_second"])
    flops = config_lib.step_flops(config).total / jax.device_count()
    assert report["device/tflops_per_second"] == pytest.approx(flops * report["steps_per_second"] / 1e12)
    # saving is no training: a third of the time, here, is left
    assert report["time/goodput"] <= 1 - 0.1 / report["time/run_seconds"] + 1e-3


def test_goodput_over_restarts():
    """Steps that are done again were no use the first time, though they took their time."""
    history = [
        {"step": 10, "time/run_seconds": 100.0, "time/goodput": 0.9},
        {"step": 20, "time/run_seconds": 200.0, "time/goodput": 0.8},
    ]
    clock = Clock(digits.get_config(), time.perf_counter(), history, first=10)
    clock.tick(1)
    report = clock.report()
    assert report["time/run_seconds"] == pytest.approx(200, abs=2)
    assert report["time/goodput"] == pytest.approx(90 / 200, rel=0.02)


def test_peaks_of_devices():
    assert {peak_flops(kind) for kind in TPU_KINDS} == {chip.peak_flops for chip in CHIPS.values()}
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == peak_flops("NVIDIA A100-PCIE-40GB") == 312e12
    assert peak_flops("NVIDIA A10G") != peak_flops("NVIDIA A10")
    assert peak_flops("cpu") is None


def test_a_run_logs_where_its_time_went(tiny_run):
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    totals = [record["time/run_seconds"] for record in records]
    assert totals == sorted(totals)
    for record in records:
        assert 0 < record["time/goodput"] <= 1
        parts = (record[f"time/{name}_seconds"] for name in ("data", "device", "saving"))
        assert sum(parts) <= 1.01 / record["steps_per_second"]
