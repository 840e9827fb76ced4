"""scikit-learn's digits: 1,797 real scans of handwritten digits, 8x8 grey levels 0..16, ten classes. On every machine.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sra_jax.data.dataset import Dataset, Decoder, Example

LEVELS = 16


class Digits:
    """Random access to the scans: `image` (8,8,1) uint8 in 0..16 and `label` () int32."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # seconds, which the other sets need not wait

        scans, labels = load_digits(return_X_y=True)
        self.images = scans.reshape(-1, 8, 8, 1).astype(np.uint8)
        self.labels = labels.astype(np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


def encode(batch: Mapping[str, jax.Array], key: Any) -> jax.Array:
    """Grey levels 0..16 -> [-1, 1] float32; the key is not used."""
    del key
    return batch["image"].astype(jnp.float32) * (2 / LEVELS) - 1


@jax.jit
def decode(latents: jax.Array) -> jax.Array:
    """[-1, 1] (B,8,8,1) -> grey levels 0..255 uint8, rounded and clipped."""
    return jnp.clip(jnp.round((latents + 1) * 127.5), 0, 255).astype(jnp.uint8)


def load(data: Any) -> Dataset:
    """The whole set; nothing in `data` changes it."""
    del data
    return Dataset(
        source=Digits(), latent_shape=(8, 8, 1), num_classes=10, encode=encode,
        class_names=tuple(str(digit) for digit in range(10)),
    )  # fmt: skip


def decoder(data: Any) -> Decoder:
    """Latents in [-1, 1] to grey images."""
    del data
    return decode


def example_from_image(data: Any, picture: Image.Image) -> Example:
    """Any square picture as 8x8 grey levels 0..16, light strokes on dark as in the scans."""
    del data
    grey = np.asarray(picture.convert("L").resize((8, 8), Image.Resampling.BOX), np.float32)
    return {"image": np.round(grey * (LEVELS / 255)).astype(np.uint8)[..., None], "label": np.zeros((), np.int32)}
