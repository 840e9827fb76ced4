"""tools/fid.py in process, on sets whose labels are counted in different orders: classes go by their names."""

import json

import numpy as np
import pytest
from PIL import Image

from sra_jax.evaluation import classifier
from tests.in_process import call

CLASSES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve patterns that are easy to tell apart: numbers.npz with labels, numbers/ with folders 0 .. 11."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(0)
    labels = np.arange(CLASSES * 20) % CLASSES
    patterns = rng.integers(0, 2, (CLASSES, 8, 8, 1)) * 160 + 40
    images = (patterns[labels] + rng.integers(-30, 30, (len(labels), 8, 8, 1))).astype(np.uint8)
    np.savez(folder / "numbers.npz", images, labels)
    names = np.array(["zero", "one"] + [f"many{i}" for i in range(2, CLASSES)])
    np.savez(folder / "words.npz", images, labels, class_names=names)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        for path in (folder / "numbers" / f"{label}" / f"{i}.png", folder / "words" / names[label] / f"{i}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
    (folder / "numbers" / ".ipynb_checkpoints").mkdir()
    Image.fromarray(images[0, ..., 0]).save(folder / "numbers" / ".ipynb_checkpoints" / "0.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_classifier(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(classifier, "STEPS", 60)
        yield


def measure(folder, samples, reference, *flags, code=0):
    reference = f"imagefolder:{folder / reference}" if "." not in reference else folder / reference
    return call(
        "fid", f"--samples={folder / samples}", f"--reference={reference}", "--extractor=classifier",
        "--metrics=accuracy", *flags, code=code,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "reference"),
    [("numbers", "numbers.npz"), ("numbers.npz", "numbers"), ("words", "words.npz"), ("words.npz", "words")],
)
def test_accuracy_is_that_of_the_same_classes(folder, samples, reference):
    done = measure(folder, samples, reference)
    result = json.loads(done.stdout)
    assert result["accuracy"] > 0.9
    assert result["samples_per_class"] == [20, 20]
    said = "0 = 0, 1 = 1, 2 = 10, 3 = 11" if "numbers" in samples else "zero"
    assert said in done.stderr
    if "numbers" in samples:
        assert "left out 1 hidden or a system's" in done.stderr


def test_names_against_numbers(folder):
    """Nothing tells which of them is which: said by default, refused where accuracy was asked for."""
    done = measure(folder, "words", "numbers.npz", code=2)
    assert "error: labels of" in done.stderr
    assert "has no class many10, many11, many2," in done.stderr
    flags = (f"--samples={folder / 'words'}", f"--reference={folder / 'numbers.npz'}", "--extractor=classifier")
    done = call("fid", *flags)
    assert "accuracy is left out: labels of" in done.stderr
    result = json.loads(done.stdout)
    assert result["fid"] < 1e-6
    assert "accuracy" not in result


def test_statistics_keep_the_names(folder, tmp_path):
    statistics = tmp_path / "statistics.npz"
    call("fid", f"--reference=imagefolder:{folder / 'words'}", f"--samples={folder / 'words.npz'}",
         "--metrics=accuracy", f"--make_reference={statistics}", "--extractor=classifier")  # fmt: skip
    done = call("fid", f"--samples={folder / 'words.npz'}", f"--reference={statistics}", "--metrics=accuracy",
                "--extractor=classifier")  # fmt: skip
    assert json.loads(done.stdout)["accuracy"] > 0.9
    done = measure(folder, "numbers", "words.npz", code=2)
    assert "do not compare" in done.stderr


@pytest.mark.faults
def test_a_damaged_picture_is_one_line_with_its_name(folder, tmp_path):
    for name in ("0", "1"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "1" / "1.png").write_bytes((tmp_path / "1" / "0.png").read_bytes()[:40])
    done = measure(folder, tmp_path, "numbers.npz", code=2)
    assert "1/1.png is not a readable image" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.faults
def test_a_set_without_images_is_refused(folder, tmp_path):
    np.savez(tmp_path / "none.npz", np.zeros((0, 8, 8, 1), np.uint8))
    done = measure(folder, tmp_path / "none.npz", "numbers.npz", code=2)
    assert "none.npz holds no image" in done.stderr
    done = call("fid", f"--reference={tmp_path / 'none.npz'}", f"--make_reference={tmp_path / 'x.npz'}",
                "--extractor=inception_random", code=2)  # fmt: skip
    assert "none.npz holds no image" in done.stderr


def test_labels_below_zero_are_refused(folder, tmp_path):
    arrays = np.load(folder / "numbers.npz")
    np.savez(tmp_path / "x.npz", arrays["arr_0"], arrays["arr_1"] - 1)
    done = measure(folder, tmp_path / "x.npz", "numbers.npz", code=2)
    assert "run from -1, and must be from 0" in done.stderr
