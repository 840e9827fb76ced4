"""Every method as a user trains it: by the variant's name, killed and resumed, sampled."""

import json

import jax
import numpy as np
import pytest

from sra_jax.methods.registry import METHODS
from sra_jax.runs.metrics import clocked
from tests.checkpoints import final_state
from tests.conftest import kill_when, run, start

TINY = (
    "--config.batch_size=16", "--config.optimizer.warmup_steps=0", "--config.log_every=2",
    "--config.checkpoint_every=2", "--config.sample_every=0", "--config.ema.decay=0.8", "--config.sampling.steps=4",
    "--config.model.width=32", "--config.model.heads=2",
)  # fmt: skip



def logged(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if not clocked(key)} for record in records]


def killed_and_resumed(flags, tmp_path):
    """Two workdirs: of a run as it is, and of one that was killed at its first checkpoint and started again."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("main.py", *flags, f"--workdir={whole}")
    kill_when(start("main.py", *flags, f"--workdir={parts}"), (parts / "checkpoints" / "2").is_dir)
    run("main.py", *flags, f"--workdir={parts}")
    return whole, parts


VARIANTS = ("none", "sra_cosine", *METHODS, "sra+dispersive", "self_flow+delta_fm", "dit,sra2")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_of_every_method_ends_as_one_that_was_not(variant, tmp_path):
    flags = (f"--config=configs/digits.py:{variant}", *TINY, "--config.steps=8")
    whole, parts = killed_and_resumed(flags, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, final_state(parts), final_state(whole))
    assert logged(parts) == logged(whole)
    record = logged(whole)[-1]
    for method in {part for part in variant.split("+") if part in METHODS} - {"sra"}:
        assert np.isfinite(record[f"{method}/loss"])
    run("tools/sample.py", f"--workdir={whole}", "--num_samples=3", f"--output={tmp_path / 'samples.npz'}")
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (3, 8, 8, 1)


@pytest.mark.slow
def test_repa_from_images_and_features_to_a_resumed_run(image_folder, tiny_vae, tmp_path):
    latents, arrays = tmp_path / "latents", tmp_path / "features"
    run("tools/prepare_latents.py", f"--source=imagefolder:{image_folder}", f"--vae={tiny_vae.folder}",
        "--image_size=16", "--batch_size=2", f"--output={latents}")  # fmt: skip
    arrays.mkdir()
    for i in range(5):
        np.save(arrays / f"{i}.npy", np.random.default_rng(i).normal(size=(16, 6)))
    done = run("tools/prepare_latents.py", f"--features={arrays}", f"--output={latents}")
    assert "--config.method.repa.widths=6" in done.stdout
    assert "features" in run("tools/prepare_latents.py", "--verify", f"--output={latents}").stdout
    flags = (
        "--config=configs/digits.py:repa", *TINY, "--config.data.name=latents", f"--config.data.path={latents}",
        "--config.data.channels=4", "--config.data.num_classes=2", "--config.batch_size=4",
        "--config.method.repa.widths=6,",
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("main.py", *flags, "--config.steps=4", f"--workdir={whole}")
    run("main.py", *flags, "--config.steps=2", f"--workdir={parts}")
    assert "resuming" in run("main.py", *flags, "--config.steps=4", f"--workdir={parts}").stdout
    jax.tree.map(np.testing.assert_array_equal, final_state(parts), final_state(whole))


@pytest.mark.parametrize(
    ("variant", "flags", "message"),
    [
        ("sra+self_flow", (), "self_flow decides the times of tokens and what the teacher sees, and sra"),
        ("sra,layersync", (), "their sum is sra+layersync"),
        ("selfflow", (), "unknown variant 'selfflow'"),
        ("dit,delta_fm", (), "delta_fm is defined for process.name='interpolant' only"),
        ("dispersive", ("--config.method.dispersive.group=24",), "does not divide batch_size=64"),
        ("layersync", ("--config.method.layersync.target_block=2",), "is the student's own block"),
        ("dts_as", ("--config.method.dts_as.teacher_mask=False",), "only teacher_time=self_flow gives"),
        ("none", ("--config.method.name=sra+none",), "'none' stands alone"),
        ("none", ("--config.method.name=sra+sra",), "names each method once"),
        ("none", ("--config.method.name=repa,",), "is unknown; allowed: none, self_flow"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(variant, flags, message, tmp_path):
    done = run("main.py", f"--config=configs/digits.py:{variant}", *flags, f"--workdir={tmp_path / 'run'}", code=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
