"""tools/pca.py as a user runs it, and the colours it draws."""

import numpy as np
import pytest
from PIL import Image

from sra_jax.inspection.principal_components import token_colours
from tests.conftest import run

TOOL = "tools/pca.py"


def test_runs_side_by_side(tiny_run, tmp_path):
    output = tmp_path / "pca.png"
    flags = (f"--workdir={tiny_run},{tiny_run}", "--names=A,B", "--levels=0.1,0.5", "--blocks=1,3",
             f"--output={output}")  # fmt: skip
    run(TOOL, *flags)
    picture = np.asarray(Image.open(output).convert("RGB"))
    assert picture.shape[1] > picture.shape[0]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert "exists" in run(TOOL, *flags, code=2).stderr


def test_any_picture(tiny_run, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "in.png")
    output = tmp_path / "out.png"
    run(TOOL, f"--workdir={tiny_run}", f"--image={tmp_path / 'in.png'}", "--levels=0.2", f"--output={output}")
    assert Image.open(output).size[0] > 50


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--example=99999",), "examples run from 0 to 1796"),
        (("--image=main.py",), "cannot be read as a picture"),
        (("--image=x.png", "--condition=true"), "needs a label"),
    ],
)
def test_wrong_input(tiny_run, tmp_path, flags, message):
    done = run(TOOL, f"--workdir={tiny_run}", f"--output={tmp_path / 'pca.png'}", *flags, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "pca.png").exists()


@pytest.fixture
def tokens():
    """Three directions of falling strength, the first the brightness of the latents; two levels, two blocks."""
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((8, 8, 1))
    brightness = latents.reshape(4, 2, 4, 2).mean(axis=(1, 3)).ravel()
    other = generator.standard_normal((2, 16))
    directions = np.linalg.qr(generator.standard_normal((12, 12)))[0]
    one = np.outer(10 * brightness, directions[0]) + np.outer(other[0], directions[1]) + np.outer(
        0.3 * other[1], directions[2]
    )  # fmt: skip
    return np.stack([np.stack([one, 2 * one]), np.stack([0.5 * one, one])]).astype(np.float32), latents, brightness


def test_components_are_found_signed_and_scaled(tokens):
    features, latents, brightness = tokens
    colours = token_colours(features, latents)
    assert colours.shape == (2, 2, 4, 4, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    first = colours[0, 0, ..., 0].ravel()
    inner = (first > 0) & (first < 1)
    assert np.corrcoef(first[inner], brightness[inner])[0, 1] > 0.98


def test_colours_do_not_depend_on_sign_rotation_or_size(tokens):
    """What an eigenvector's sign, a change of basis or a scale would move: nothing."""
    features, latents, _ = tokens
    colours = token_colours(features, latents)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((12, 12)))[0].astype(np.float32)
    for changed in (-features, features @ rotation, 7 * features + 3):
        np.testing.assert_allclose(token_colours(changed, latents), colours, atol=2e-3)
