import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from sra_jax.data import pixels
from sra_jax.errors import UserError


def config(path, **changes):
    values = {"name": "pixels", "path": str(path), "image_size": 16, "channels": 3, "num_classes": 2, "vae": ""}
    return ConfigDict(values | changes)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_unit_range_and_back(image_folder, channels):
    data = config(f"imagefolder:{image_folder}", channels=channels)
    dataset = pixels.load(data)
    examples = [dataset.source[i] for i in range(len(dataset.source))]
    assert [int(example["label"]) for example in examples] == [0, 0, 0, 1, 1]
    batch = {"image": jnp.asarray(np.stack([example["image"] for example in examples]))}
    drawn = jax.jit(dataset.encode)(batch, jax.random.key(0))
    assert drawn.shape == (5, *dataset.latent_shape) == (5, 16, 16, channels)
    np.testing.assert_allclose(drawn, np.asarray(batch["image"]) / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(pixels.decoder(data)(drawn), batch["image"])
    assert dataset.class_names == ("cat", "dog")
    # a 16x16 image is not resampled
    original = np.asarray(Image.open(image_folder / "cat" / "c.webp").convert("RGB" if channels == 3 else "L"))
    np.testing.assert_array_equal(batch["image"][0], original.reshape(16, 16, channels))


def test_every_level_survives_and_excess_is_clipped():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(pixels.to_uint8(pixels.to_unit_range({"image": jnp.asarray(levels)}, None)), levels)
    np.testing.assert_array_equal(pixels.to_uint8(jnp.array([-1.5, 1.5])), [0, 255])


def test_bad_input(image_folder):
    path = f"imagefolder:{image_folder}"
    with pytest.raises(UserError, match=r"data.num_classes=10, but .* has 2 classes"):
        pixels.load(config(path, num_classes=10))
    with pytest.raises(UserError, match=r"must be 1 .* or 3"):
        pixels.load(config(path, channels=4))
    with pytest.raises(UserError, match=r"data.path is empty"):
        pixels.load(config(""))
    (image_folder / "cat" / "e.jpg").write_bytes(b"none")
    with pytest.raises(UserError, match=r"cat/e\.jpg cannot be read"):
        pixels.load(config(path)).source[2]
