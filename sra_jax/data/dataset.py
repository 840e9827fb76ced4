"""What every dataset gives: examples on the host, and the function that makes latents of a batch on the device."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

Example = Mapping[str, np.ndarray]


class ExampleSource(Protocol):
    """Random access to examples, as grain reads it: picklable, the same example for the same index every time.

    A source may also have `read_batch(indices)`, which returns examples stacked, and `where(index)`, which names the
    place of one for messages.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """One example: `label` () int32 in [0, num_classes) and whatever arrays `Dataset.encode` needs."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training set.

    Attributes:
      source: the examples.
      latent_shape: (H, W, C) of one latent, the model's input.
      num_classes: labels run from 0 to num_classes - 1; num_classes itself is the model's null label.
      encode: `encode(batch, key) -> latents` (B,H,W,C) float32. A pure function traced inside the train step: `batch`
        is a dict of stacked examples, `key` gives randomness for the whole global batch (posterior sampling). Sets
        that need no randomness ignore the key.
      class_names: one name a class, or None.
      stable_diffusion: whether the latents are those of Stable Diffusion's autoencoder; None where it makes no
        difference.
      left_out: what lies beside the examples and is not in the set, in words; empty where nothing is.
    """

    source: ExampleSource
    latent_shape: tuple[int, int, int]
    num_classes: int
    encode: Callable[[Mapping[str, jax.Array], Any], jax.Array]
    class_names: tuple[str, ...] | None = None
    stable_diffusion: bool | None = False
    left_out: str = ""


class Decoder(Protocol):
    """Turns latents (B,H,W,C) float32 into images (B,H',W',C') uint8; compiles itself, parameters are its own."""

    def __call__(self, latents: jax.Array) -> jax.Array: ...
