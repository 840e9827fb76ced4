"""tools/fid.py --again: a result made once more, and what is otherwise when it does not agree."""

import json
import shutil

import jax
import numpy as np
import pytest

from sra_jax.evaluation import record
from sra_jax.runs.checkpoints import Checkpoints
from sra_jax.runs.state import TrainState
from tests.checkpoints import final_state
from tests.in_process import call

FLAGS = (
    "--num_samples=40", "--sampling_batch_size=40", "--sampling_steps=2", "--reference=dataset",
    "--extractor=classifier", "--metrics=fid,precision,accuracy",
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tiny_run, tmp_path_factory, classifier_cache):
    """A run, and the file of its result."""
    folder = tmp_path_factory.mktemp("again")
    workdir = shutil.copytree(tiny_run, folder / "run")
    call("fid", f"--workdir={workdir}", *FLAGS, f"--json={folder / 'result.json'}")
    return workdir, folder / "result.json"


def test_a_result_holds_all_that_shapes_it(measured):
    found = json.loads(measured[1].read_text())[record.NAME]
    assert found["checkpoint"].keys() == {"run", "step", "weights", "checksum"}
    assert (found["checkpoint"]["step"], found["checkpoint"]["weights"]) == (24, "ema")
    assert found["sampling"].items() >= {"sampler": "sde", "steps": 2, "guidance_scale": 1.5, "seed": 0}.items()
    assert (found["dtype"], found["decoder"]) == ("float32", None)
    assert found["extractor"].startswith("classifier/")
    assert (found["reference"]["name"], found["reference"]["count"]) == ("digits", 1797)
    assert len(found["reference"]["checksum"]) == 16
    assert found["environment"]["versions"]["jax"] == jax.__version__
    assert found["environment"]["device"].startswith("8 x ")
    given = found["given"]
    assert (given["labels"], given["num_samples"], given["metrics"]) == (
        "balanced", 40, ["fid", "precision", "accuracy"]
    )  # fmt: skip


def test_once_more_is_equal(measured):
    done = call("fid", f"--again={measured[1]}")
    assert "agrees (to 0.001 of each metric):" in done.stderr
    assert done.stderr.count(", equal\n") == 3
    assert "made in the same way, by all that is recorded" in done.stderr


def test_another_flag_is_named(measured):
    done = call("fid", f"--again={measured[1]}", "--guidance_scale=3", "--seed=5", code=1)
    assert "does not agree" in done.stderr
    assert "sampling.seed: 0 -> 5" in done.stderr
    assert "sampling.guidance_scale: 1.5 -> 3.0" in done.stderr
    assert "given.guidance_scale: 1.5 -> 3.0" in done.stderr
    assert "checkpoint" not in done.stderr.partition("made otherwise:")[2]


def test_one_changed_weight_is_named(measured, tmp_path):
    workdir = shutil.copytree(measured[0], tmp_path / "run")
    params, ema, opt_state = final_state(workdir)
    shutil.rmtree(workdir / "checkpoints")
    kernel = np.array(ema["model"]["final"]["linear"]["kernel"])
    kernel.flat[3] = np.nextafter(kernel.flat[3], np.float32(1))
    ema["model"]["final"]["linear"]["kernel"] = kernel
    checkpoints = Checkpoints(workdir)
    checkpoints.save(TrainState(jax.numpy.asarray(24), params, ema, opt_state), {"step": 24})
    checkpoints.close()
    done = call("fid", f"--again={measured[1]}", f"--workdir={workdir}")
    otherwise = done.stderr.partition("made otherwise:")[2]
    assert otherwise.strip().startswith("checkpoint.checksum: ")
    assert len(otherwise.strip().splitlines()) == 1


def test_another_version_is_named(measured, tmp_path):
    result = json.loads(measured[1].read_text())
    result[record.NAME]["environment"]["versions"]["jax"] = "0.1.2"
    (tmp_path / "old.json").write_text(json.dumps(result))
    done = call("fid", f"--again={tmp_path / 'old.json'}")
    assert f"environment.versions.jax: '0.1.2' -> '{jax.__version__}'" in done.stderr
    assert "agrees (to 0.001" in done.stderr


@pytest.mark.parametrize("text", ["{", "[]", '{"fid": 3.0}'])
def test_what_is_no_such_result(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    done = call("fid", f"--again={tmp_path / 'r.json'}", code=2)
    assert "is no result that says how it was made" in done.stderr
    assert "cannot be read" in call("fid", f"--again={tmp_path / 'none.json'}", code=2).stderr
