import gzip
import pickle

import numpy as np
import pytest

from sra_jax.data.image_sources import open_images
from sra_jax.data.images import read_image
from sra_jax.errors import UserError


def write_idx(folder, images, labels, split="train", compressed=False):
    opened, suffix = (gzip.open, ".gz") if compressed else (open, "")
    folder.mkdir(exist_ok=True)
    with opened(folder / f"{split}-images-idx3-ubyte{suffix}", "wb") as file:
        file.write(bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes() + images.tobytes())
    with opened(folder / f"{split}-labels-idx1-ubyte{suffix}", "wb") as file:
        file.write(bytes([0, 0, 8, 1]) + np.array(labels.shape, ">u4").tobytes() + labels.tobytes())


def test_image_folder_order_and_labels(image_folder):
    source = open_images(f"imagefolder:{image_folder}")
    assert source.class_names == ("cat", "dog")
    listed = [(item.where.removeprefix(str(image_folder)), item.label) for item in source.items(0, len(source))]
    assert listed == [("/cat/c.webp", 0), ("/cat/deep/d.JPEG", 0), ("/cat/e.jpg", 0), ("/dog/a.jpg", 1), ("/dog/b.png", 1)]
    assert [read_image(source[i].content).size for i in range(5)] == [(16, 16), (40, 64), (18, 21), (33, 17), (20, 30)]
    before = source.fingerprint()
    (image_folder / "dog" / "b.png").rename(image_folder / "dog" / "z.png")
    assert open_images(f"imagefolder:{image_folder}").fingerprint() != before


def test_image_folder_errors(tmp_path):
    with pytest.raises(UserError, match="no folder at"):
        open_images(f"imagefolder:{tmp_path / 'absent'}")
    with pytest.raises(UserError, match="no class folders"):
        open_images(f"imagefolder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match=r"cat holds no \.jpg"):
        open_images(f"imagefolder:{tmp_path}")
    with pytest.raises(UserError, match="is unknown: give tfds:"):
        open_images(str(tmp_path))


@pytest.mark.parametrize("compressed", [False, True])
def test_idx(tmp_path, compressed):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (7, 5, 6), np.uint8), rng.permutation(7).astype(np.uint8)
    write_idx(tmp_path, images, labels, compressed=compressed)
    write_idx(tmp_path, images[::-1], labels[:7], split="t10k", compressed=compressed)
    source = pickle.loads(pickle.dumps(open_images(f"idx:{tmp_path}")))
    assert (len(source), source.num_classes) == (7, 7)
    for i in range(7):
        np.testing.assert_array_equal(np.asarray(read_image(source[i].content)), images[i])
        assert source[i].label == labels[i]
    np.testing.assert_array_equal(open_images(f"idx:{tmp_path}:t10k")[0].content, images[-1])


def test_idx_errors(tmp_path):
    with pytest.raises(UserError, match="has neither train-labels-idx1-ubyte nor"):
        open_images(f"idx:{tmp_path}")
    images, labels = np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)
    write_idx(tmp_path, images, labels[:2])
    with pytest.raises(UserError, match="3 train images but 2 labels"):
        open_images(f"idx:{tmp_path}")
    write_idx(tmp_path, images, labels)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="train-images-idx3-ubyte is not an IDX file"):
        open_images(f"idx:{tmp_path}")


def test_sample_photos():
    source = open_images("sklearn:photos")
    assert [(item.where, item.label, item.content.shape) for item in source.items(0, 2)] == [
        ("sklearn:china.jpg", 0, (427, 640, 3)),
        ("sklearn:flower.jpg", 1, (427, 640, 3)),
    ]
    with pytest.raises(UserError, match="only one is sklearn:photos"):
        open_images("sklearn:faces")


@pytest.fixture(scope="module", params=["array_record", "tfrecord"])
def tfds_set(request, tmp_path_factory):
    """A TFDS set on disk in either file format: (its name, its format, the images by label)."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp(request.param)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), np.uint8)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="six_images",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(8, 9, 3)), "label": tfds.features.ClassLabel(names=list("abcdef"))}
        ),
        split_datasets={"train": [{"image": image, "label": i} for i, image in enumerate(images)]},
        data_dir=folder,
        file_format=request.param,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
        yield request.param, images


def test_tfds(tfds_set):
    file_format, images = tfds_set
    source = pickle.loads(pickle.dumps(open_images("tfds:six_images:1.0.0:train")))
    assert (len(source), source.num_classes, source.class_names) == (6, 6, tuple("abcdef"))
    assert source.random_access == (file_format == "array_record")
    # shards ask for parts: together they must give every example once
    items = [*source.items(0, 2), *source.items(2, 5), *source.items(5, 6)]
    assert sorted(item.label for item in items) == list(range(6))
    for item in items:
        np.testing.assert_array_equal(np.asarray(read_image(item.content)), images[item.label])
    if source.random_access:
        assert [source[i].label for i in range(6)] == [item.label for item in items]
    with pytest.raises(UserError, match="no split 'test', only train"):
        open_images("tfds:six_images:test")


def test_tfds_set_that_is_not_there(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="neither known to TFDS nor on disk"):
        open_images("tfds:no_such_set_at_all")
    with pytest.raises(UserError, match="not on disk"):
        open_images("tfds:imagenet2012")
