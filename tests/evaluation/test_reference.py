import dataclasses
import hashlib
import os

import numpy as np
import pytest
from toy import toy_extractor, toy_images

from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate
from sra_jax.evaluation.frechet import frechet_distance
from sra_jax.evaluation.images import open_images
from sra_jax.evaluation.reference import (
    load_reference,
    make_reference,
    parts_of,
    save_reference,
    stored_metadata,
)
from sra_jax.evaluation.statistics import gaussian_statistics


def images_file(path, count=30, seed=0):
    np.savez(path, toy_images(count, seed))
    return path


def assert_equal(first, second):
    """But for the checksum: of the file, where one is read, and else of the images."""
    for field in dataclasses.fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if field.name == "checksum":
            continue
        if dataclasses.is_dataclass(one):
            assert_equal(one, other)
        else:
            np.testing.assert_array_equal(one, other)


def test_statistics_are_those_of_the_features(tmp_path):
    extractor = toy_extractor()
    features = extractor.apply(extractor.parameters, toy_images(30))
    reference = load_reference(images_file(tmp_path / "x.npz"), extractor, batch_size=8, progress=False)
    np.testing.assert_allclose(reference.pool.covariance, np.cov(features["pool"], rowvar=False), atol=1e-6)
    np.testing.assert_allclose(reference.spatial.covariance, np.cov(features["spatial"], rowvar=False), atol=1e-6)
    np.testing.assert_allclose(reference.features, features["pool"], atol=1e-6)
    assert (reference.name, reference.count, reference.image_size) == ("x", 30, (4, 4))


def test_saved_and_loaded(tmp_path):
    extractor = toy_extractor()
    reference = load_reference(images_file(tmp_path / "x.npz"), extractor, progress=False)
    save_reference(reference, tmp_path / "new" / "statistics.npz")
    loaded = load_reference(tmp_path / "new" / "statistics.npz", extractor)
    assert_equal(loaded, reference)
    assert loaded.checksum == hashlib.sha256((tmp_path / "new" / "statistics.npz").read_bytes()).hexdigest()[:16]
    again = load_reference(images_file(tmp_path / "again.npz"), extractor, progress=False)
    other = load_reference(images_file(tmp_path / "other.npz", seed=1), extractor, progress=False)
    assert again.checksum == reference.checksum != other.checksum
    assert os.listdir(tmp_path / "new") == ["statistics.npz"]
    assert stored_metadata(tmp_path / "new" / "statistics.npz").extractor == "toy/1"
    with pytest.raises(UserError, match="exists and is not overwritten"):
        save_reference(reference, tmp_path / "new" / "statistics.npz")
    with pytest.raises(UserError, match=r"does not end with \.npz"):
        save_reference(reference, tmp_path / "statistics")
    with pytest.raises(UserError, match=r"with the extractor toy/1, this is toy/2.*do not compare"):
        load_reference(tmp_path / "new" / "statistics.npz", toy_extractor("toy/2"))


def test_features_of_some_images(tmp_path):
    extractor = toy_extractor()
    image_set = open_images(images_file(tmp_path / "x.npz", count=31))
    reference = make_reference(image_set, extractor, most_features=4, batch_size=8, progress=False)
    features = extractor.apply(extractor.parameters, toy_images(31)[[0, 10, 20, 30]])
    np.testing.assert_allclose(reference.features, features["pool"], atol=1e-6)
    assert reference.count == 31


def test_reference_file_of_adm(tmp_path):
    generator = np.random.default_rng(0)
    names = ("mu", "sigma", "mu_s", "sigma_s")
    arrays = dict(zip(names, (generator.standard_normal((12, 12)[: 1 + i % 2]) for i in range(4)), strict=True))
    np.savez(tmp_path / "VIRTUAL.npz", toy_images(30), np.arange(30), **arrays)
    extractor = toy_extractor(published=True)
    reference = load_reference(tmp_path / "VIRTUAL.npz", extractor, progress=False)
    np.testing.assert_array_equal(reference.pool.mean, arrays["mu"])
    np.testing.assert_array_equal(reference.spatial.covariance, arrays["sigma_s"])
    features = extractor.apply(extractor.parameters, toy_images(30))
    np.testing.assert_allclose(reference.features, features["pool"], atol=1e-6)
    assert (reference.name, reference.image_size, reference.count) == ("VIRTUAL", (4, 4), None)
    save_reference(reference, tmp_path / "own.npz")
    assert_equal(load_reference(tmp_path / "own.npz", extractor), reference)
    assert load_reference(tmp_path / "VIRTUAL.npz", extractor, with_features=False).features is None
    with pytest.raises(UserError, match="published weights, this is toy/1"):
        load_reference(tmp_path / "VIRTUAL.npz", toy_extractor())


def test_mu_and_sigma_alone(tmp_path):
    """A file of pytorch-fid or clean-fid: FID needs nothing else."""
    extractor = toy_extractor(published=True)
    np.savez_compressed(tmp_path / "x.npz", mu=np.zeros(12), sigma=np.eye(12))
    assert parts_of(tmp_path / "x.npz", extractor) == {"pool"}
    assert evaluate.default_metrics(extractor, labels=False, parts={"pool"}) == ("fid", "inception_score")
    reference = load_reference(tmp_path / "x.npz", extractor)
    assert (reference.name, reference.image_size, reference.count, reference.features) == ("x", None, None, None)
    batches = iter([(toy_images(20), None)])
    result = evaluate.measure(batches, reference, extractor, metrics=("fid",), progress=False)
    expected = frechet_distance(
        gaussian_statistics(np.asarray(extractor.apply(extractor.parameters, toy_images(20))["pool"])), reference.pool
    )
    assert result["fid"] == pytest.approx(expected, rel=1e-4)
    save_reference(reference, tmp_path / "own.npz")
    assert_equal(load_reference(tmp_path / "own.npz", extractor), reference)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"sigma": np.eye(3)}, "no mean and covariance"),
        ({"sigma": np.full((12, 12), np.nan)}, "NaN or infinite"),
        ({"arr_0": np.zeros((3, 4))}, "expected uint8"),
    ],
)
def test_broken_reference_of_adm(tmp_path, broken, message):
    arrays = {"arr_0": toy_images(30), "mu": np.zeros(12), "sigma": np.eye(12)}
    np.savez(tmp_path / "x.npz", **(arrays | broken))
    with pytest.raises(UserError, match=message):
        load_reference(tmp_path / "x.npz", toy_extractor(published=True), progress=False)


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_reference(tmp_path / "x.npz", toy_extractor())
    with pytest.raises(UserError, match="at least 2 images, x has 1"):
        load_reference(images_file(tmp_path / "x.npz", count=1), toy_extractor())
    np.savez(tmp_path / "meta.npz", toy_images(3), meta=np.array("something"))
    with pytest.raises(UserError, match="meta entry that is not ours"):
        load_reference(tmp_path / "meta.npz", toy_extractor())
    np.savez(tmp_path / "part.npz", meta=np.array('{"format": "sra_jax statistics 1", "name": "x"}'))
    with pytest.raises(UserError, match="meta entry that is not ours"):
        load_reference(tmp_path / "part.npz", toy_extractor())
    np.savez(tmp_path / "old.npz", meta=np.array('{"format": "sra_jax statistics 0"}'))
    with pytest.raises(UserError, match="of the format 'sra_jax statistics 0'"):
        load_reference(tmp_path / "old.npz", toy_extractor())
