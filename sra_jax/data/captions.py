"""Captions as the network gets them: embedded by an encoder that is not trained, another one of an image each epoch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sra_jax.distributed import sharding
from sra_jax.interop.clip_text import ClipTokenizer, abstract_params
from sra_jax.models.clip_text import ClipTextConfig

Captions = dict[str, np.ndarray]
"""`context` (...,L,C), embeddings of all positions, and `end` (...) int32, the place of the end token."""

ENCODED_TOGETHER = 64


class Encoder(Protocol):
    """Captions to what the network is told."""

    null: Captions
    """The empty caption, (L,C) and (): what stands for no caption."""

    def __call__(self, texts: Sequence[str]) -> Captions:
        """N captions: `context` (N,L,C) float32 and `end` (N,) int32. Longer ones than L tokens are cut."""


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """An `Encoder` that is a CLIP text tower.

    Attributes:
      config: the tower's sizes.
      params: its parameters.
      tokenizer: captions to ids.
      stored_null: the empty caption as a training set has it stored; None embeds it.
    """

    config: ClipTextConfig
    params: Mapping[str, Any]
    tokenizer: ClipTokenizer
    stored_null: Captions | None = None

    @functools.cached_property
    def _run(self) -> Any:
        graphdef, _ = abstract_params(self.config)
        params = jax.device_put(dict(self.params))
        run = jax.jit(lambda params, ids: nnx.merge(graphdef, params)(ids)[0])
        return lambda ids: run(params, ids)

    def __call__(self, texts: Sequence[str]) -> Captions:
        """N captions, embedded: `context` (N,L,C) float32 and `end` (N,). Longer ones than L tokens are cut."""
        ids, ends, _ = self.tokenizer(texts)
        return {"context": self.embed(ids), "end": ends}

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Ids (N,L) -> (N,L,C) float32; one shape for all calls, so that one program serves them."""
        padded = np.pad(ids, ((0, -len(ids) % ENCODED_TOGETHER), (0, 0)))
        parts = [
            np.asarray(self._run(padded[start : start + ENCODED_TOGETHER]))
            for start in range(0, len(padded), ENCODED_TOGETHER)
        ]
        return np.concatenate(parts)[: len(ids)]

    @functools.cached_property
    def null(self) -> Captions:
        """The empty caption, (L,C) and (): what stands for no caption."""
        if self.stored_null is not None:
            return self.stored_null
        return {name: np.asarray(array[0]) for name, array in self([""]).items()}


Batch = dict[str, jax.Array]


def embedded(text: TextEncoder | None, mesh: Mesh, dtype: Any) -> Callable[[Batch], Batch]:
    """What makes of a batch, split over the devices, the one that the network is told.

    Args:
      text: of a set whose examples have token ids: `ids` (B,L) int32 become `context` (B,L,C) float32, each device
        embedding its own rows. None leaves batches as they are.
      mesh: the devices, all of which hold the tower.
      dtype: of its matrix products.
    """
    if text is None:
        return lambda batch: batch
    graphdef, _ = abstract_params(dataclasses.replace(text.config, dtype=dtype))
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    params = jax.tree.map(
        lambda x: jax.make_array_from_callback(np.shape(x), whole, np.asarray(x).__getitem__), dict(text.params)
    )

    def embed(params: Any, batch: Batch) -> Batch:
        others = {name: array for name, array in batch.items() if name != "ids"}
        return others | {"context": nnx.merge(graphdef, params)(batch["ids"])[0]}

    run = jax.jit(embed, in_shardings=(whole, split), out_shardings=split)
    return lambda batch: run(params, batch) if "ids" in batch else batch


def turn(indices: np.ndarray, epochs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Which of its captions an image has in an epoch: all in turn, beginning anywhere.

    REPA draws anew at each access, which may give the same caption twice in a row; over a turn both are uniform.

    Args:
      indices: (B,) of the images.
      epochs: (B,).
      counts: (B,) captions of each, at least 1.

    Returns:
      (B,) numbers from 0.
    """
    first = (indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # Fibonacci hashing
    return ((first + epochs.astype(np.uint64)) % counts.astype(np.uint64)).astype(np.int64)
