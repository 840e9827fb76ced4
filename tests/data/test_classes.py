import numpy as np
import pytest

from sra_jax.data.classes import described, translation
from sra_jax.errors import UserError

TEXT_ORDER = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...


def test_which_label_is_which_class_is_said():
    assert described(2, ["cat", "dog"]) == "2 classes: 0 = cat, 1 = dog"
    assert described(1, ["cat"]) == "1 class: 0 = cat"
    assert described(10, [str(i) for i in range(10)]) == "10 classes, 0 to 9"
    assert described(1000, None) == "1,000 classes without names"
    said = described(12, TEXT_ORDER)
    assert said.startswith("12 classes: 0 = 0, 1 = 1, 2 = 10, 3 = 11, 4 = 2, ..., 11 = 9. ")
    assert said.endswith("label 2 is the class 10")


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        (None, None, range(12)),
        (TEXT_ORDER, TEXT_ORDER, range(12)),
        (TEXT_ORDER, None, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]),
        (None, TEXT_ORDER, [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]),
        ([f"{i:02}" for i in range(12)], TEXT_ORDER, [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]),
        (list("bdfhjlacegik"), list("abcdefghijkl"), [1, 3, 5, 7, 9, 11, 0, 2, 4, 6, 8, 10]),
    ],
)
def test_labels_are_matched_by_name(given, known, expected):
    np.testing.assert_array_equal(translation(given, 12, known, 12, "samples", "the reference"), expected)


def test_a_part_of_the_classes():
    np.testing.assert_array_equal(translation(["dog"], 1, ["cat", "dog"], 2, "a", "b"), [1])
    np.testing.assert_array_equal(translation(None, 3, None, 10, "a", "b"), [0, 1, 2])


@pytest.mark.parametrize(
    ("given", "known", "message"),
    [
        (["cat", "fox"], ["cat", "dog"], "b has no class fox; it has 2 classes: 0 = cat, 1 = dog"),
        (None, ["cat", "dog"], "b has no class 0, 1;"),
        (["cat", "dog"], None, "b has no class cat, dog; it has 2 classes, 0 to 1"),
        (None, [str(i) for i in range(1, 3)], "b has no class 0;"),
    ],
)
def test_classes_without_a_counterpart_do_not_compare(given, known, message):
    with pytest.raises(UserError, match=message):
        translation(given, 2, known, 2, "a", "b")
    with pytest.raises(UserError, match="they run to 11 and to 9"):
        translation(None, 12, None, 10, "a", "b")
