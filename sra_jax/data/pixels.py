"""Training on the pixels of small images themselves (`config.data.name = "pixels"`).

`config.data.path` names a source as tools/prepare_latents.py does: `idx:DIR`, `imagefolder:DIR`, `tfds:NAME`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sra_jax.data.dataset import Dataset, Decoder, Example
from sra_jax.data.image_sources import ImageSource, TfdsImages, open_images
from sra_jax.data.images import UnreadableImageError, centre_crop, read_image, to_array
from sra_jax.errors import UserError


class PixelSource:
    """Cropped images: `image` (size,size,channels) uint8 and `label` () int32. Picklable if the source is."""

    def __init__(self, source: ImageSource, size: int, channels: int):
        self._source = source
        self._size = size
        self._channels = channels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Raises a UserError that names an image that cannot be read."""
        item = self._source[index]
        try:
            image = to_array(centre_crop(read_image(item.content), self._size), self._channels)
        except UnreadableImageError as error:
            raise UserError(f"{item.where} cannot be read ({error}): remove or replace it") from error
        return {"image": image, "label": np.array(item.label, np.int32)}


def to_unit_range(batch: Mapping[str, jax.Array], key: Any) -> jax.Array:
    """`image` (B,H,W,C) uint8 as float32 in [-1, 1]; the key is not used."""
    del key
    return batch["image"].astype(jnp.float32) / 127.5 - 1.0


@jax.jit
def to_uint8(latents: jax.Array) -> jax.Array:
    """The inverse of `to_unit_range`: rounded to the nearest of 256 levels, clipped."""
    return jnp.clip(jnp.round((latents + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


def load(data: Any) -> Dataset:
    """The training set that `data.path` names.

    Args:
      data: the config's data part: `path`, `image_size` (pixels), `channels` (1 or 3), `num_classes`.

    Raises:
      UserError: the source is missing or has no random access, or another number of classes.
    """
    if not data.path:
        raise UserError("data.path is empty: name a source, for example idx:/usr/share/datasets/fashion-mnist")
    if data.channels not in (1, 3):
        raise UserError(f"data.channels={data.channels} must be 1 (grey) or 3 (colour) for images")
    if data.image_size < 1:
        raise UserError(f"data.image_size={data.image_size} must be at least 1")
    source = open_images(data.path)
    if isinstance(source, TfdsImages) and not source.random_access:
        raise UserError(
            f"{data.path} is stored without random access, which shuffling needs. {source.how_to_get_random_access()}"
        )
    if data.num_classes != source.num_classes:
        raise UserError(f"data.num_classes={data.num_classes}, but {data.path} has {source.num_classes} classes")
    return Dataset(
        source=PixelSource(source, data.image_size, data.channels),
        latent_shape=(data.image_size, data.image_size, data.channels),
        num_classes=source.num_classes,
        encode=to_unit_range,
        class_names=source.class_names,
        left_out=source.left_out,
    )


def decoder(data: Any) -> Decoder:
    """Latents in [-1, 1] to images uint8 of the same shape."""
    del data
    return to_uint8


def example_from_image(data: Any, picture: Image.Image) -> Example:
    """Any picture, cropped and scaled as the set's own; its label is 0."""
    image = to_array(centre_crop(picture.convert("RGB"), data.image_size), data.channels)
    return {"image": image, "label": np.zeros((), np.int32)}
