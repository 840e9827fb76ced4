import numpy as np
import pytest
from toy import toy_extractor, toy_images

from sra_jax.errors import UserError
from sra_jax.evaluation.features import extract_features, rebatch


def pieces(images, labels, lengths):
    ends = np.cumsum(lengths)
    assert ends[-1] == len(images)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield images[start:end], None if labels is None else labels[start:end]


@pytest.mark.parametrize("lengths", [[23], [1] * 23, [5, 0, 18], [10, 10, 3]])
@pytest.mark.parametrize("with_labels", [True, False])
def test_rebatch(lengths, with_labels):
    images, labels = np.arange(23), np.arange(23) * 2 if with_labels else None
    batches = list(rebatch(pieces(images, labels, lengths), 10))
    assert [len(images) for images, _ in batches] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), images)
    if with_labels:
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), labels)
    else:
        assert all(labels is None for _, labels in batches)


def test_rebatch_refuses_labels_of_some():
    with pytest.raises(UserError, match="some images have labels"):
        list(rebatch([(np.arange(3), np.arange(3)), (np.arange(3), None)], 10))


@pytest.mark.parametrize("batch_size", [1, 4, 13, 50, None])
def test_every_image_counts_once_and_in_order(batch_size):
    images, labels, extractor = toy_images(13), np.arange(13), toy_extractor()
    expected = extractor.apply(extractor.parameters, images)
    batches = list(extract_features(pieces(images, labels, [6, 7]), extractor, batch_size=batch_size, progress=False))
    for name in extractor.outputs:
        features = np.concatenate([features[name] for features, _ in batches])
        np.testing.assert_allclose(features, expected[name], atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), labels)


def test_no_images():
    assert list(extract_features([], toy_extractor(), progress=False)) == []


def test_bad_images_and_weights():
    def run(*batches, spoilt=False):
        pairs = [(images, None) for images in batches]
        return list(extract_features(pairs, toy_extractor(spoilt=spoilt), batch_size=4, progress=False))

    with pytest.raises(UserError, match="float32 values; expected uint8"):
        run(toy_images(3).astype(np.float32))
    with pytest.raises(UserError, match=r"images of \(5, 5, 3\), expected \(4, 4, 3\)"):
        run(toy_images(4), toy_images(4, shape=(5, 5, 3)))
    with pytest.raises(UserError, match="not finite"):
        run(toy_images(3), spoilt=True)
