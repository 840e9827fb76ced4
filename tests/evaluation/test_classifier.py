import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from sra_jax.errors import UserError
from sra_jax.evaluation import classifier
from sra_jax.evaluation.extractors import build_extractor
from sra_jax.evaluation.images import open_images
from sra_jax.interop.safetensors_tree import checksum, write_safetensors


def digits():
    data = load_digits()
    return np.round(data.images * 255 / 16).astype(np.uint8)[..., None], data.target


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SRA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_learns_digits_the_same_way_every_time(tmp_path):
    images, labels = digits()
    trained = classifier.train_classifier(images, labels, steps=200, progress=False)
    assert trained.accuracy > 0.95
    again = classifier.train_classifier(images, labels, steps=200, progress=False)
    assert checksum(again.parameters) == checksum(trained.parameters)
    classifier.save_classifier(trained, tmp_path / "c.safetensors")
    loaded = classifier.load_classifier(tmp_path / "c.safetensors")
    assert checksum(loaded.parameters) == checksum(trained.parameters)
    assert loaded._replace(parameters=None) == trained._replace(parameters=None)

    extractor = build_extractor("classifier", weights=tmp_path / "c.safetensors")
    features = jax.jit(extractor.apply)(extractor.parameters, images[:50])
    assert features["pool"].shape == (50, 128)
    assert (features["logits"].argmax(1) == labels[:50]).mean() > 0.95


def test_fingerprint_is_of_images_and_labels():
    images, labels = digits()
    whole = classifier.fingerprint(images, labels)
    assert whole == classifier.fingerprint(images.copy(), labels.astype(np.int32))
    assert whole != classifier.fingerprint(images[:-1], labels[:-1])
    assert whole != classifier.fingerprint(images, labels[::-1])
    assert whole != classifier.fingerprint(255 - images, labels)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [
        ((30, 8, 8, 1), None, "has no labels"),
        ((30, 65, 8, 3), np.arange(30) % 2, "up to 64x64"),
        ((30, 8, 8, 1), np.zeros(30, int), "of two classes"),
        ((30, 8, 8, 1), np.arange(30) - 1, "numbered from 0"),
        ((10, 8, 8, 1), np.arange(10) % 2, "at least 20 images"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path, shape, labels, message):
    arrays = {"arr_0": np.zeros(shape, np.uint8)} | ({} if labels is None else {"arr_1": labels})
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        build_extractor("classifier", data=open_images(tmp_path / "x.npz"))


def test_missing_classifiers(tmp_path):
    with pytest.raises(UserError, match="needs labelled reference images"):
        build_extractor("classifier")
    with pytest.raises(UserError, match=r"classifier/abc/def, which is not in .*copy classifier-abc\.safetensors"):
        build_extractor("classifier", identity="classifier/abc/def")
    write_safetensors(tmp_path / "x.safetensors", {"a": np.ones(2, np.float32)}, {"image_shape": "8 8 1"})
    with pytest.raises(UserError, match="holds no classifier"):
        build_extractor("classifier", weights=tmp_path / "x.safetensors")
