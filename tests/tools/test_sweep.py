"""tools/sweep.py: every way of sampling measured from the same noise, once."""

import json
import shutil

import numpy as np
import pytest

from sra_jax import files
from sra_jax.benchmarks import sweep
from sra_jax.evaluation import record
from sra_jax.evaluation.frechet import frechet_distance
from sra_jax.evaluation.reference import Reference
from sra_jax.evaluation.statistics import gaussian_statistics
from sra_jax.runs.trained import TrainedModel
from tests.in_process import call

FLAGS = (
    "--num_samples=60", "--sampling_batch_size=60", "--reference=dataset", "--extractor=classifier", "--folds=3",
    "--metrics=accuracy",
)  # fmt: skip


@pytest.fixture(scope="module")
def swept(tiny_run, tmp_path_factory, classifier_cache):
    """The output of a sweep that was extended, its flags, and when the first settings were written."""
    folder = tmp_path_factory.mktemp("sweep")
    workdir = shutil.copytree(tiny_run, folder / "run")
    given = (f"--workdir={workdir}", f"--output={folder / 'sweep'}", "--steps=2", *FLAGS)
    call("sweep", *given, "--guidance_scales=1,2", "--guidance_intervals=0:1")
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "sweep" / "settings").iterdir()}
    call("sweep", *given, "--guidance_scales=1,2", "--guidance_intervals=0:1,0.2:0.7")
    return folder / "sweep", given, before


def test_only_what_is_missing_is_measured(swept):
    output, _, before = swept
    found = {path.name: path.stat().st_mtime_ns for path in (output / "settings").iterdir()}
    assert before.items() <= found.items()
    assert found.keys() - before.keys() == {"scale=2,interval=0.2-0.7,ema=teacher,steps=2.json"}
    assert not list((output.parent / "run" / "evaluation").glob("unfinished_*"))


def test_a_setting_is_what_fid_measures(swept, tmp_path):
    output, _, _ = swept
    workdir = shutil.copytree(output.parent / "run", tmp_path / "run")
    done = call(
        "fid", f"--workdir={workdir}", "--num_samples=60", "--sampling_batch_size=60", "--reference=dataset",
        "--extractor=classifier", "--sampling_steps=2", "--guidance_scale=2", "--guidance_interval=0.2,0.7",
    )  # fmt: skip
    measured, single = sweep.read(
        output / "settings" / "scale=2,interval=0.2-0.7,ema=teacher,steps=2.json"
    ), json.loads(done.stdout)
    for name in ("fid", "accuracy"):
        assert measured[name] == pytest.approx(single[name], rel=1e-6)


def test_settings_share_the_parameters_of_their_ema(swept):
    """They are read once, whatever the settings; each has its own way of sampling."""
    output, _, _ = swept
    plain = TrainedModel(output.parent / "run", sampling={})
    weights = sweep.Weights(plain, {})
    first, second = (sweep.Setting(scale, (0.0, 1.0), plain.config.ema.sampled, 2) for scale in (1.25, 3.0))
    models = [weights.model(setting) for setting in (first, second)]
    assert all(model.params is plain.params for model in models)
    assert [model.config.sampling.guidance_scale for model in models] == [1.25, 3.0]
    assert plain.config.sampling.guidance_scale not in (1.25, 3.0)
    assert weights.checksum(first) == record.params_checksum(plain.params) == weights.checksum(second)


def test_table_numbers_and_map(swept):
    output, _, _ = swept
    summary = json.loads((output / "sweep.json").read_text())
    fids = [row["fid"] for row in summary["settings"]]
    assert len(fids) == 3 and fids == sorted(fids)
    assert summary["best"]["behind"] == 0 and summary["best"]["error"] > 0
    assert all(row["behind_error"] > 0 for row in summary["settings"][1:])
    assert len((output / "sweep.md").read_text().splitlines()) == 7
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_settings_that_were_measured_otherwise_are_refused(swept):
    _, given, _ = swept
    done = call("sweep", *given, "--guidance_scales=1", "--guidance_intervals=0:1", "--seed=5", code=2)
    assert "sampling.seed: 0 -> 5" in done.stderr
    done = call("sweep", *given, "--guidance_scales=1", "--guidance_intervals=0:1", "--num_samples=61", code=2)
    assert "num_samples: 60 -> 61" in done.stderr


@pytest.mark.faults
def test_one_process_at_a_time(swept):
    output, given, _ = swept
    with files.locked_output(output / "sweep.json", "wait"):
        done = call("sweep", *given, "--guidance_scales=1", "--guidance_intervals=0:1", code=2)
    assert "is being written by process" in done.stderr


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--guidance_scales=0.5",), "--guidance_scales=0.5 must be at least 1"),
        (("--guidance_scales=2,2",), "must name at least one, and none twice"),
        (("--guidance_intervals=0.7:0.1",), "--guidance_intervals"),
        (("--emas=power:0.1",), "--ema=power:0.1 was not tracked"),
        (("--num_samples=4",), "--num_samples=4: these metrics and --folds=3 need 6"),
        (("--metrics=sfid",), "sfid needs spatial features"),
    ],
)
def test_bad_input(swept, flags, said):
    _, given, _ = swept
    done = call("sweep", *given, *flags, code=2)
    assert said in done.stderr


def test_errors_are_a_jackknife_s():
    """Of a mean, the jackknife's error is the textbook's; a part left out of FID is left out of all statistics."""
    values = np.random.default_rng(0).normal(size=12)
    without = [(values.sum() - value) / 11 for value in values]
    assert sweep.jackknife(without) == pytest.approx(values.std(ddof=1) / 12**0.5)
    pool = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    others = gaussian_statistics(np.random.default_rng(2).normal(size=(50, 4)))
    reference = Reference("toy", "toy/1", None, None, others, None, None)
    folds = sweep.Folds(30, 3)
    for part in np.split(pool, [7, 20]):
        list(folds.watched([({"pool": part}, None)]))
    expected = [
        frechet_distance(gaussian_statistics(pool[np.arange(30) % 3 != left_out]), reference.pool)
        for left_out in range(3)
    ]
    np.testing.assert_allclose(folds.without(reference), expected, rtol=1e-9)
