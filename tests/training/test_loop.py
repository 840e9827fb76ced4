"""What happens around the train step, in this process."""

import contextlib
import json
import resource
import shutil

import numpy as np
import pytest

from configs import digits
from sra_jax import files
from sra_jax.data import shards
from sra_jax.errors import RunError, UserError
from sra_jax.runs.metrics import clocked
from sra_jax.training.loop import train

TINY = {
    "model.width": 32, "model.depth": 3, "model.heads": 2, "alignment.student_block": 1, "alignment.teacher_block": 2,
    "batch_size": 16, "optimizer.warmup_steps": 0, "log_every": 1, "sample_every": 0, "ema.decay": 0.8, "steps": 8,
    "checkpoint_every": 2, "keep": 10,
}  # fmt: skip


def recipe(**changes):
    config = digits.get_config()
    config.update_from_flattened_dict(TINY | changes)
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The workdir of a finished run of eight steps, all of whose checkpoints are kept. Read only."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(recipe(), workdir)
    return workdir


def stopped(undisturbed, workdir, step):
    """The same run as it was after this step."""
    shutil.copytree(undisturbed, workdir, dirs_exist_ok=True)
    for later in range(step + 2, 9, 2):
        shutil.rmtree(workdir / "checkpoints" / str(later))


@pytest.mark.faults
def test_a_workdir_is_one_run_s_at_a_time(undisturbed, tmp_path):
    with files.locked(tmp_path, ""), pytest.raises(UserError, match=r"written by process .*choose another --workdir"):
        train(recipe(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not (undisturbed / ".lock").exists()


@contextlib.contextmanager
def no_file_beyond(size):
    """As on a full disk, writing fails: no file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not clocked(key)} for line in lines]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("size", "first", "message"),
    [
        (20_000, 0, r"a checkpoint cannot be written: File too large; no checkpoint was saved before"),
        (20_000, 4, r"a checkpoint cannot be written: File too large; the newest whole checkpoint is step 4 in"),
        (500, 4, r"File too large; the newest whole checkpoint is step 4 in .*start the same command again"),
    ],
)
def test_a_full_disk_ends_the_run(undisturbed, tmp_path, size, first, message):
    """While arrays are written at the first save or a later one, and while metrics are written."""
    if first:
        stopped(undisturbed, tmp_path, first)
    with no_file_beyond(size), pytest.raises(RunError, match=message):
        train(recipe(steps=40), tmp_path)
    assert records(tmp_path)[-1]["step"] < 12  # and not at the end
    if first and size > 1000:
        train(recipe(), tmp_path)
        assert records(tmp_path) == records(undisturbed)


def latents(folder, vae, spoilt=None):
    """16 prepared latents 4x4x4 of two classes; example number `spoilt` holds a NaN."""
    rng = np.random.default_rng(0)
    layout = shards.RecordLayout((4, 4, 4), "float32")
    writer = shards.ShardWriter(folder, {}, layout, 2)
    moments = np.abs(rng.normal(size=(16, 2, 4, 4, 4))).astype(np.float32)
    if spoilt is not None:
        moments[spoilt, 0, 1, 2, 3] = np.nan
    for index in range(2):
        writer.write(index, [(moments[i], i % 2) for i in range(8 * index, 8 * index + 8)], [])
    writer.finish(
        lambda made, skipped: shards.Manifest(
            {}, "none", layout, 2, ("cat", "dog"), str(vae.folder), None, vae.config, made, skipped
        )
    )
    return {"data.name": "latents", "data.path": str(folder), "data.image_size": 4, "data.channels": 4,
            "data.num_classes": 2}  # fmt: skip


@pytest.mark.faults
def test_a_nan_in_the_training_set_is_named(tmp_path, tiny_vae):
    changes = latents(tmp_path / "latents", tiny_vae, spoilt=11)
    with pytest.raises(RunError, match=r"is nan at step 1, because .*00001-of-00002.arrayrecord, record 3 .example 11"):
        train(recipe(**changes), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["cat", "dog"]

    # the same run on a set whose classes have changed places
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    (tmp_path / "latents" / "manifest.json").write_text(json.dumps(manifest | {"class_names": ["dog", "cat"]}))
    with pytest.raises(UserError, match=r"label 0 is cat for this run, and dog in the training set"):
        train(recipe(**changes), tmp_path / "run")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.every": 2, "evaluation.reference": "absent.npz"}, "absent.npz does not exist"),
        (
            {"evaluation.every": 2, "evaluation.reference": "sklearn:photos", "evaluation.weights": "absent.pth"},
            "Inception weights absent.pth do not exist",
        ),
        ({"sample_every": 2, "data.vae": "absent"}, "no VAE at 'absent'"),
    ],
)
def test_what_is_missing_is_found_before_the_step_is_compiled(tmp_path, tiny_vae, monkeypatch, changes, message):
    def compile(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr("sra_jax.training.loop.abstract_batch", compile)
    with pytest.raises(UserError, match=message):
        train(recipe(**latents(tmp_path / "latents", tiny_vae), **changes), tmp_path / "run")
