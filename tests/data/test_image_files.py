"""What counts as a class and as an image, for both readers of folders."""

import os

import numpy as np
import pytest
from PIL import Image

from sra_jax.data.image_sources import open_images
from sra_jax.errors import UserError
from sra_jax.evaluation.images import open_images as open_samples

PICTURES = ("bird/1.png", "bird/deep/2.jpg", "cat/1.webp", "dog/1.jpeg", "dog/2.PNG")


@pytest.fixture
def folder(tmp_path):
    """Three classes, with everything around them that systems, editors and users leave in such folders."""
    rng = np.random.default_rng(0)

    def picture(name):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if name.lower().endswith(("jpg", "jpeg")) else name.rpartition(".")[2].upper()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path, kind)

    for name in PICTURES:
        picture(name)
    for name in (
        ".ipynb_checkpoints/1.png", "@eaDir/1.png", "__MACOSX/1.png", "$RECYCLE.BIN/1.png", "lost+found/1.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png", "cat/@eaDir/1.png", "bird/deep/.hidden/x.png", "cat/.hidden.png",
    ):  # fmt: skip
        picture(name)
    root = tmp_path / "set"
    (root / "cat" / "._1.webp").write_bytes(b"resource fork")
    (root / "cat" / "notes.txt").write_text("mine")
    (root / "dog" / "old.gif").write_bytes(b"GIF89a")
    (root / "README").write_text("mine")
    (root / "cat" / "link.png").symlink_to(root / "absent.png")
    (root / "dog" / "again").symlink_to(root)
    os.mkfifo(root / "dog" / "pipe.png")
    return root


@pytest.mark.faults
def test_hidden_and_system_entries_are_no_classes_and_no_images(folder):
    """At no level, for neither reader; the rest is counted, loops of links end, pipes are never opened."""
    source = open_images(f"imagefolder:{folder}")
    assert source.class_names == ("bird", "cat", "dog")
    assert [(os.path.relpath(source[i].where, folder), source[i].label) for i in range(len(source))] == list(
        zip(PICTURES, (0, 0, 1, 2, 2), strict=True)
    )
    np.testing.assert_array_equal(source.labels(), [0, 0, 1, 2, 2])
    samples = open_samples(folder)
    assert samples.class_names == source.class_names
    np.testing.assert_array_equal(samples.labels, source.labels())
    assert sum(len(images) for images, _ in samples.batches(2)) == 5
    for left_out in (source.left_out, samples.left_out):
        assert left_out.startswith("10 hidden or a system's")
        for part in ("2 broken links, pipes or devices", "1 .txt", "1 .gif", "1 without a suffix", "1 links to a"):
            assert part in left_out


def test_images_beside_the_classes_are_counted_or_refused(folder):
    (folder / "cat" / "1.webp").rename(folder / "stray.webp")
    Image.new("RGB", (8, 8)).save(folder / "cat" / "1.png")
    assert "1 images beside the class folders" in open_images(f"imagefolder:{folder}").left_out
    with pytest.raises(UserError, match="beside and inside subfolders"):
        open_samples(folder)


def test_a_folder_one_level_too_high_is_refused(folder, tmp_path):
    (tmp_path / "all").mkdir()
    folder.rename(tmp_path / "all" / "train")
    with pytest.raises(UserError, match=r"holds train with folders in each: these are splits.*imagefolder:.*all/train"):
        open_images(f"imagefolder:{tmp_path / 'all'}")
    for path in ("train/bird/1.png", "val/1.png"):  # a class of that name
        (tmp_path / "flat" / os.path.dirname(path)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / path)
    assert open_images(f"imagefolder:{tmp_path / 'flat'}").class_names == ("train", "val")


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    for read in (lambda: open_images(f"imagefolder:{tmp_path}"), lambda: open_samples(tmp_path)):
        with pytest.raises(UserError, match=r"cat cannot be listed \(Permission denied\)"):
            read()
