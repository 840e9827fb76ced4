"""tools/fid.py on a run's own samples, and the same metrics during training."""

import json
import shutil

import numpy as np
import pytest

from tests.conftest import TINY_DIGITS, kill_when, run, start

FAST = ("--sampling_steps=2", "--extractor=classifier", "--reference=dataset", "--sampling_batch_size=100")
METRICS = ("fid", "inception_score", "precision", "recall", "accuracy")


pytestmark = pytest.mark.usefixtures("classifier_cache")


@pytest.fixture
def workdir(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture(scope="module")
def measured(tiny_run, tmp_path_factory, classifier_cache):
    """1,100 samples measured at once, and the samples."""
    folder = tmp_path_factory.mktemp("measured")
    workdir = shutil.copytree(tiny_run, folder / "run")
    save = f"--save_samples={folder / 's.npz'}"
    done = run("tools/fid.py", f"--workdir={workdir}", "--num_samples=1100", *FAST, save)
    return json.loads(done.stdout), folder / "s.npz", workdir


def test_result_is_printed_and_kept(measured):
    result, _, workdir = measured
    assert set(METRICS) <= result.keys()
    assert (result["num_samples"], result["step"], result["sampling"]["steps"]) == (1100, 24, 2)
    assert json.loads((workdir / "evaluation" / "step_0000024.json").read_text()) == result
    assert [path.name for path in (workdir / "evaluation").iterdir()] == ["step_0000024.json"]


def test_saved_samples_measure_the_same(measured):
    result, samples, _ = measured
    arrays = np.load(samples)
    assert arrays["arr_0"].shape == (1100, 8, 8, 1)
    np.testing.assert_array_equal(arrays["arr_1"], np.arange(1100) % 10)
    done = run("tools/fid.py", f"--samples={samples}", "--reference=digits", "--extractor=classifier")
    again = json.loads(done.stdout)
    for name in METRICS:
        assert again[name] == pytest.approx(result[name], rel=1e-6)


@pytest.mark.slow
@pytest.mark.faults
def test_killed_generation_goes_on_where_it_stopped(measured, workdir):
    """SIGKILL once the first chunk is kept: the second attempt reads it and gives the same numbers."""
    arguments = ("tools/fid.py", f"--workdir={workdir}", "--num_samples=1100", *FAST)
    folder = workdir / "evaluation"
    kill_when(start(*arguments), lambda: any(folder.glob("unfinished_*/0000000_0001000.npz")))
    second = start(*arguments)
    output, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert "1000 of 1100 samples are kept from an earlier attempt" in errors
    for name in METRICS:
        assert json.loads(output)[name] == pytest.approx(measured[0][name], rel=1e-6)
    assert not list(folder.glob("unfinished_*"))


def test_metrics_during_training(tmp_path):
    """Every 12 steps into metrics.jsonl and evaluation/; a resumed run logs the same."""
    flags = (*TINY_DIGITS, "--config.evaluation.every=12", "--config.evaluation.num_samples=50",
             "--config.evaluation.extractor=classifier", "--config.sampling.steps=2")  # fmt: skip
    run("main.py", *flags, f"--workdir={tmp_path}")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "fid" in record]
    assert [record["step"] for record in evaluated] == [12, 24]
    assert set(METRICS) <= evaluated[0].keys()
    kept = json.loads((tmp_path / "evaluation" / "step_0000024.json").read_text())
    assert kept["fid"] == evaluated[-1]["fid"]
    assert kept["num_samples"] == 50


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samples=x.npz", "--reference=digits"), "one at a time"),
        (("--reference=nothing.npz",), "nothing.npz does not exist"),
        (("--reference=dataset", "--num_samples=3"), "need at least 4"),
        (("--step=3", "--reference=dataset"), "--step=3 is not saved"),
        ((), "need --reference"),
    ],
)
def test_wrong_input(tiny_run, flags, message):
    extractor = () if not flags else ("--extractor=classifier",)
    extractor = extractor or ("--extractor=inception_random",)
    done = run("tools/fid.py", f"--workdir={tiny_run}", *flags, *extractor, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tiny_run / "evaluation").exists()
