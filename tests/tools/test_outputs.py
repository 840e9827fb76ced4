"""Every tool that writes: what cannot be written is refused before any work, what is made is kept."""

import os

import numpy as np
import pytest

from sra_jax import files
from sra_jax.errors import RunError, UserError
from tests.in_process import call

# A tool and its flag for a file, with flags that would otherwise fail later than the check of the output.
FILES = (
    ("sample", "output", ("--workdir=nothing",)),
    ("sample", "grid", ("--workdir=nothing",)),
    ("fid", "json", ("--samples=nothing.npz",)),
    ("fid", "save_samples", ("--workdir=nothing",)),
    ("fid", "make_reference", ("--reference=nothing.npz",)),
    ("pca", "output", ("--workdir=nothing",)),
    ("convert_checkpoint", "output", ("--workdir=nothing", "--export=ema")),
    ("compile_tpu", "json", ("--config=configs/digits.py",)),
)  # fmt: skip
FOLDERS = (
    ("prepare_latents", "output", ("--source=imagefolder:nothing",)),
    ("linear_probe", "output", ("--workdir=nothing",)),
    ("linear_probe", "cache", ("--workdir=nothing", "--output=x")),
    ("compile_tpu", "results", ("--config=configs/digits.py",)),
)  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize(("tool", "flag", "others"), [*FILES, *FOLDERS])
def test_an_output_below_a_file_is_refused_at_once(tool, flag, others, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = call(tool, *others, f"--{flag}={tmp_path / 'file' / 'deeper' / 'x.npz'}", code=2)
    assert f"error: --{flag}=" in done.stderr
    assert f"{tmp_path / 'file'} is no folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.faults
@pytest.mark.parametrize(("tool", "flag", "others"), FILES)
def test_a_folder_in_place_of_a_file_is_refused_at_once(tool, flag, others, tmp_path):
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    overwrite = ("--overwrite",) if tool in ("sample", "pca", "convert_checkpoint") else ()
    done = call(tool, *others, *overwrite, f"--{flag}={folder}", code=2)
    assert f"error: --{flag}={folder} is a folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_two_flags_never_name_one_file(tmp_path):
    path, same = tmp_path / "x.png", f"{tmp_path}/../{tmp_path.name}/x.png"
    done = call("sample", "--workdir=nothing", f"--output={path}", f"--grid={same}", code=2)
    assert "--output and --grid both name" in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipe", "is no plain file"),
        ("link/x", "link is no folder"),
        ("x" * 250, "File name too long"),
        ("kept", "exists and is not overwritten: choose another name or delete it"),
    ],
)
def test_what_cannot_become_a_file(name, message, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match=message):
        files.check_output("--output", tmp_path / name)


def test_new_files_in_new_folders_leave_no_trace_of_the_check(tmp_path):
    assert files.check_output("--output", tmp_path / "new" / "x.npz") == tmp_path / "new" / "x.npz"
    (tmp_path / "old").write_text("mine")
    files.check_output("--output", tmp_path / "old", overwrite=True)
    assert (os.listdir(tmp_path), (tmp_path / "old").read_text()) == (["old"], "mine")


def test_more_than_fits_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"will take 1000000000\.00 GB"):
        files.check_room("--output", tmp_path / "new" / "x", 10**18)


@pytest.mark.faults
def test_what_was_made_is_kept_where_writing_fails(tmp_path, monkeypatch):
    """One of two files has lost its place meanwhile: it lies elsewhere, the other where it belongs."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "gone").write_text("a file where a folder was")
    arrays = {"arr_0": np.arange(5)}
    lost, whole = tmp_path / "gone" / "samples.npz", tmp_path / "other.npz"
    with pytest.raises(RunError, match=r"samples\.npz cannot be written .* it lies in .*samples\.npz instead"):
        files.write_results({path: lambda path: files.write_npz(path, arrays) for path in (lost, whole)})
    (kept,) = tmp_path.glob("kept_*/samples.npz")
    for path in (kept, whole):
        np.testing.assert_array_equal(np.load(path)["arr_0"], arrays["arr_0"])
