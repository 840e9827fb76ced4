"""The diffusion transformer of DiT (Peebles and Xie, 2023) and SiT (Ma et al., 2024): one backbone for both families.

The network knows nothing of noise: it maps latents, a number per example and a label to a prediction of any number of
channels, and hands out the tokens after any of its blocks on the way.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sra_jax.models import operations
from sra_jax.models.attention import Projected
from sra_jax.models.stack import ANYWHERE, Placement, run_stack

TIME_FREQUENCIES = 256

xavier_uniform = nnx.initializers.xavier_uniform()
small_normal = nnx.initializers.normal(0.02)
zeros = nnx.initializers.zeros_init()


class Sizes(Protocol):
    """What the layers ask of a network's shape; `TransformerConfig` says what each means."""

    @property
    def output_channels(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def mlp_ratio(self) -> float: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def precision(self) -> jax.lax.Precision: ...


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The network's shape.

    Attributes:
      input_size: height and width of the latents.
      channels: channels of the latents.
      output_channels: channels of the prediction.
      num_classes: classes.
      patch: side of a patch; divides `input_size`.
      depth: number of blocks.
      width: channels of a token; divisible by 4 (the position table) and by `heads`.
      heads: attention heads.
      mlp_ratio: hidden width of a block's MLP over `width`.
      dtype: type of the matrix products; parameters, norms, softmax and the residual stream are float32.
      remat: what the backward pass recomputes, a key of `sra_jax.models.stack.REMAT_POLICIES`.
      null_label: whether the label table has one more row, for the null label `num_classes`; guidance needs it.
    """

    input_size: int
    channels: int
    output_channels: int
    num_classes: int
    patch: int
    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    remat: str = "none"
    null_label: bool = True

    @property
    def label_rows(self) -> int:
        """Rows of the label table."""
        return self.num_classes + self.null_label

    @property
    def tokens(self) -> int:
        """N, the length of the token sequence."""
        return (self.input_size // self.patch) ** 2

    @property
    def attended(self) -> int:
        """Tokens of one attention."""
        return self.tokens

    @property
    def precision(self) -> jax.lax.Precision:
        """float32 means float32: without it accelerators round the operands of float32 products."""
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(
    config: Sizes, features_in: int, features_out: int, rngs: nnx.Rngs, kernel_init: Any = xavier_uniform,
    placement: Placement = ANYWHERE,
) -> nnx.Linear:
    """A linear layer with float32 parameters and products in the config's type."""
    return nnx.Linear(
        features_in, features_out, kernel_init=kernel_init, dtype=config.dtype, precision=config.precision,
        dot_general=placement.product, rngs=rngs,
    )  # fmt: skip


FEW_GROUPS = 4
"""Up to so many groups a token's values are selected, which fuses with what uses them; beyond, they are gathered."""


def by_token(values: jax.Array, groups: jax.Array | None) -> jax.Array:
    """Each token's values out of those of its example's groups.

    Args:
      values: (B*G,D), the groups of an example in a row.
      groups: (B,N) int, the group of each token in 0..G-1; None: one group an example.

    Returns:
      (B,N,D), or (B,1,D) where there is one group.
    """
    if groups is None:
        return values[:, None]
    values = values.reshape(groups.shape[0], -1, values.shape[-1])  # (B,G,D)
    if values.shape[1] > FEW_GROUPS:
        return jnp.take_along_axis(values, groups[..., None], axis=1)
    chosen = values[:, :1]
    for group in range(1, values.shape[1]):
        chosen = jnp.where((groups == group)[..., None], values[:, group, None], chosen)
    return jnp.broadcast_to(chosen, (*groups.shape, values.shape[-1]))


@dataclasses.dataclass(frozen=True)
class Condition:
    """What every block sees of an example beside its tokens.

    Attributes:
      vector: SiLU of the conditioning vector of each group, (B*G,D), the groups of an example in a row.
      groups: (B,N) int, the group of each token; None: one group an example.
      segments: (B,N) int of attention: tokens of unequal numbers do not see each other; None: all do, but for `sizes`.
      sizes: instead of `segments`, where the tokens lie in order of them, and every example has as many of each.
    """

    vector: jax.Array
    groups: jax.Array | None = None
    segments: jax.Array | None = None
    sizes: tuple[int, ...] | None = None


jax.tree_util.register_dataclass(Condition, data_fields=["vector", "groups", "segments"], meta_fields=["sizes"])


@jax.custom_vjp
def reordered(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """Tokens (B,N,D) in another order: token i is x's token `order[:, i]` (B,N); `back` is the inverse order.

    Its gradient is the reverse reordering, where that of a gather would be a scatter.
    """
    del back
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _reordered_forward(
    x: jax.Array, order: jax.Array, back: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return reordered(x, order, back), (order, back)


def _reordered_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    order, back = saved
    return reordered(gradient, back, order), None, None


reordered.defvjp(_reordered_forward, _reordered_backward)


def position_table(width: int, grid: int) -> np.ndarray:
    """The fixed 2-D sin-cos position table (grid*grid, width), float32, computed in float64.

    Tokens are row-major. The first half of the channels encodes the column, the second the row; each half is
    [sin, cos] of the coordinate at width/4 frequencies 10000^(-i/(width/4)).
    """
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = np.arange(grid)[:, None] * frequencies  # (G, width/4)
    encoded = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (G, width/2)
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    return np.concatenate([encoded[columns], encoded[rows]], axis=1).astype(np.float32)


def time_features(t: jax.Array) -> jax.Array:
    """cos and sin of t (B,) at 128 frequencies, (B,256) float32, cosines first; maximal period 10000."""
    half = TIME_FREQUENCIES // 2
    exponents = -np.log(10000.0).astype(np.float32) * np.arange(half, dtype=np.float32) / np.float32(half)
    angles = t.astype(jnp.float32)[:, None] * np.exp(exponents)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """(B,H,W,C) -> (B,N,patch*patch*C): row-major tokens; inside a token row, column, channel."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: jax.Array, patch: int, grid: tuple[int, int] | None = None) -> jax.Array:
    """The inverse of `patchify`: (B,N,patch*patch*C) -> (B,H,W,C); `grid` rows and columns of tokens, or a square."""
    batch, count, features = tokens.shape
    rows, columns = grid or (round(count**0.5),) * 2
    x = tokens.reshape(batch, rows, columns, patch, patch, features // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * patch, columns * patch, -1)


class TimeEmbedding(nnx.Module):
    """Sinusoidal features of the time, then a two-layer SiLU network: (B,) -> (B,D)."""

    def __init__(self, config: Sizes, *, rngs: nnx.Rngs):
        self.hidden = linear(config, TIME_FREQUENCIES, config.width, rngs, small_normal)
        self.out = linear(config, config.width, config.width, rngs, small_normal)

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.out(nnx.silu(self.hidden(time_features(t))))


class Attention(nnx.Module):
    """Multi-head self-attention (B,N,D) -> (B,N,D), within groups where the condition says so; softmax in float32."""

    def __init__(self, config: Sizes, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        self.config = config
        self.attend = placement.attend
        self._apart = placement.apart
        head_width = config.width // config.heads
        options = {
            "kernel_init": xavier_uniform, "dtype": config.dtype, "precision": config.precision,
            "dot_general": placement.product,
        }  # fmt: skip
        self.qkv: Any = nnx.LinearGeneral(config.width, (3, config.heads, head_width), rngs=rngs, **options)
        self.out = nnx.LinearGeneral((config.heads, head_width), config.width, axis=(-2, -1), rngs=rngs, **options)

    def __call__(self, x: jax.Array, condition: "Condition | None" = None) -> jax.Array:
        qkv, precision = self.project(x), self.config.precision
        if condition is None or condition.sizes is None:
            return self.out(self.attend(qkv, precision, condition and condition.segments))
        ends = np.cumsum(condition.sizes)[:-1]
        arrays, structure = jax.tree.flatten(qkv)
        pieces = zip(*(jnp.split(array, ends, axis=1) for array in arrays), strict=True)
        parts = [self.attend(jax.tree.unflatten(structure, piece), precision) for piece in pieces]
        return self.out(jnp.concatenate(parts, axis=1))

    def project(self, x: jax.Array) -> Projected:
        """Tokens (B,N,D) -> their queries, keys and values, as `attend` takes them."""
        if not self._apart:
            return self.qkv(x)
        # Three products in place of one whose result would be cut into three, and its gradient put together of three.
        config, numbers = self.config, (((2,), (0,)), ((), ()))
        x, kernel, bias = (each.astype(config.dtype) for each in (x, self.qkv.kernel[...], self.qkv.bias[...]))
        parts = (
            self.qkv.dot_general(x, kernel[:, i], numbers, precision=config.precision) + bias[i] for i in range(3)
        )
        return tuple(checkpoint_name(part, operations.PRODUCT) for part in parts)


class MLP(nnx.Module):
    """Linear, GELU in its tanh approximation, linear: (B,N,D) -> (B,N,D)."""

    def __init__(self, config: Sizes, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        hidden = int(config.width * config.mlp_ratio)
        self.hidden = linear(config, config.width, hidden, rngs, placement=placement)
        self.out = linear(config, hidden, config.width, rngs, placement=placement)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(operations.gelu(self.hidden(x)))


class Block(nnx.Module):
    """A transformer block whose norms are modulated and whose branches are gated by the condition (adaLN-Zero)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        self.placement = placement
        self.attention = Attention(config, rngs=rngs, placement=placement)
        self.mlp = MLP(config, rngs=rngs, placement=placement)
        self.modulation = linear(config, config.width, 6 * config.width, rngs, zeros)

    def __call__(self, x: jax.Array, condition: Condition) -> jax.Array:
        """x (B,N,D) float32 -> (B,N,D) float32. The modulation is computed once a group and selected a token."""
        modulation = self.placement.modulation(self.modulation(condition.vector)).astype(jnp.float32)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            by_token(part, condition.groups) for part in jnp.split(modulation, 6, axis=-1)
        )
        x = x + gate_a * self.attention(operations.modulated_norm(x, shift_a, scale_a), condition)
        return x + gate_m * self.mlp(operations.modulated_norm(x, shift_m, scale_m))


class FinalLayer(nnx.Module):
    """Modulated norm and a linear layer from tokens to patches: (B,N,D) -> (B,N,patch*patch*C_out) float32."""

    def __init__(self, config: Sizes, *, rngs: nnx.Rngs):
        self.modulation = linear(config, config.width, 2 * config.width, rngs, zeros)
        self.linear = linear(config, config.width, config.patch**2 * config.output_channels, rngs, zeros)

    def __call__(self, x: jax.Array, condition: Condition) -> jax.Array:
        modulation = self.modulation(condition.vector).astype(jnp.float32)
        shift, scale = (by_token(part, condition.groups) for part in jnp.split(modulation, 2, axis=-1))
        return self.linear(operations.modulated_norm(x, shift, scale)).astype(jnp.float32)


def stack_modules(make: Callable[[nnx.Rngs], nnx.Module], depth: int, key: jax.Array) -> nnx.Module:
    """`depth` independent modules as one, every parameter with a leading depth axis."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    states = jax.vmap(lambda k: nnx.split(make(nnx.Rngs(k)))[1])(jax.random.split(key, depth))
    return nnx.merge(graphdef, states)


class Transformer(nnx.Module):
    """DiT / SiT: patch, time and label embeddings, a stack of blocks, a final layer.

    Initialisation follows DiT: Xavier-uniform kernels (the patch embedding over its flattened kernel), zero biases,
    N(0, 0.02) for the label table and the time network, zeros for every modulation and the final layer, so that a new
    network predicts 0.

    Args:
      config: the shape.
      rngs: its `params` stream.
      placement: where activations and the parameters of a block lie while the network runs.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs, placement: Placement = ANYWHERE):
        self.config = config
        self.placement = placement
        self.patch_embedding = linear(config, config.patch**2 * config.channels, config.width, rngs)
        self.time_embedding = TimeEmbedding(config, rngs=rngs)
        self.label_embedding = nnx.Embed(
            config.label_rows, config.width, embedding_init=small_normal, rngs=rngs
        )
        self.blocks = stack_modules(lambda r: Block(config, rngs=r, placement=placement), config.depth, rngs.params())
        self.final = FinalLayer(config, rngs=rngs)

    def embed(self, x: jax.Array) -> jax.Array:
        """Latents (B,H,W,C) -> tokens (B,N,D) float32 with positions."""
        config = self.config
        tokens = self.patch_embedding(patchify(x, config.patch)).astype(jnp.float32)
        return tokens + position_table(config.width, config.input_size // config.patch)

    def condition(self, t: jax.Array, y: jax.Array) -> jax.Array:
        """Times (B,) or (B,G) and labels (B,) -> SiLU of the conditioning vector (B*G,D) float32."""
        labels = self.label_embedding(y).astype(jnp.float32)
        if t.ndim > 1:
            labels = jnp.repeat(labels, t.shape[1], axis=0)
        return nnx.silu(self.time_embedding(t.reshape(-1)).astype(jnp.float32) + labels)

    def __call__(
        self, x: jax.Array, t: jax.Array, y: jax.Array, *, groups: jax.Array | None = None,
        segments: jax.Array | None = None, sizes: tuple[int, ...] | None = None, taps: Sequence[int] = (),
        stop: int | None = None,
    ) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
        """Predict, and return tokens on the way.

        Args:
          x: latents (B,H,W,C).
          t: times (B,), or (B,G) where an example's tokens have times in groups; fed to the sinusoids unscaled.
          y: labels (B,) int in [0, num_classes); or `num_classes`, the null label, where there is one.
          groups: with t (B,G): the group of each token, (B,N) int in 0..G-1, tokens row-major.
          segments: (B,N) int: a token attends to those of its own number only, such as those of its group (attention
            separation); None: to all.
          sizes: with segments: how many tokens each has, where that is the same in every example. Attention then
            computes the scores within segments alone; without it, all scores, of which it masks some.
          taps: block numbers 1..depth, ascending: return the tokens after these blocks. Block counts start at 1 as in
            the paper: m means "after m blocks".
          stop: run blocks 1..stop only, without the final layer; None runs all. Later blocks cost nothing.

        Returns:
          prediction (B,H,W,C_out) float32, or None with `stop`; one (B,N,D) float32 array a tap.
        """
        config = self.config
        last = config.depth if stop is None else stop
        if list(taps) != sorted(set(taps)) or any(not 1 <= tap <= last for tap in taps):
            raise ValueError(f"taps={tuple(taps)} must ascend within 1..{last}")
        if (t.ndim > 1) != (groups is not None):
            raise ValueError(f"t {t.shape}: times (B,G) need the group of each token, times (B,) take none")
        tokens = self.placement.rows(self.embed(x))
        order = back = None
        if segments is None:
            sizes = None
        elif sizes is not None:
            order = jnp.argsort(segments, axis=1, stable=True)
            back = jnp.argsort(order, axis=1)
            tokens = reordered(tokens, order, back)
            if groups is segments:
                groups = jnp.broadcast_to(np.repeat(np.arange(len(sizes)), sizes), groups.shape)
            elif groups is not None:
                groups = jnp.take_along_axis(groups, order, axis=1)
            segments = None  # the sizes say it
        condition = Condition(self.placement.rows(self.condition(t, y)), groups, segments, sizes)
        shared = dataclasses.replace(condition, vector=self.placement.shared(condition.vector))
        graphdef, params = nnx.split(self.blocks)

        def block(params: Any, x: jax.Array, condition: Condition) -> jax.Array:
            return nnx.merge(graphdef, params)(x, condition)

        tokens, features = run_stack(
            block, params, tokens, shared, depth=config.depth, taps=tuple(taps), stop=last,
            remat=config.remat, placement=self.placement,
        )
        predicted = None if stop is not None else self.final(tokens, condition)
        if order is not None:  # back to row-major
            features = tuple(reordered(x, back, order) for x in features)
            predicted = None if predicted is None else reordered(predicted, back, order)
        return None if predicted is None else unpatchify(predicted, config.patch), features

