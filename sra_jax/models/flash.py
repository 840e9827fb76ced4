"""FlashAttention for TPUs (Dao et al., arXiv 2205.14135), for the lengths that images have: a head's keys all at once.

The fast memory of a TPU holds the keys and values of a head and the scores of a few hundred queries, so that no running
softmax is needed, and the backward pass makes the scores once. Everything lies with the tokens along the lanes, (d,N):
heads of 64 or 72 channels need no padding to 128 there, and a query's maximum and sum are rows.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sra_jax.models import operations

LANES = 128
"""Tokens in one row of a vector register: the kernels take whole rows."""

SCORES = 512 * 1024
"""Scores that are in fast memory at a time, float32."""

UNSEEN = -1e30
"""A score that leaves nothing; finite, so that no difference of two is NaN."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 3))
def attend(
    qkv: jax.Array, precision: Any, segments: jax.Array | None = None, interpret: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over tokens, for each head.

    Args:
      qkv: queries, keys and values (B,N,3,H,d); any N, of which a kernel takes the next multiple of 128.
      precision: of the products, whose results are float32, as the softmax is.
      segments: (B,N) int, at least 0: a token sees those of its own number only; None: it sees all.
      interpret: run the kernels operation by operation, on any platform, slowly.

    Returns:
      (B,N,H,d) in the type of `qkv`.
    """
    return _forward(qkv, precision, segments, interpret)[0]


def _attend_forward(
    qkv: jax.Array, precision: Any, segments: jax.Array | None, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    output, sums = (checkpoint_name(x, operations.ATTENTION) for x in _forward(qkv, precision, segments, interpret))
    return output, (qkv, segments, output, sums)


def _attend_backward(
    precision: Any, interpret: bool, saved: tuple[Any, ...], gradient: jax.Array
) -> tuple[jax.Array, None]:
    """Section B.2 there: with o = w v, the gradient of a score is w (g v^T - (g . o))."""
    qkv, segments, output, sums = saved
    case = _Case(qkv, segments)
    size, heads, width = case.size, case.heads_at_a_time, case.width
    of_heads = pl.BlockSpec((None, heads, width, size), lambda b, h: (b, h, 0, 0))
    whole = [_part(part, heads, width, size) for part in range(3)]
    result = pl.pallas_call(
        functools.partial(_backward_kernel, case=case, precision=precision),
        grid=(case.batch, case.heads // heads),
        in_specs=[
            *whole, of_heads, of_heads, pl.BlockSpec((None, heads, 1, size), lambda b, h: (b, h, 0, 0)),
            *case.segment_specs(queries=size, at=lambda b, h: (b, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, 3, heads, width, size), lambda b, h: (b, 0, h, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((case.batch, 3, case.heads, width, size), qkv.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=case.cost(products=5), interpret=interpret, name="attention_backward",
    )(*[case.lanes(qkv)] * 3, case.lanes(output), case.lanes(gradient), sums, *case.segments)  # fmt: skip
    return jnp.moveaxis(result, -1, 1)[:, : case.tokens], None


attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    qkv: jax.Array, precision: Any, segments: jax.Array | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The output, and the logarithm of each query's sum of exponentials (B,H,1,N) float32, N a multiple of 128."""
    case = _Case(qkv, segments)
    heads, width, queries = case.heads_at_a_time, case.width, case.queries_at_a_time
    output, sums = pl.pallas_call(
        functools.partial(_forward_kernel, case=case, precision=precision),
        grid=(case.batch, case.heads // heads, case.size // queries),
        in_specs=[
            pl.BlockSpec((None, None, heads, width, queries), lambda b, h, i: (b, 0, h, 0, i)),
            *(_part(part, heads, width, case.size) for part in (1, 2)),
            *case.segment_specs(queries, at=lambda b, h, i: (b, 0, i)),
        ],
        out_specs=[
            pl.BlockSpec((None, heads, width, queries), lambda b, h, i: (b, h, 0, i)),
            pl.BlockSpec((None, heads, 1, queries), lambda b, h, i: (b, h, 0, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((case.batch, case.heads, width, case.size), qkv.dtype),
            jax.ShapeDtypeStruct((case.batch, case.heads, 1, case.size), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=case.cost(products=2), interpret=interpret, name="attention_forward",
    )(*[case.lanes(qkv)] * 3, *case.segments)  # fmt: skip
    return jnp.moveaxis(output, -1, 1)[:, : case.tokens], sums


def _part(part: int, heads: int, width: int, size: int) -> pl.BlockSpec:
    """All tokens' queries, keys or values of some heads."""
    return pl.BlockSpec((None, None, heads, width, size), lambda b, h, *_: (b, part, h, 0, 0))


class _Case:
    """Sizes of one call, and its arrays as the kernels take them.

    Attributes:
      tokens, size: N, and the multiple of 128 that the kernels see.
      queries_at_a_time, heads_at_a_time: divide `size` and `heads`; their scores lie in fast memory together.
      segments: () or the segments as a row of queries (B,1,size) and a column of keys (B,size,1).
    """

    def __init__(self, qkv: jax.Array, segments: jax.Array | None):
        self.batch, self.tokens, _, self.heads, self.width = qkv.shape
        self.size = -(-self.tokens // LANES) * LANES
        limit = max(LANES, SCORES // self.size)
        self.queries_at_a_time = max(n for n in range(LANES, self.size + 1, LANES) if not self.size % n and n <= limit)
        self.chunks = self.size // self.queries_at_a_time
        fitting = max(1, SCORES // self.size**2)
        self.heads_at_a_time = max(n for n in range(1, fitting + 1) if self.heads % n == 0)
        self._bytes = qkv.size * qkv.dtype.itemsize
        self.segments: tuple[jax.Array, ...] = ()
        if segments is not None:
            numbers = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, self.size - self.tokens)), constant_values=-1)
            self.segments = (numbers[:, None, :], numbers[:, :, None])

    def lanes(self, x: jax.Array) -> jax.Array:
        """(B,N,...,H,d) -> (B,...,H,d,size), with zeros behind the tokens."""
        x = jnp.moveaxis(x, 1, -1)
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, self.size - self.tokens)])

    def segment_specs(self, queries: int, at: Any) -> list[pl.BlockSpec]:
        """Blocks of `segments`: some queries, and all keys."""
        row = pl.BlockSpec((None, 1, queries), at)
        return [row, pl.BlockSpec((None, self.size, 1), lambda b, *_: (b, 0, 0))][: len(self.segments)]

    def seen(self, numbers: tuple[jax.Array, jax.Array] | None, count: int) -> jax.Array | None:
        """Whether a key is seen by a query, (size, count) bool, by both segments' numbers; None: each is."""
        if numbers is not None:
            return jnp.equal(*numbers)
        if self.tokens == self.size:
            return None
        return jax.lax.broadcasted_iota(jnp.int32, (self.size, count), 0) < self.tokens

    def cost(self, products: int) -> pl.CostEstimate:
        """Of so many products of all queries with all keys."""
        pairs = self.batch * self.heads * self.size**2
        moved = self._bytes * (4 if products == 2 else 8) // 3
        return pl.CostEstimate(flops=2 * products * pairs * self.width, transcendentals=pairs, bytes_accessed=moved)


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: Any) -> jax.Array:
    """Sums over an axis of each, float32."""
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k: jax.Array, seen: jax.Array | None, precision: Any) -> jax.Array:
    """Of keys by queries, (size, count) float32."""
    scores = _product(k, q, (0, 0), precision) * (1 / math.sqrt(q.shape[0]))
    return scores if seen is None else jnp.where(seen, scores, UNSEEN)


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, case: _Case, precision: Any) -> None:
    """Blocks (heads,d,count) of queries and (heads,d,size) of keys and values -> of the output and its sums."""
    *segments, output_ref, sums_ref = refs
    seen = case.seen((segments[0][...], segments[1][...]) if segments else None, case.queries_at_a_time)
    for head in range(case.heads_at_a_time):
        v = v_ref[head]
        scores = _scores(q_ref[head], k_ref[head], seen, precision)
        highest = scores.max(axis=0, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=0, keepdims=True)
        mixed = _product(v, weights.astype(v.dtype), (1, 0), precision)
        output_ref[head] = (mixed / total).astype(output_ref.dtype)
        sums_ref[head] = highest + jnp.log(total)


def _backward_kernel(
    q_ref: Any, k_ref: Any, v_ref: Any, output_ref: Any, gradient_ref: Any, sums_ref: Any, *refs: Any, case: _Case,
    precision: Any,
) -> None:
    """All tokens of some heads -> the gradients of their queries, keys and values, (3,heads,d,size)."""
    *segments, result_ref = refs
    count = case.queries_at_a_time
    for head in range(case.heads_at_a_time):
        k, v = k_ref[head], v_ref[head]
        of_k = of_v = jnp.zeros(k.shape, jnp.float32)
        for chunk in range(case.chunks):
            at = slice(chunk * count, (chunk + 1) * count)
            seen = case.seen((segments[0][:, at], segments[1][...]) if segments else None, count)
            q, gradient = q_ref[head, :, at], gradient_ref[head, :, at]
            scores = _scores(q, k, seen, precision)
            weights = jnp.exp(scores - sums_ref[head, :, at])
            along = (gradient.astype(jnp.float32) * output_ref[head, :, at].astype(jnp.float32)).sum(0, keepdims=True)
            of_v += _product(gradient, weights.astype(v.dtype), (1, 1), precision)
            of_weights = _product(v, gradient, (0, 0), precision) - along
            of_scores = (weights * of_weights * (1 / math.sqrt(case.width))).astype(v.dtype)
            result_ref[0, head, :, at] = _product(k, of_scores, (1, 0), precision).astype(result_ref.dtype)
            of_k += _product(q, of_scores, (1, 1), precision)
        result_ref[1, head] = of_k.astype(result_ref.dtype)
        result_ref[2, head] = of_v.astype(result_ref.dtype)
