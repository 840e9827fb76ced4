import json

import numpy as np
import pytest
from toy import toy_extractor, toy_images

from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate
from sra_jax.evaluation.frechet import frechet_distance
from sra_jax.evaluation.images import ImageSet
from sra_jax.evaluation.inception_score import inception_score
from sra_jax.evaluation.reference import make_reference
from sra_jax.evaluation.statistics import gaussian_statistics

ALL = tuple(evaluate.METRICS)


def image_set(images, labels=None):
    def read(batch_size):
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size]

    return ImageSet("toys", images.shape, labels, read)


def reference_of(extractor, images):
    return make_reference(image_set(images), extractor, progress=False)


def measure(images, extractor, *, reference=None, metrics=ALL, labels=None, batch_size=16):
    batches = image_set(images, labels).batches(7)
    return evaluate.measure(batches, reference, extractor, metrics=metrics, batch_size=batch_size, progress=False)


def test_equal_sets():
    extractor, images = toy_extractor(predicts_labels=True), toy_images(50)
    result = measure(images, extractor, reference=reference_of(extractor, images), labels=np.zeros(50, int))
    assert result["fid"] < 1e-6
    assert result["sfid"] < 1e-6
    assert result["precision"] == result["recall"] == 1
    assert result["num_samples"] == result["reference_count"] == 50


def test_numbers_are_those_of_the_features():
    extractor, samples, images = toy_extractor(predicts_labels=True), toy_images(41, seed=1), toy_images(50)
    reference = reference_of(extractor, images)
    features = {name: np.asarray(a) for name, a in extractor.apply(extractor.parameters, samples).items()}
    labels = features["logits"].argmax(1)
    labels[:10] = (labels[:10] + 1) % 3
    result = measure(samples, extractor, reference=reference, labels=labels)
    fid, sfid = (
        frechet_distance(gaussian_statistics(features[name]), getattr(reference, name)) for name in ("pool", "spatial")
    )
    np.testing.assert_allclose([result["fid"], result["sfid"]], [fid, sfid], rtol=1e-4)
    np.testing.assert_allclose(result["inception_score"], inception_score(features["logits"]), rtol=1e-5)
    assert result["accuracy"] == pytest.approx(31 / 41)
    assert [name for name in result if name in ALL] == list(ALL)
    assert json.loads(json.dumps(result)) == result
    assert all(label in evaluate.table(result) for label, _, _ in evaluate.METRICS.values())
    again = measure(samples, extractor, reference=reference, labels=labels, batch_size=5)
    np.testing.assert_allclose([again[name] for name in ALL], [result[name] for name in ALL], rtol=1e-5)


def test_without_a_reference():
    result = measure(toy_images(10), toy_extractor(), metrics=("inception_score",))
    assert result["inception_score"] > 1
    assert result["reference"] is None
    with pytest.raises(UserError, match=r"fid needs a reference's pool.*no reference is given"):
        measure(toy_images(10), toy_extractor(), metrics=("fid",))


def test_what_does_not_compare():
    reference = reference_of(toy_extractor(), toy_images(30))
    with pytest.raises(UserError, match=r"toy/1, this is toy/2.*do not compare"):
        measure(toy_images(10), toy_extractor("toy/2"), reference=reference, metrics=("fid",))
    with pytest.raises(UserError, match="samples are 2x8, the reference toys is 4x4"):
        measure(toy_images(10, shape=(2, 8, 3)), toy_extractor(), reference=reference, metrics=("fid",))


def test_what_cannot_be_measured():
    extractor, known = toy_extractor(), toy_extractor(predicts_labels=True)
    reference = reference_of(extractor, toy_images(30))
    with pytest.raises(UserError, match="unknown metric 'FID': expected some of fid, sfid"):
        evaluate.check_metrics(["FID"], extractor, labels=True)
    with pytest.raises(UserError, match="--extractor=classifier"):
        evaluate.check_metrics(["accuracy"], extractor, labels=True)
    with pytest.raises(UserError, match="samples' labels"):
        evaluate.check_metrics(["accuracy"], known, labels=False)
    with pytest.raises(UserError, match="samples' labels"):
        measure(toy_images(10), known, reference=reference, metrics=("accuracy",))
    for count in (0, 1):
        with pytest.raises(UserError, match=f"at least 2 images, got {count}"):
            measure(toy_images(count), extractor, reference=reference, metrics=("fid",))
    with pytest.raises(UserError, match="more than 3 images"):
        measure(toy_images(3), extractor, reference=reference, metrics=("precision",))


def test_fewer_images_than_features_is_no_nan():
    extractor = toy_extractor()
    reference = reference_of(extractor, toy_images(6))
    result = measure(toy_images(5, seed=1), extractor, reference=reference, metrics=evaluate.DEFAULT_METRICS)
    assert all(np.isfinite(result[name]) for name in evaluate.DEFAULT_METRICS)
    assert result["fid"] > 0
