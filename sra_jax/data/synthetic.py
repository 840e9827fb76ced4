"""Random latents of any shape: for benchmarks, smoke runs and compile checks. Nothing can be learned from them."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sra_jax.data.captions import Captions
from sra_jax.data.dataset import Dataset, Decoder, Example
from sra_jax.data.digits import decode
from sra_jax.errors import UserError

EXAMPLES = 4096


class Synthetic:
    """`latent` (H,W,C) standard normal float32 with a uniform `label` or a random caption, functions of the index.

    Args:
      shape: of the latents.
      num_classes: of the labels.
      text: where there are captions, what embeds them.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int, text: "RandomText | None" = None):
        self.shape = shape
        self.num_classes = num_classes
        self.text = text

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < EXAMPLES:
            raise IndexError(index)
        generator = np.random.default_rng(index)
        if self.text:
            told = {name: np.asarray(array[0]) for name, array in self.text([str(index)]).items()}
        else:
            told = {"label": np.asarray(generator.integers(self.num_classes, dtype=np.int32))}
        return {"latent": generator.standard_normal(self.shape, dtype=np.float32), **told}


class RandomText:
    """An `Encoder` without meaning: normal numbers that depend on the caption, zeros for the empty one."""

    def __init__(self, length: int, width: int):
        self._shape = (length, width)
        self.null: Captions = {"context": np.zeros(self._shape, np.float32), "end": np.ones((), np.int32)}

    def __call__(self, texts: Sequence[str]) -> Captions:
        """As `Encoder`."""
        drawn = [np.random.default_rng(zlib.crc32(text.encode())).standard_normal(self._shape) for text in texts]
        return {"context": np.stack(drawn).astype(np.float32), "end": np.full(len(texts), 1, np.int32)}


def encode(batch: Mapping[str, jax.Array], key: Any) -> jax.Array:
    """The latents as they are; the key is not used."""
    del key
    return batch["latent"]


def load(data: Any) -> Dataset:
    """4,096 random latents of the shape that `data` asks for.

    Raises:
      UserError: it asks for token ids, of which there are none.
    """
    if "context_width" in data and data.captions != "embeddings":
        raise UserError(f"data.captions={data.captions!r}: data.name='synthetic' has embeddings only")
    shape = (data.image_size, data.image_size, data.channels)
    text = text_encoder(data) if "context_width" in data else None
    return Dataset(
        source=Synthetic(shape, data.num_classes, text), latent_shape=shape, num_classes=data.num_classes,
        encode=encode, stable_diffusion=None, null=text.null if text else None,
    )  # fmt: skip


def text_encoder(data: Any) -> RandomText:
    """Random embeddings of the shape that `data` asks for."""
    return RandomText(data.context_length, data.context_width)


def decoder(data: Any) -> Decoder:
    """The latents' channels shown as images: the first three channels as colours, or the first as grey."""
    shown = 3 if data.channels >= 3 else 1
    return lambda latents: decode(latents[..., :shown])
