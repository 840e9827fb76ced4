"""Random latents of any shape: for benchmarks, smoke runs and compile checks. Nothing can be learned from them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sra_jax.data.dataset import Dataset, Decoder, Example
from sra_jax.data.digits import decode

EXAMPLES = 4096


class Synthetic:
    """`latent` (H,W,C) standard normal float32 and a uniform `label`, both functions of the index."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int):
        self.shape = shape
        self.num_classes = num_classes

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < EXAMPLES:
            raise IndexError(index)
        generator = np.random.default_rng(index)
        label = generator.integers(self.num_classes, dtype=np.int32)
        return {"latent": generator.standard_normal(self.shape, dtype=np.float32), "label": np.asarray(label)}


def encode(batch: Mapping[str, jax.Array], key: Any) -> jax.Array:
    """The latents as they are; the key is not used."""
    del key
    return batch["latent"]


def load(data: Any) -> Dataset:
    """4,096 random latents of the shape that `data` asks for."""
    shape = (data.image_size, data.image_size, data.channels)
    return Dataset(source=Synthetic(shape, data.num_classes), latent_shape=shape, num_classes=data.num_classes,
                   encode=encode, stable_diffusion=None)  # fmt: skip


def decoder(data: Any) -> Decoder:
    """The latents' channels shown as images: the first three channels as colours, or the first as grey."""
    shown = 3 if data.channels >= 3 else 1
    return lambda latents: decode(latents[..., :shown])
