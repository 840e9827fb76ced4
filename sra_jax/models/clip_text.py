"""CLIP's text tower (Radford et al., arXiv 2103.00020, section 2.4): token ids to one embedding a position.

What text-to-image models read are the embeddings of all positions after the last norm, padding included and without a
mask on it, as Stable Diffusion, U-ViT and REPA take them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax.models.stack import run_stack
from sra_jax.models.transformer import stack_modules


def quick_gelu(x: jax.Array) -> jax.Array:
    """x sigmoid(1.702 x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """The tower's shape, under the names of Hugging Face's CLIPTextConfig and with its defaults.

    Attributes:
      vocab_size: rows of the token table.
      hidden_size: width; divisible by `num_attention_heads`.
      intermediate_size: hidden width of a layer's MLP.
      num_hidden_layers: layers.
      num_attention_heads: heads.
      max_position_embeddings: rows of the position table, the longest sequence.
      hidden_act: a key of `ACTIVATIONS`.
      layer_norm_eps: of every LayerNorm.
      dtype: type of the matrix products; parameters, norms, softmax and the residual stream are float32.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @property
    def options(self) -> dict[str, Any]:
        """What every linear layer takes."""
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        return {"dtype": self.dtype, "precision": precision}


class Layer(nnx.Module):
    """A pre-norm transformer layer with causal attention: (B,L,D) -> (B,L,D) float32."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        self.norm_attention = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(width, (heads, width // heads), rngs=rngs, **config.options) for _ in range(3)
        )
        self.out = nnx.LinearGeneral((heads, width // heads), width, axis=(-2, -1), rngs=rngs, **config.options)
        self.norm_mlp = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.hidden = nnx.Linear(width, config.intermediate_size, rngs=rngs, **config.options)
        self.back = nnx.Linear(config.intermediate_size, width, rngs=rngs, **config.options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self._attend(self.norm_attention(x)).astype(jnp.float32)
        hidden = ACTIVATIONS[self.config.hidden_act](self.hidden(self.norm_mlp(x)))
        return x + self.back(hidden).astype(jnp.float32)

    def _attend(self, x: jax.Array) -> jax.Array:
        """Each position over itself and those before it."""
        q, k, v = self.query(x), self.key(x), self.value(x)  # (B,L,H,d)
        precision = self.config.options["precision"]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision, preferred_element_type=jnp.float32)
        length = x.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores * q.shape[-1] ** -0.5, -jnp.inf), axis=-1)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v, precision=precision))


class ClipText(nnx.Module):
    """Token and position tables, layers, a last norm.

    Initialisation is near CLIP's own: N(0, 0.02) for the tokens, N(0, 0.01) for the positions.

    Args:
      config: the shape.
      rngs: its `params` stream.
    """

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        tables = ((config.vocab_size, 0.02), (config.max_position_embeddings, 0.01))
        self.tokens, self.positions = (
            nnx.Embed(rows, config.hidden_size, embedding_init=nnx.initializers.normal(spread), rngs=rngs)
            for rows, spread in tables
        )
        self.layers = stack_modules(lambda r: Layer(config, rngs=r), config.num_hidden_layers, rngs.params())
        self.norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Ids (B,L) int -> (B,L,D) float32: token plus position."""
        return self.tokens(ids) + self.positions.embedding[...][: ids.shape[1]]

    def __call__(self, ids: jax.Array, *, taps: Sequence[int] = ()) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Embed sequences of tokens.

        Args:
          ids: (B,L) int in [0, vocab_size), L at most `max_position_embeddings`.
          taps: layer numbers 1..num_hidden_layers, ascending: return the hidden states after these layers.

        Returns:
          (B,L,D) float32 after the last norm; one (B,L,D) float32 array a tap.
        """
        config = self.config
        if ids.shape[1] > config.max_position_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens, but the tower has {config.max_position_embeddings} positions")
        graphdef, params = nnx.split(self.layers)
        depth = config.num_hidden_layers
        hidden, features = run_stack(
            lambda params, x, _: nnx.merge(graphdef, params)(x), params, self.embed(ids), jnp.zeros(()), depth=depth,
            taps=tuple(taps), stop=depth, remat="none",
        )  # fmt: skip
        return self.norm(hidden), features
