import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from sra_jax.errors import UserError
from sra_jax.evaluation.images import open_images, read_npz


def random_images(count=10, shape=(6, 5, 3)):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def everything(image_set, batch_size):
    batches = list(image_set.batches(batch_size))
    assert all(len(images) == batch_size for images, _ in batches[:-1])
    return np.concatenate([images for images, _ in batches]), [labels for _, labels in batches]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_npz_of_adm(tmp_path, save, batch_size):
    images, labels = random_images(), np.arange(10, dtype=np.int32)
    save(tmp_path / "x.npz", images, labels)
    image_set = open_images(tmp_path / "x.npz")
    assert (image_set.name, image_set.shape, len(image_set)) == ("x", (10, 6, 5, 3), 10)
    read, read_labels = everything(image_set, batch_size)
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(np.concatenate(read_labels), labels)


def test_npz_without_labels(tmp_path):
    np.savez(tmp_path / "x.npz", random_images(shape=(4, 4, 1)))
    read, labels = everything(open_images(tmp_path / "x.npz"), 4)
    assert read.shape == (10, 4, 4, 1)
    assert labels == [None, None, None]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": random_images().astype(np.float32)}, "float32 values; expected uint8"),
        ({"arr_0": np.full((3, 4, 4, 3), np.nan)}, "float64 values; expected uint8"),
        ({"arr_0": random_images()[0]}, r"shape \(6, 5, 3\); expected"),
        ({"arr_0": random_images().transpose(0, 3, 1, 2).copy()}, r"shape \(10, 3, 6, 5\); expected"),
        ({"arr_0": np.asfortranarray(random_images())}, "column-major"),
        ({"samples": random_images()}, "no images.*found samples"),
        ({"arr_0": random_images(), "arr_1": np.arange(9)}, "expected 10 integers"),
        ({"arr_0": random_images(), "arr_1": np.ones(10)}, "expected 10 integers"),
        ({"arr_0": np.array([None])}, "object values"),
        ({"arr_0": random_images(0)}, "holds no image"),
        ({"arr_0": random_images(3, (0, 5, 3))}, r"shape \(3, 0, 5, 3\); expected"),
        ({"arr_0": random_images(3), "arr_1": np.arange(3), "class_names": np.array(["a", "b"])}, "names 2 classes"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "x.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_truncated_npz(tmp_path, save, kept):
    path = tmp_path / "x.npz"
    save(path, random_images())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="Is it complete"):
        everything(open_images(path), 4)


def test_damaged_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, random_images())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="Is it complete"):
        everything(open_images(path), 4)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder(tmp_path, channels):
    images = random_images(shape=(6, 5, channels))
    for index, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(tmp_path / f"{index:03}.png")
    (tmp_path / "notes.txt").write_text("no image")
    read, labels = everything(open_images(tmp_path), 4)
    np.testing.assert_array_equal(read, images)
    assert labels == [None, None, None]


def test_subfolders_are_classes(tmp_path):
    images = random_images(4)
    for index, name in enumerate(["b/1.png", "a/2.png", "b/0.png", "a/1.jpg"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(images[index]).save(tmp_path / name)
    read, labels = everything(open_images(tmp_path), 4)
    np.testing.assert_array_equal(labels[0], [0, 0, 1, 1])
    np.testing.assert_array_equal(read[1:], images[[1, 2, 0]])


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.jpg"):
        open_images(tmp_path)
    Image.fromarray(random_images()[0]).save(tmp_path / "a.png")
    Image.fromarray(random_images(shape=(7, 5, 3))[0]).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b.png is \(7, 5, 3\).*a.png is \(6, 5, 3\)"):
        everything(open_images(tmp_path), 4)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"b\.png is not a readable image"):
        everything(open_images(tmp_path), 4)
    Image.fromarray(np.zeros((6, 5), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        everything(open_images(tmp_path), 4)
    (tmp_path / "class").mkdir()
    Image.fromarray(random_images()[0]).save(tmp_path / "class" / "a.png")
    with pytest.raises(UserError, match="beside and inside subfolders"):
        open_images(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("shape", ["(10**12, 4, 4, 3)", "(999999999999, 4, 4, 3)", "(-10, 6, 5, 3)", "(11, 6, 5, 3)"])
def test_an_npz_whose_header_lies_is_refused_before_its_images_are_read(tmp_path, shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + random_images().tobytes()
        archive.writestr("arr_0.npy", content)
    with pytest.raises(UserError, match=r"x\.npz cannot be read as npz"):
        open_images(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"x\.npz cannot be read as npz"):
        read_npz(tmp_path / "x.npz", ["arr_0"])


@pytest.mark.faults
def test_pipes_folders_and_nameless_members(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0", b"no suffix")
    for name, message in (("pipe", "is no file"), ("folder", "holds no .jpg"), ("x", "cannot be read as npz")):
        with pytest.raises(UserError, match=message):
            open_images(tmp_path / f"{name}.npz")


def test_a_set_in_memory_is_the_same(tmp_path):
    np.savez(tmp_path / "x.npz", random_images(), np.arange(10))
    image_set = open_images(tmp_path / "x.npz")
    kept = image_set.in_memory()
    (tmp_path / "x.npz").unlink()
    np.testing.assert_array_equal(everything(kept, 4)[0], random_images())
    assert (kept.shape, kept.name, len(kept.labels)) == (image_set.shape, "x", 10)


def test_what_is_no_set_of_images(tmp_path):
    with pytest.raises(UserError, match="not there"):
        open_images(tmp_path / "x")
    with pytest.raises(UserError, match="does not exist"):
        open_images(tmp_path / "x.npz")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match="no npz file"):
        open_images(tmp_path / "x.txt")
