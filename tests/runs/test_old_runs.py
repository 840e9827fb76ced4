"""Runs and latents that earlier versions wrote go on working.

before_rooms.tar.gz was written by version 0.1.0: `run` (four steps on the digits), `expected_metrics.jsonl` (of the
same run, had it gone on to step 8) and `latents` (five images by tools/prepare_latents.py).
"""

import json
import tarfile

import numpy as np
import pytest

from configs import sit_b2
from sra_jax.data import registry
from tests.conftest import ROOT, run

RECIPE = (
    "--config=configs/digits.py", "--config.model.width=16", "--config.model.depth=2", "--config.model.heads=2",
    "--config.alignment.student_block=1", "--config.alignment.teacher_block=2", "--config.batch_size=16",
    "--config.optimizer.warmup_steps=0", "--config.log_every=1", "--config.checkpoint_every=4", "--config.keep=1",
    "--config.sample_every=0", "--config.ema.decay=0.8", "--config.sampling.steps=4",
    "--config.sampling.preview_per_class=2", "--config.steps=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ROOT / "tests" / "runs" / "before_rooms.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_a_run_of_before_goes_on(before):
    done = run("main.py", *RECIPE, f"--workdir={before / 'run'}")
    assert "resuming" in done.stdout
    actual, expected = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (before / "run" / "metrics.jsonl", before / "expected_metrics.jsonl")
    )
    assert [record["step"] for record in actual] == list(range(1, 9))
    for new, old in zip(actual, expected, strict=True):
        shared = {name for name in old if not name.endswith("per_second")}
        np.testing.assert_allclose([new[name] for name in shared], [old[name] for name in shared], rtol=1e-4)
    npz = before / "samples.npz"
    run("tools/sample.py", f"--workdir={before / 'run'}", "--num_samples=3", f"--output={npz}")
    assert np.load(npz)["arr_0"].shape == (3, 8, 8, 1)


def test_latents_of_before_are_read(before):
    run("tools/prepare_latents.py", "--verify", f"--output={before / 'latents'}")
    config = sit_b2.get_config().data
    with config.unlocked():
        config.update(path=str(before / "latents"), image_size=8, num_classes=2)
    source = registry.load(config).source
    assert [int(source[i]["label"]) for i in range(len(source))] == [0, 0, 0, 1, 1]
    assert all(source[i]["std"].min() > 0 and source[i]["mean"].shape == (8, 8, 4) for i in range(5))
