import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests import running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """digits.npz, labelled; samples.npz: shifted and noisy digits with labels; photos/: a few small png files."""
    folder = tmp_path_factory.mktemp("fid")
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[..., None]
    np.savez(folder / "digits.npz", images, data.target)
    generator = np.random.default_rng(0)
    chosen = generator.permutation(len(images))[:300]
    noisy = np.clip(images[chosen] + generator.integers(-40, 40, images[chosen].shape), 0, 255).astype(np.uint8)
    np.savez(folder / "samples.npz", noisy, data.target[chosen])
    (folder / "photos").mkdir()
    for index in range(6):
        image = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / "photos" / f"{index}.png")
    return folder


def run(folder, *flags, code=0, devices=1, fresh=False):
    """The tool, started in the folder."""
    environment = {
        "SRA_JAX_CACHE": str(folder / "cache"),
        "https_proxy": "http://127.0.0.1:9",  # nobody listens there: a machine without a network
    }
    return running.run(
        "tools/fid.py", *flags, code=code, devices=devices, environment=environment, folder=folder, fresh=fresh
    )


def test_classifier_on_digits_with_statistics_made_once(folder):
    first = run(
        folder,
        "--samples=samples.npz",
        "--reference=digits.npz",
        "--make_reference=statistics.npz",
        "--extractor=classifier",
        "--json=result.json",
        fresh=True,
    )
    result = json.loads(first.stdout)
    assert json.loads((folder / "result.json").read_text()) == result
    assert list(result)[1:6] == ["fid", "inception_score", "precision", "recall", "accuracy"]
    assert result["extractor"].startswith("classifier/")
    assert result["accuracy"] > 0.9
    assert result["fid"] > 0
    for text in ("FID", "Inception score", "Precision", "Recall", "Conditional accuracy", "image/s"):
        assert text in first.stderr

    # On four devices, from the statistics file, in other batches: the same numbers.
    flags = ("--samples=samples.npz", "--reference=statistics.npz", "--extractor=classifier", "--batch_size=50")
    second = run(folder, *flags, devices=4)
    again = json.loads(second.stdout)
    assert again["extractor"] == result["extractor"]
    for name in ("fid", "inception_score", "precision", "recall", "accuracy"):
        assert again[name] == pytest.approx(result[name], rel=1e-4)

    refused = run(folder, *flags, "--json=result.json", code=2)
    assert "result.json exists and is not overwritten" in refused.stderr
    other = ("--samples=samples.npz", "--reference=statistics.npz", "--extractor=inception_random")
    refused = run(folder, *other, code=2)
    assert "do not compare" in refused.stderr


def test_inception_random_on_a_folder(folder):
    finished = run(folder, "--samples=photos", "--reference=photos", "--extractor=inception_random", "--batch_size=4")
    result = json.loads(finished.stdout)
    assert result["fid"] < 1e-6
    assert result["sfid"] < 1e-6
    assert (result["precision"], result["recall"], result["num_samples"]) == (1, 1, 6)
    assert result["extractor"].startswith("inception_random/")
    assert "inception_random" in finished.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to do: give --samples"),
        (["--samples=samples.npz"], "no download.*--weights="),
        (["--samples=samples.npz", "--extractor=inception_random"], "fid.*need --reference"),
        (["--samples=nothing.npz", "--reference=digits.npz"], "nothing.npz does not exist"),
        (["--samples=samples.npz", "--reference=nothing"], "nothing does not exist"),
        (["--make_reference=x.npz"], "needs --reference"),
        (["--reference=digits.npz", "--make_reference=digits.npz"], "exists and is not overwritten"),
        (["--samples=samples.npz", "--extractor=inception_random", "--metrics=fid,psnr"], "unknown metric 'psnr'"),
        (["--samples=samples.npz", "--reference=photos", "--extractor=classifier"], "has no labels"),
    ],
)
def test_bad_input(folder, flags, message):
    finished = run(folder, *flags, code=2)
    assert re.search(f"error: .*({message})", finished.stderr)
    assert "Traceback" not in finished.stderr
