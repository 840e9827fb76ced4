import errno
import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sra_jax.data.images import UnreadableImageError, centre_crop, read_image, to_array
from sra_jax.errors import RunError, UserError
from sra_jax.evaluation.datasets import named_images
from sra_jax.evaluation.images import open_images


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halve(array):
    """Box filter to (H//2, W//2): every output pixel is the mean of the input area it covers."""

    def along_first_axis(values):
        inputs, outputs = values.shape[0], values.shape[0] // 2
        edges = np.arange(outputs + 1) * inputs / outputs
        # Pillow's box filter counts whole pixels whose centre lies within the area
        centres = np.arange(inputs) + 0.5
        rows = [values[(centres > low) & (centres <= high)].mean(axis=0) for low, high in itertools.pairwise(edges)]
        return np.floor(np.array(rows) + 0.5)

    columns = along_first_axis(array.astype(float).swapaxes(0, 1)).swapaxes(0, 1)
    return along_first_axis(columns)


def bicubic(array, height, width):
    """Keys' cubic convolution (a = -1/2), stretched over the input when shrinking; columns first, 8 bits between."""

    def kernel(x):
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    def along_first_axis(values, outputs):
        inputs = values.shape[0]
        scale = inputs / outputs
        centre = (np.arange(outputs)[:, None] + 0.5) * scale
        weights = kernel((np.arange(inputs) + 0.5 - centre) / max(scale, 1.0))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.clip(np.floor(np.tensordot(weights, values, 1) + 0.5), 0, 255)

    columns = along_first_axis(array.astype(float).swapaxes(0, 1), width).swapaxes(0, 1)
    return along_first_axis(columns, height)


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(101, 67, 32), (67, 101, 32), (131, 129, 32), (64, 200, 32), (33, 95, 32), (19, 27, 32), (255, 63, 31)],
)
def test_centre_crop_is_adms(width, height, size):
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BILINEAR)

    expected = np.asarray(image)
    while min(expected.shape[:2]) >= 2 * size:
        expected = halve(expected)
    shorter = min(expected.shape[:2])
    expected = bicubic(expected, *(round(side * (size / shorter)) for side in expected.shape[:2]))
    top, left = ((side - size) // 2 for side in expected.shape[:2])
    expected = expected[top : top + size, left : left + size]

    cropped = np.asarray(centre_crop(image, size))
    assert cropped.shape == (size, size, 3)
    # Pillow rounds to 8 bits between the two axes, whose order is its own choice: a level up or down, never an offset
    difference = cropped - expected
    assert np.abs(difference).max() <= 2
    assert (difference == 0).mean() > 0.7
    assert abs(difference.mean()) < 0.2


def test_crop_of_an_image_of_the_right_size_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    np.testing.assert_array_equal(np.asarray(centre_crop(read_image(image), 28)), image)


def test_every_colour_mode_becomes_8_bit_rgb():
    colour = np.zeros((6, 5, 3), np.uint8)
    colour[:, :3] = (200, 40, 90)
    rgb = Image.fromarray(colour)
    grey16 = np.linspace(0, 65535, 30).reshape(6, 5).astype(np.uint16)
    transparent = Image.fromarray(np.dstack([colour, np.full((6, 5), 51, np.uint8)]))  # alpha 0.2

    def rgb_of(content):
        return to_array(read_image(content), 3).astype(int)

    np.testing.assert_array_equal(rgb_of(encoded(rgb, "PNG")), colour)
    np.testing.assert_array_equal(rgb_of(encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")), colour)
    assert np.abs(rgb_of(encoded(rgb.convert("CMYK"), "TIFF")) - colour).max() <= 1
    assert np.abs(rgb_of(encoded(rgb.convert("CMYK"), "JPEG", quality=100, subsampling=0)) - colour).max() <= 6
    np.testing.assert_array_equal(
        rgb_of(encoded(Image.fromarray(grey16), "PNG")), np.repeat(np.round(grey16 / 257)[..., None], 3, -1)
    )
    np.testing.assert_array_equal(rgb_of(encoded(rgb.convert("L"), "PNG"))[..., 0], np.asarray(rgb.convert("L")))
    np.testing.assert_array_equal(np.unique(rgb_of(encoded(rgb.convert("1"), "PNG"))), [0, 255])
    assert np.abs(rgb_of(encoded(transparent, "PNG")) - (0.2 * colour + 0.8 * 255)).max() <= 1


def test_grey_by_luma_for_one_channel():
    colour = np.full((2, 2, 3), (255, 0, 0), np.uint8)
    np.testing.assert_array_equal(to_array(read_image(colour), 1), np.full((2, 2, 1), 76))


def png(size=(8, 8)):
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)), "PNG")


def damaged_picture(damage):
    """The bytes of a file called .png that is damaged in one of the ways that were met."""
    whole = png()
    if damage == "bomb":  # claims 60,000 x 60,000 pixels
        header = whole[12:16] + struct.pack(">II", 60_000, 60_000) + whole[24:29]
        return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    if damage == "chunk":  # the second chunk's name and length
        return whole[:33] + b"\xff" * 8 + whole[41:]
    if damage in ("AVIF", "DDS"):  # another format under this suffix
        return encoded(Image.new("RGB", (16, 16)), damage)
    return {"cut": whole[:20], "bits": whole[:50] + bytes(64), "zero": bytes(200)}[damage]


DAMAGES = ("bomb", "chunk", "AVIF", "DDS", "cut", "bits", "zero")


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_one_error_with_a_reason(damage, tmp_path):
    """In preparation one skipped file, in the tools that need every image one line with its name."""
    path = tmp_path / "images" / "a" / "x.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged_picture(damage))
    (path.parent / "0.png").write_bytes(png())
    for given in (path.read_bytes(), path):
        with pytest.raises(UnreadableImageError, match=r"\w"):
            read_image(given)
    for images in (open_images(path.parent), named_images(f"imagefolder:{tmp_path / 'images'}", 8, 3)):
        with pytest.raises(UserError, match=r"x\.png .*\w") as caught:
            list(images.batches(4))
        assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_a_failing_system_is_no_damaged_picture(tmp_path, monkeypatch):
    """Too many open files, a disk that is away: work stops and can go on, no image is left out for it."""
    (tmp_path / "x.png").write_bytes(png())
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(RunError, match=r"x\.png cannot be read now \(Too many open files\)"):
        read_image(tmp_path / "x.png")


def test_a_strip_is_refused_before_it_is_enlarged():
    with pytest.raises(UnreadableImageError, match="sides of 1 and 60000 pixels"):
        centre_crop(Image.new("L", (1, 60_000)), 256)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "float"])
def test_unreadable_images(damage, tmp_path):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    content = {
        "empty": b"",
        "text": b"no image",
        "cut": whole[: len(whole) // 2],
        "float": encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"),
    }[damage]
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    for given in (content, path):
        with pytest.raises(UnreadableImageError, match=r"\w"):
            read_image(given)
