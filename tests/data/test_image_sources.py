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
    names = ["/cat/c.webp", "/cat/deep/d.JPEG", "/cat/e.jpg", "/dog/a.jpg", "/dog/b.png"]
    assert listed == list(zip(names, [0, 0, 0, 1, 1], strict=True))
    assert [read_image(source[i].content).size for i in range(5)] == [(16, 16), (40, 64), (18, 21), (33, 17), (20, 30)]
    before = source.fingerprint()
    (image_folder / "dog" / "b.png").rename(image_folder / "dog" / "z.png")
    assert open_images(f"imagefolder:{image_folder}").fingerprint() != before


def test_image_folder_errors(tmp_path):
    with pytest.raises(UserError, match=r"no folder at"):
        open_images(f"imagefolder:{tmp_path / 'absent'}")
    with pytest.raises(UserError, match=r"no class folders"):
        open_images(f"imagefolder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match=r"cat holds no \.jpg"):
        open_images(f"imagefolder:{tmp_path}")
    with pytest.raises(UserError, match=r"is unknown: give tfds:"):
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
    with pytest.raises(UserError, match=r"has neither train-labels-idx1-ubyte nor"):
        open_images(f"idx:{tmp_path}")
    images, labels = np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8)
    write_idx(tmp_path, images, labels[:2])
    with pytest.raises(UserError, match=r"3 train images but 2 labels"):
        open_images(f"idx:{tmp_path}")
    write_idx(tmp_path, images, labels)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte is not an IDX file"):
        open_images(f"idx:{tmp_path}")


def test_sample_photos():
    source = open_images("sklearn:photos")
    assert [(item.where, item.label, item.content.shape) for item in source.items(0, 2)] == [
        ("sklearn:china.jpg", 0, (427, 640, 3)),
        ("sklearn:flower.jpg", 1, (427, 640, 3)),
    ]
    with pytest.raises(UserError, match=r"only one is sklearn:photos"):
        open_images("sklearn:faces")


@pytest.mark.faults
def test_an_unknown_tfds_name_is_one_line():
    """TFDS itself lists all that it knows."""
    message = r"^tfds:mnst is neither known to TFDS nor on disk.*; did you mean mnist\b"
    with pytest.raises(UserError, match=message) as error:
        open_images("tfds:mnst")
    assert len(str(error.value)) < 150


@pytest.fixture(scope="module", params=["array_record", "tfrecord"])
def tfds_set(request, tmp_path_factory):
    """A TFDS set on disk in either file format: (its name, its format, the images by label)."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp(request.param)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 9, 3), np.uint8)

    class SixImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image, label = tfds.features.Image(shape=(8, 9, 3)), tfds.features.ClassLabel(names=list("abcdef"))
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"image": image, "label": label}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {"image": image, "label": i}) for i, image in enumerate(images))

    SixImages(data_dir=folder, file_format=request.param).download_and_prepare()
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
    with pytest.raises(UserError, match=r"no split 'test', only train"):
        open_images("tfds:six_images:test")


def test_tfds_set_that_is_not_there(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"neither known to TFDS nor on disk"):
        open_images("tfds:no_such_set_at_all")
    with pytest.raises(UserError, match=r"not on disk"):
        open_images("tfds:imagenet2012")
