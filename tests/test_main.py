"""main.py as a user runs it."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from tests.conftest import TINY_DIGITS, run


def test_what_a_run_leaves(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} == {
        "checkpoints", "samples", "metrics.jsonl", "tensorboard", "config.json", "environment.json", "classes.json"
    }  # fmt: skip
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12, 16, 20, 24]
    assert records[0].keys() == {
        "step", "loss", "loss_denoising", "loss_alignment", "alignment_weight", "learning_rate", "grad_norm",
        "param_norm", "update_norm", "student_feature_norm", "teacher_feature_norm", "sra/cosine", "sra/student_rank",
        "sra/target_rank", "steps_per_second", "examples_per_second", "device/tflops_per_second", "time/data_seconds",
        "time/device_seconds", "time/saving_seconds", "time/logging_seconds", "time/run_seconds", "time/goodput",
    }  # fmt: skip
    assert records[-1]["loss_denoising"] < records[0]["loss_denoising"]
    assert json.loads((tiny_run / "config.json").read_text())["model"]["width"] == 32
    assert sorted(path.name for path in (tiny_run / "checkpoints").iterdir()) == ["12", "18", "24"]


def test_preview_has_a_row_for_each_class(tiny_run):
    (preview,) = (tiny_run / "samples").iterdir()
    assert preview.name == "step_0000024.png"
    picture = np.asarray(Image.open(preview))
    tile = 48 + 2
    assert picture.shape == (10 * tile + 2, 2 * tile + 2)
    assert picture.std() > 0


def test_tensorboard_holds_the_metrics(tiny_run):
    (file,) = (tiny_run / "tensorboard").iterdir()
    logged = {}
    for event in EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            plugin = value.metadata.plugin_data.plugin_name
            logged.setdefault((plugin, value.tag), {})[event.step] = tensor_util.make_ndarray(value.tensor)
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    for name in records[0].keys() - {"step"}:
        expected = {record["step"]: np.float32(record[name]) for record in records}
        assert logged.pop(("scalars", name)) == expected
    (((plugin, _), pictures),) = logged.items()
    width, height, png = pictures[24]
    (preview,) = (tiny_run / "samples").iterdir()
    picture = Image.open(preview)
    assert (plugin, int(width), int(height)) == ("images", *picture.size)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(picture))


def test_smoke_variant_on_two_devices(tmp_path):
    """A recipe of the paper at toy size, its state split over two simulated devices."""
    done = run("main.py", "--config=configs/sit_b2.py:smoke", "--config.steps=4", "--config.log_every=2",
               "--config.sample_every=0", "--config.mesh.fsdp=2", f"--workdir={tmp_path}", devices=2)  # fmt: skip
    assert "done" in done.stdout
    assert "2 cpu device(s)" in done.stdout
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """A learning rate of 1e9: the message names the step and the last checkpoint, and nothing bad is saved."""
    done = run(
        "main.py", *TINY_DIGITS, "--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=0",
        "--config.checkpoint_every=1", f"--workdir={tmp_path}", code=1,
    )  # fmt: skip
    assert "at step" in done.stderr
    assert "checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


WRONG = [
    (("--config=configs/nothing.py",), "configs/nothing.py"),
    ((), "--config is missing"),
    (("--config=configs/sit_b2.py:tiny",), "unknown variant 'tiny'; allowed: smoke"),
    ((*TINY_DIGITS, "--config.stepz=3"), "stepz"),
    ((*TINY_DIGITS, "--config.alignment.teacher_block=13"), "teacher_block=13 is beyond model.depth=3"),
    ((*TINY_DIGITS, "--config.steps=many"), "many"),
    ((*TINY_DIGITS, "--confg.steps=3"), "confg"),
    ((*TINY_DIGITS, "steps=3"), "steps=3"),
    ((*TINY_DIGITS, "--workdir=/proc/none"), "cannot be written"),
    (("--config=configs/sit_b2.py",), "data"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input_ends_with_one_clear_message(arguments, message, tmp_path):
    workdir = () if any(a.startswith("--workdir") for a in arguments) else (f"--workdir={tmp_path / 'run'}",)
    done = run("main.py", *arguments, *workdir, code=2)
    assert message in done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_config_s_workdir_is_refused_unless_told_otherwise(tiny_run, tmp_path):
    import shutil

    workdir = tmp_path / "copy"
    shutil.copytree(tiny_run, workdir)
    changed = (*TINY_DIGITS, "--config.alignment.weight=0.7", "--config.steps=26", f"--workdir={workdir}")
    done = run("main.py", *changed, code=2)
    assert "alignment.weight: 0.2 -> 0.7" in done.stderr
    assert "--allow_config_change" in done.stderr
    assert json.loads((workdir / "config.json").read_text())["alignment"]["weight"] == 0.2
    done = run("main.py", *changed, "--allow_config_change")
    assert "resuming" in done.stdout
    assert json.loads((workdir / "config.json").read_text())["alignment"]["weight"] == 0.7
