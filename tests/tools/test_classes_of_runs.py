"""A run's labels and the names of their classes, in process."""

import json
import shutil

import numpy as np
import pytest

from sra_jax import files
from tests.in_process import call


@pytest.fixture
def workdir(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def rename(workdir, *names):
    (workdir / "classes.json").write_text(json.dumps(names))


def test_training_keeps_the_names(tiny_run):
    assert json.loads((tiny_run / "classes.json").read_text()) == [str(digit) for digit in range(10)]


def test_classes_are_chosen_by_number_or_name_and_said(workdir, tmp_path):
    """A run on folders 0, 1, 10, ...: a number is the label, name:10 the folder; the npz says what labels stand for."""
    names = ("0", "1", "10", "2", "3", "4", "5", "cat", "7", "8")
    rename(workdir, *names)
    done = call("sample", f"--workdir={workdir}", "--num_samples=5", "--sampling_steps=2", "--batch_size=8",
                "--labels=2,name:2,cat", f"--output={tmp_path / 's.npz'}")  # fmt: skip
    assert "labels: 2 = 10, 3 = 2, 7 = cat" in done.stderr
    arrays = np.load(tmp_path / "s.npz")
    np.testing.assert_array_equal(arrays["arr_1"], [2, 3, 7, 2, 3])
    assert tuple(arrays["class_names"]) == names


@pytest.mark.parametrize("labels", ["dog", "name:6", "name:", "1,,2", "²", "--5", "3.0"])
def test_labels_that_are_none(workdir, tmp_path, labels):
    rename(workdir, *"abcdefghij")
    done = call("sample", f"--workdir={workdir}", f"--labels={labels}", f"--output={tmp_path / 's.npz'}", code=2)
    assert "must be balanced, uniform, or classes such as 3 or 1,5,7" in done.stderr
    assert "this run's names begin with a, b, c" in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("content", ["{", '["a"]', "[1, 2]", "[" * 100_000])
def test_damaged_names(workdir, tmp_path, content):
    (workdir / "classes.json").write_text(content)
    done = call("sample", f"--workdir={workdir}", f"--output={tmp_path / 's.npz'}", code=2)
    assert "classes.json does not hold the run's class names" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_set_than_the_run_has_learned(workdir, tmp_path):
    rename(workdir, *(str(digit) for digit in (0, 2, 1, *range(3, 10))))
    for tool, flags in (("pca", ("--levels=0.2",)), ("linear_probe", ("--epochs=1",))):
        done = call(tool, f"--workdir={workdir}", f"--output={tmp_path / 'x.png'}", *flags, code=2)
        assert "label 1 is 2 for this run, and 1 in digits: give the set that the run was trained on" in done.stderr


@pytest.mark.faults
@pytest.mark.parametrize(
    ("tool", "flag", "others"),
    [
        ("sample", "output", ()),
        ("sample", "grid", ()),
        ("pca", "output", ()),
        ("linear_probe", "output", ()),
        ("fid", "save_samples", ("--extractor=inception_random", "--metrics=inception_score")),
        ("fid", "json", ("--extractor=inception_random", "--metrics=inception_score")),
    ],
)
def test_two_commands_on_one_file(tool, flag, others, tiny_run, tmp_path):
    """The second is refused before it samples or measures, and told who writes there."""
    path = tmp_path / "x.npz"
    with files.locked_output(path / "probe.json" if tool == "linear_probe" else path, "wait"):
        done = call(tool, f"--workdir={tiny_run}", f"--{flag}={path}", *others, code=2)
    assert "is being written by process" in done.stderr
    assert f"or choose another --{flag}" in done.stderr
    assert not path.is_file()
