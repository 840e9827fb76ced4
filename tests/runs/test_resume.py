"""Runs killed with SIGKILL and started again end as the uninterrupted run does, bit for bit."""

import json
import random
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sra_jax.runs.metrics import clocked
from tests.conftest import TINY_DIGITS, kill_when, run, start

STEPS = 24



def final_state(workdir):
    """params, EMA and optimizer state of the last step, as saved."""
    manager = ocp.CheckpointManager(
        workdir / "checkpoints", item_names=("params", "ema", "opt_state", "meta"),
        options=ocp.CheckpointManagerOptions(read_only=True),
    )  # fmt: skip
    assert manager.latest_step() == STEPS
    names = ("params", "ema", "opt_state")
    items = {name: ocp.args.StandardRestore() for name in names}
    restored = manager.restore(STEPS, args=ocp.args.Composite(**items))
    return {name: restored[name] for name in names}


def logged(workdir):
    """metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not clocked(key)} for record in records]


def assert_same_run(actual, expected):
    a, b = final_state(actual), final_state(expected)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert logged(actual) == logged(expected)


def begin(workdir):
    return start("main.py", *TINY_DIGITS, f"--workdir={workdir}")


def resume(workdir):
    return run("main.py", *TINY_DIGITS, f"--workdir={workdir}").stdout


@pytest.mark.slow
@pytest.mark.faults
def test_killed_at_a_random_moment(tiny_run, tmp_path):
    """Some time after the first checkpoint."""
    seed = random.randrange(2**32)
    print(f"random moment: seed {seed}")
    first, delay = None, random.Random(seed).uniform(0, 0.4)

    def moment():
        nonlocal first
        if first is None and (tmp_path / "checkpoints" / "6").is_dir():
            first = time.monotonic()
        return first is not None and time.monotonic() - first > delay

    kill_when(begin(tmp_path), moment)
    assert "resuming" in resume(tmp_path)
    assert_same_run(tmp_path, tiny_run)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("saved_before", [0, 1])
def test_killed_during_a_save(tiny_run, tmp_path, saved_before):
    """With nothing saved yet, and while a later checkpoint is being written."""
    step = 6 * (saved_before + 1)
    folder = tmp_path / "checkpoints"
    kill_when(begin(tmp_path), lambda: any(folder.glob(f"{step}.orbax-checkpoint-tmp*")))
    done = resume(tmp_path)
    assert ("resuming" in done) or ("starting at step 0" in done)
    assert_same_run(tmp_path, tiny_run)


def test_longer_run_continues_a_shorter_one(tiny_run, tmp_path):
    """Half the steps, then all of them: the same as all of them at once, whether programs are compiled anew or were
    kept by the cache that tests share."""
    anew = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    flags = (*TINY_DIGITS, f"--workdir={tmp_path}")
    run("main.py", *flags, "--config.steps=12", environment=anew)
    assert "resuming" in run("main.py", *flags, environment=anew).stdout
    assert_same_run(tmp_path, tiny_run)
    assert "nothing to do" in resume(tmp_path)
