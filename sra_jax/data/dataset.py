"""What every dataset gives: examples on the host, and the function that makes latents of a batch on the device."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sra_jax.data.captions import TextEncoder

Example = Mapping[str, np.ndarray]


class ExampleSource(Protocol):
    """Random access to examples, as grain reads it: picklable, the same example for the same index every time.

    A source may also have `read_batch(indices)`, which returns examples stacked, and `where(index)`, which names the
    place of one for messages.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """One example: what `told` reads, and whatever arrays `Dataset.encode` needs."""


def told(batch: Mapping[str, jax.Array]) -> jax.Array | dict[str, jax.Array]:
    """What the network is told of a batch, whose token ids have been embedded (`captions.embedded`).

    Returns:
      `label` (B,) int32 in [0, num_classes); or, of a set with captions, a dict: `context` (B,L,C) float32, their
      embeddings, and `end` (B,) int32, the places of their end tokens.
    """
    if "context" not in batch:
        return batch["label"]
    return {"context": batch["context"].astype(jnp.float32), "end": batch["end"]}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training set.

    Attributes:
      source: the examples.
      latent_shape: (H, W, C) of one latent, the model's input.
      num_classes: labels run from 0 to num_classes - 1; num_classes itself is the model's null label. 0: captions.
      encode: `encode(batch, key) -> latents` (B,H,W,C) float32. A pure function traced inside the train step: `batch`
        is a dict of stacked examples, `key` gives randomness for the whole global batch (posterior sampling). Sets
        that need no randomness ignore the key.
      class_names: one name a class, or None.
      stable_diffusion: whether the latents are those of Stable Diffusion's autoencoder; None where it makes no
        difference.
      left_out: what lies beside the examples and is not in the set, in words; empty where nothing is.
      null: of a set with captions, what stands for none: the empty one, `context` (L,C) and `end` (). None with labels.
      text: of a set with captions that stores their token ids, `ids` (L,) int32 in place of `context`: what embeds them
        on the devices. None: they are embedded already.
    """

    source: ExampleSource
    latent_shape: tuple[int, int, int]
    num_classes: int
    encode: Callable[[Mapping[str, jax.Array], Any], jax.Array]
    class_names: tuple[str, ...] | None = None
    stable_diffusion: bool | None = False
    left_out: str = ""
    null: Mapping[str, np.ndarray] | None = None
    text: TextEncoder | None = None


class Decoder(Protocol):
    """Turns latents (B,H,W,C) float32 into images (B,H',W',C') uint8; compiles itself, parameters are its own.

    One with weights also has `fingerprint`, the SHA-256 of their file.
    """

    def __call__(self, latents: jax.Array) -> jax.Array: ...
