"""tools/sample.py as a user runs it."""

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run

FAST = ("--sampling_steps=3", "--guidance_scale=20")  # so strong that even a barely trained model heeds labels


def test_npz_and_grid(tiny_run, tmp_path):
    output, grid = tmp_path / "samples.npz", tmp_path / "grid.png"
    done = run("tools/sample.py", f"--workdir={tiny_run}", "--num_samples=25", "--batch_size=10", f"--output={output}",
               f"--grid={grid}", *FAST)  # fmt: skip
    assert "step 24" in done.stderr
    arrays = np.load(output)
    assert arrays["arr_0"].shape == (25, 8, 8, 1)
    assert arrays["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(arrays["arr_1"], np.arange(25) % 10)
    assert np.asarray(Image.open(grid)).shape == (10 * 50 + 2, 10 * 50 + 2)


def test_a_sample_depends_on_seed_index_and_label_alone(tiny_run, tmp_path):
    """Batch size and number of devices change nothing beyond rounding; seed and label do."""

    def sample(name, *flags, devices=1):
        output = tmp_path / name
        run("tools/sample.py", f"--workdir={tiny_run}", "--num_samples=12", f"--output={output}", *FAST, *flags,
            devices=devices)  # fmt: skip
        return np.load(output)["arr_0"].astype(int)

    whole = sample("whole.npz")
    assert np.abs(sample("parts.npz", "--batch_size=5") - whole).max() <= 1
    assert np.abs(sample("devices.npz", "--batch_size=5", devices=4) - whole).max() <= 1
    fixed = sample("labels.npz", "--labels=0,1,7")  # differs in every label but the first two and number 7
    assert np.abs(fixed[[0, 1]] - whole[[0, 1]]).max() <= 1
    assert np.abs(fixed[2:7] - whole[2:7]).reshape(5, -1).max(axis=1).min() > 1
    assert np.abs(sample("seed.npz", "--seed=1") - whole).max() > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--step=5",), "--step=5 is not saved"),
        (("--guidance_scale=0.5",), "at least 1"),
        (("--guidance_interval=0.7",), "must be two numbers"),
        (("--sampler=magic",), "'magic' is unknown; allowed"),
        (("--sampling_steps=0",), "sampling.steps=0"),
        (("--eta=0.5",), "sampling.eta is not read by anything"),
        (("--labels=3,10",), "classes run from 0 to 9"),
        (("--labels=odd",), "balanced, uniform"),
        (("--num_samples=0",), "num_samples"),
    ],
)
def test_wrong_input(tiny_run, tmp_path, flags, message):
    done = run("tools/sample.py", f"--workdir={tiny_run}", f"--output={tmp_path / 's.npz'}", *flags, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s.npz").exists()


def test_no_run_and_nothing_to_write(tiny_run, tmp_path):
    assert "no run at" in run("tools/sample.py", f"--workdir={tmp_path}", "--grid=x.png", code=2).stderr
    assert "nothing to write" in run("tools/sample.py", f"--workdir={tiny_run}", code=2).stderr


def test_existing_files_are_kept(tiny_run, tmp_path):
    grid = tmp_path / "grid.png"
    grid.write_bytes(b"precious")
    done = run("tools/sample.py", f"--workdir={tiny_run}", f"--grid={grid}", code=2)
    assert "exists" in done.stderr
    assert grid.read_bytes() == b"precious"
