import numpy as np
import pytest

from sra_jax.data import digits, digits_captions
from sra_jax.evaluation import judge


@pytest.fixture(scope="module")
def trained():
    """A judge of few canvases and steps: far better than chance, which is 1% for pairs."""
    return judge.trained_judge(steps=150, count=1000)


def test_it_judges_real_canvases(trained):
    assert trained.accuracy > 0.3


def test_asked_and_shown_are_compared(trained):
    """What it sees on a canvas is right, and wrong with the digits in the other order, or with one of them alone."""
    images, classes = judge.canvases("unseen", 400, seed=3)
    seen = judge.classes_of(trained.classifier, images)
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
