"""The multimodal diffusion transformer (MMDiT) of Stable Diffusion 3 (Esser et al., arXiv 2403.03206, section 4), as
REPA trains it on captions (Yu et al., arXiv 2410.06940).

Text and image tokens keep weights of their own, a stream each, and meet in one attention over both. The network knows
nothing of noise and of text encoders: it maps latents, a number an example and a caption's embeddings to a prediction,
and hands out the image tokens after any of its blocks on the way.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sra_jax.models import operations
from sra_jax.models.attention import Attend, Projected
from sra_jax.models.stack import ANYWHERE, Placement, run_stack
from sra_jax.models.transformer import (
    MLP,
    Attention,
    Condition,
    FinalLayer,
    TimeEmbedding,
    linear,
    patchify,
    position_table,
    small_normal,
    stack_modules,
    unpatchify,
    zeros,
)

INITIALISATIONS = ("uniform", "adaln_zero")

Tokens = tuple[jax.Array, jax.Array]
"""Text tokens (B,L,D) and image tokens (B,N,D), float32."""


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """The network's shape.

    Attributes:
      input_size: height and width of the latents.
      channels: channels of the latents.
      output_channels: channels of the prediction.
      patch: side of a patch; divides `input_size`.
      depth: number of joint blocks, at least 2: the last one has no text output.
      width: channels of a token; divisible by 4 (the position table) and by `heads`.
      heads: attention heads.
      context_width: channels of a caption's embeddings.
      context_length: L, text tokens of a caption; no parameter depends on it.
      mlp_ratio: hidden width of a block's MLP over `width`.
      pooled: whether the embedding at a caption's end joins the time in the condition, as in Stable Diffusion 3;
        without it the time is the only condition, as in REPA.
      initialisation: "uniform" draws every weight and bias from U(-1, 1) / sqrt(inputs of the layer), PyTorch's
        default, which is REPA's; "adaln_zero" is DiT's, so that a new network predicts 0.
      dtype: type of the matrix products; parameters, norms, softmax and the residual streams are float32.
      remat: what the backward pass recomputes, a key of `sra_jax.models.stack.REMAT_POLICIES`.
    """

    input_size: int
    channels: int
    output_channels: int
    patch: int
    depth: int
    width: int
    heads: int
    context_width: int
    context_length: int
    mlp_ratio: float = 4.0
    pooled: bool = False
    initialisation: str = "uniform"
    dtype: Any = jnp.float32
    remat: str = "none"

    @property
    def tokens(self) -> int:
        """N, the number of image tokens."""
        return (self.input_size // self.patch) ** 2

    @property
    def attended(self) -> int:
        """Tokens of one attention, of text and image."""
        return self.context_length + self.tokens

    @property
    def precision(self) -> jax.lax.Precision:
        """float32 means float32: without it accelerators round the operands of float32 products."""
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class Entrance(nnx.Module):
    """A stream's way into the joint attention: a modulated norm, then queries, keys and values of its tokens.

    Args:
      config: the shape.
      rngs: its `params` stream.
      parts: vectors of the modulation: 2 for shift and scale, 6 where a gate and the MLP's three follow.
      placement: where activations and parameters lie.
    """

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, parts: int = 2, placement: Placement = ANYWHERE):
        self._parts = parts
        self._placement = placement
        self.attention = Attention(config, rngs=rngs, placement=placement)
        self.modulation = linear(config, config.width, parts * config.width, rngs, zeros)

    def modulations(self, condition: jax.Array) -> list[jax.Array]:
        """SiLU of the condition (B,D) -> `parts` vectors (B,D) float32."""
        modulation = self._placement.modulation(self.modulation(condition)).astype(jnp.float32)
        return jnp.split(modulation, self._parts, axis=-1)

    def project(self, tokens: jax.Array, shift: jax.Array, scale: jax.Array) -> Projected:
        """Tokens (B,N,D) -> queries, keys and values, as the attention takes them."""
        return self.attention.project(operations.modulated_norm(tokens, shift[:, None], scale[:, None]))


class TextEntrance(Entrance):
    """The text side of the last block: its tokens are attended to, and end there."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        super().__init__(config, rngs=rngs, placement=placement)
        del self.attention.out


class Stream(Entrance):
    """One side of a joint block, text or image."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        super().__init__(config, rngs=rngs, parts=6, placement=placement)
        self.mlp = MLP(config, rngs=rngs, placement=placement)

    def add_attention(self, tokens: jax.Array, mixed: jax.Array, gate: jax.Array) -> jax.Array:
        """Tokens (B,N,D) and this stream's share (B,N,heads,d) of the attention's output -> (B,N,D)."""
        return tokens + gate[:, None] * self.attention.out(mixed)

    def add_mlp(self, tokens: jax.Array, shift: jax.Array, scale: jax.Array, gate: jax.Array) -> jax.Array:
        """Tokens (B,N,D) -> (B,N,D)."""
        return tokens + gate[:, None] * self.mlp(operations.modulated_norm(tokens, shift[:, None], scale[:, None]))


class JointBlock(nnx.Module):
    """Both streams through one softmax attention over [text; image], then each through an MLP of its own."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        self.config = config
        self.text = Stream(config, rngs=rngs, placement=placement)
        self.image = Stream(config, rngs=rngs, placement=placement)

    def __call__(self, tokens: Tokens, condition: jax.Array) -> Tokens:
        """Text and image tokens, float32, and SiLU of the condition (B,D) -> both, float32."""
        text, image = tokens
        of_text, of_image = self.text.modulations(condition), self.image.modulations(condition)
        text_mixed, image_mixed = attend_jointly(
            self.text.project(text, *of_text[:2]), self.image.project(image, *of_image[:2]), self.config.precision,
            self.image.attention.attend,
        )
        return (
            self.text.add_mlp(self.text.add_attention(text, text_mixed, of_text[2]), *of_text[3:]),
            self.image.add_mlp(self.image.add_attention(image, image_mixed, of_image[2]), *of_image[3:]),
        )


class LastBlock(nnx.Module):
    """A joint block without text output, for nothing comes after it that would read the text."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        self.config = config
        self.text = TextEntrance(config, rngs=rngs, placement=placement)
        self.image = Stream(config, rngs=rngs, placement=placement)

    def __call__(self, tokens: Tokens, condition: jax.Array) -> Tokens:
        """As `JointBlock`; the text is handed through."""
        text, image = tokens
        of_text, of_image = self.text.modulations(condition), self.image.modulations(condition)
        _, mixed = attend_jointly(
            self.text.project(text, *of_text), self.image.project(image, *of_image[:2]), self.config.precision,
            self.image.attention.attend,
        )
        return text, self.image.add_mlp(self.image.add_attention(image, mixed, of_image[2]), *of_image[3:])


def attend_jointly(
    text: Projected, image: Projected, precision: jax.lax.Precision, attend: Attend = operations.attend
) -> Tokens:
    """One attention over the tokens of both streams, without a mask: padding of captions is text like any other.

    Args:
      text, image: queries, keys and values (B,L,3,heads,d) and (B,N,3,heads,d), or three arrays each.
      precision: of the products.
      attend: the implementation of attention.

    Returns:
      The attention's output for text (B,L,heads,d) and image tokens (B,N,heads,d).
    """
    mixed = attend(jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), text, image), precision)
    length = jax.tree.leaves(text)[0].shape[1]
    return mixed[:, :length], mixed[:, length:]


class PooledEmbedding(nnx.Module):
    """The embedding at a caption's end through a two-layer SiLU network: (B,C) -> (B,D)."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.hidden = linear(config, config.context_width, config.width, rngs, small_normal)
        self.out = linear(config, config.width, config.width, rngs, small_normal)

    def __call__(self, pooled: jax.Array) -> jax.Array:
        return self.out(nnx.silu(self.hidden(pooled)))


class MMDiT(nnx.Module):
    """Patch, time and context embeddings, joint blocks, a final layer on the image tokens.

    Args:
      config: the shape.
      rngs: its `params` stream.
      placement: where activations and the parameters of a block lie while the network runs.
    """

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        self.config = config
        self.placement = placement
        self.patch_embedding = linear(config, config.patch**2 * config.channels, config.width, rngs)
        self.time_embedding = TimeEmbedding(config, rngs=rngs)
        self.context_embedding = linear(config, config.context_width, config.width, rngs)
        if config.pooled:
            self.pooled_embedding = PooledEmbedding(config, rngs=rngs)
        self.blocks = stack_modules(
            lambda r: JointBlock(config, rngs=r, placement=placement), config.depth - 1, rngs.params()
        )
        # a stack of one: the same rules of layout and of what the backward pass keeps hold for it
        self.last_block = stack_modules(lambda r: LastBlock(config, rngs=r, placement=placement), 1, rngs.params())
        self.final = FinalLayer(config, rngs=rngs)
        if config.initialisation == "uniform":
            nnx.update(self, uniform(nnx.state(self), rngs.params()))

    def embed(self, x: jax.Array) -> jax.Array:
        """Latents (B,H,W,C) -> image tokens (B,N,D) float32 with positions.

        Latents smaller than `input_size` take the centre of its position table, as in Stable Diffusion 3.
        """
        config = self.config
        grid = config.input_size // config.patch
        rows, columns = x.shape[1] // config.patch, x.shape[2] // config.patch
        top, left = (grid - rows) // 2, (grid - columns) // 2
        table = position_table(config.width, grid).reshape(grid, grid, -1)
        positions = table[top : top + rows, left : left + columns].reshape(rows * columns, -1)
        return self.patch_embedding(patchify(x, config.patch)).astype(jnp.float32) + positions

    def condition(self, t: jax.Array, y: Mapping[str, jax.Array]) -> jax.Array:
        """Times (B,) and captions -> SiLU of the conditioning vector (B,D) float32."""
        vector = self.time_embedding(t).astype(jnp.float32)
        if self.config.pooled:
            pooled = jnp.take_along_axis(y["context"], y["end"][:, None, None], axis=1)[:, 0]
            vector += self.pooled_embedding(pooled).astype(jnp.float32)
        return nnx.silu(vector)

    def __call__(
        self, x: jax.Array, t: jax.Array, y: Mapping[str, jax.Array], *, groups: None = None, segments: None = None,
        sizes: None = None, taps: Sequence[int] = (), stop: int | None = None,
    ) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
        """Predict, and return image tokens on the way.

        Args:
          x: latents (B,H,W,C).
          t: times (B,), fed to the sinusoids unscaled.
          y: captions: "context" (B,L,context_width), their embeddings, and "end" (B,) int, the place of the end token,
            which is read where `config.pooled`.
          groups, segments, sizes: None; only `Transformer` gives the tokens of an example times of their own.
          taps: block numbers 1..depth, ascending: return the image tokens after these blocks. Block counts start at 1.
          stop: run blocks 1..stop only, without the final layer; None runs all. Later blocks cost nothing.

        Returns:
          prediction (B,H,W,C_out) float32, or None with `stop`; one (B,N,D) float32 array a tap.
        """
        if groups is not None or segments is not None or sizes is not None or t.ndim > 1:
            raise ValueError(f"an MMDiT has one time an example, not t {t.shape} in groups")
        depth = self.config.depth
        last = depth if stop is None else stop
        if list(taps) != sorted(set(taps)) or any(not 1 <= tap <= last for tap in taps):
            raise ValueError(f"taps={tuple(taps)} must ascend within 1..{last}")
        text = self.context_embedding(y["context"]).astype(jnp.float32)
        tokens = (self.placement.rows(text), self.placement.rows(self.embed(x)))
        condition = self.placement.rows(self.condition(t, y))
        tokens, features = self._run(self.blocks, tokens, condition, [tap for tap in taps if tap < depth], last)
        if last == depth:
            tokens, of_last = self._run(self.last_block, tokens, condition, [1] if depth in taps else [], 1)
            features += of_last
        if stop is not None:
            return None, features
        grid = (x.shape[1] // self.config.patch, x.shape[2] // self.config.patch)
        return unpatchify(self.final(tokens[1], Condition(condition)), self.config.patch, grid), features

    def _run(
        self, blocks: nnx.Module, tokens: Tokens, condition: jax.Array, taps: Sequence[int], stop: int
    ) -> tuple[Tokens, tuple[jax.Array, ...]]:
        """The first `stop` of stacked blocks, or all where there are fewer."""
        graphdef, params = nnx.split(blocks)
        depth = len(jax.tree.leaves(params)[0])

        def block(params: Any, tokens: Tokens, condition: jax.Array) -> Tokens:
            return nnx.merge(graphdef, params)(tokens, condition)

        return run_stack(
            block, params, tokens, self.placement.shared(condition), depth=depth, taps=tuple(taps),
            stop=min(stop, depth), remat=self.config.remat, placement=self.placement, tapped=lambda tokens: tokens[1],
        )  # fmt: skip


def uniform(state: nnx.State, key: jax.Array) -> nnx.State:
    """Kernels and biases drawn anew from U(-1, 1) / sqrt(inputs of the layer), as PyTorch's linear layers begin.

    Args:
      state: of linear layers, each a kernel and a bias with or without a leading depth axis.
      key: a JAX random key.
    """
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(state))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state))]
    sizes = {path: leaf.size for path, leaf in zip(paths, leaves, strict=True)}

    def draw(path: tuple[Any, ...], leaf: jax.Array, key: jax.Array) -> jax.Array:
        layer = path[:-1]
        inputs = sizes[(*layer, jax.tree_util.DictKey("kernel"))] // sizes[(*layer, jax.tree_util.DictKey("bias"))]
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -(inputs**-0.5), inputs**-0.5)

    drawn = [draw(*each) for each in zip(paths, leaves, jax.random.split(key, len(leaves)), strict=True)]
    nnx.replace_by_pure_dict(state, jax.tree.unflatten(structure, drawn))
    return state
