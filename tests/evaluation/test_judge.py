import numpy as np
import pytest

from sra_jax.data import digits, digits_captions
from sra_jax.evaluation import judge


@pytest.fixture(scope="module")
def trained():
    return judge.trained_judge()


def test_it_judges_real_canvases(trained):
    """The least that makes its word on samples worth something."""
    assert trained.accuracy >= 0.97


def test_asked_and_shown_are_compared(trained):
    """What it sees on a canvas is right, and wrong with the digits in the other order, or with one of them alone."""
    images, classes = judge.canvases("unseen", 400, seed=3)
    seen = judge.classes_of(trained.machine, images)
    pairs = np.flatnonzero((seen[:, [0, 2]] < judge.BLANK).all(axis=1) & (seen[:, 0] != seen[:, 2]))
    assert len(pairs) > 50
    asked = [(left, right) for left, _, right in seen[pairs].tolist()]
    assert trained.right(images[pairs], asked).all()
    assert not trained.right(images[pairs], [(right, left) for left, right in asked]).any()
    assert not trained.right(images[pairs], [(left,) for left, _ in asked]).any()
    assert judge.shown_right(classes, classes).all()


def test_strips_are_what_their_classes_say():
    images, classes = judge.canvases("judge", 600, seed=0)
    assert images.shape == (600, 16, 16, 1)
    assert images.dtype == np.uint8
    again, _ = judge.canvases("judge", 600, seed=0)
    np.testing.assert_array_equal(again, images)
    digit = classes < judge.BLANK
    kinds = {"blank": judge.BLANK, "crowded": judge.OTHER}
    alike = {kind: (classes == number).all(axis=1).mean() for kind, number in kinds.items()}
    shares = {"pair": digit[:, 0].mean(), "single": digit[:, 1].mean(), **alike}
    assert shares == pytest.approx(judge.SHARES, abs=0.06)
    cut = judge.strips(images)
    assert cut.shape == (1800, 16, 8, 1)
    for number, left in enumerate(judge.LEFTS):
        np.testing.assert_array_equal(cut[number::3], images[:, :, left : left + 8])
    scans, labels = digits_captions.scans("judge")
    shown = np.asarray(digits.decode(scans / 8 - 1))
    known = {scan.tobytes(): label for scan, label in zip(shown, labels, strict=True)}
    for strip, found in zip(cut[:90, ..., 0], classes.reshape(-1), strict=False):
        if found < judge.BLANK:
            assert found in {known.get(strip[top : top + 8].tobytes()) for top in range(9)}
    assert set(np.unique(images)) <= set(np.asarray(digits.decode(np.arange(17) / 8 - 1)).tolist())


def test_what_is_no_canvas_of_two_digits_is_not_right(trained):
    """Blank and crowded canvases, single digits and noise show no pair, whichever is asked for."""
    images, classes = judge.canvases("unseen", 600, seed=5)
    wrong = images[(classes[:, [0, 2]] >= judge.BLANK).all(axis=1)]
    noise = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 1), np.uint8)
    for shown in (wrong, noise, np.zeros_like(noise)):
        found = [trained.right(shown, [(left, right)] * len(shown)).mean() for left in (0, 1, 8) for right in (2, 7)]
        assert max(found) < 0.02
