"""The transformer's costly operations, with gradients written out so that compilers make no detours.

What automatic differentiation derives is the same arithmetic, but it states the gradient of a kernel as (g^T x)^T, for
which the CPU's compiler writes transposed copies of activations; it leaves the gradients of queries, keys and values
apart, and each of their uses puts them together anew; it computes attention's output again where only its weights are
needed; it sums over a norm's channels three times, one after the other, where two sums at a time are enough; and it
shares a GELU's tanh between the value and the gradient, which then lies in memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

PRODUCT, ATTENTION, NORM, GELU = "product", "attention", "norm", "gelu"
"""Names, for remat policies, of results worth keeping: of `product`, of attention, the statistics of norms, GELUs."""

Precision = jax.lax.Precision

LAYER_NORM_EPSILON = 1e-6

Multiply = Callable[[jax.Array, jax.Array, tuple[int, int], Any, Any], jax.Array]
"""(a, b, the axis of each that is summed over, precision, type of the result) -> their product."""


def matrices(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: Any, dtype: Any) -> jax.Array:
    """The product of two matrices, a `Multiply`, by the compiler."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


def product(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Precision | None = None,
    preferred_element_type: Any = None, out_sharding: None = None, *, multiply: Multiply = matrices,
) -> jax.Array:
    """x (...,*I) times a kernel (*I,*O) -> (...,*O), as a product of matrices.

    Stands in for `jax.lax.dot_general` in the layers of `flax.nnx`, where axes are not split over devices.

    Args:
      x: any number of leading axes; the axes I are last.
      kernel: the axes I first.
      dimension_numbers: as `jax.lax.dot_general` takes them; they can only say what is said here.
      precision, preferred_element_type: as there.
      out_sharding: None; layers pass it.
      multiply: what multiplies matrices, `matrices` or `blas.multiply`.

    Raises:
      ValueError: dimension numbers of another product, or a sharding.
    """
    (of_x, of_kernel), batch = dimension_numbers
    count = len(of_x)
    expected = (*range(x.ndim - count, x.ndim), *range(count))
    if (*of_x, *of_kernel) != expected or any(batch) or out_sharding is not None:
        raise ValueError(f"product contracts x's last axes with the kernel's first ones, not {dimension_numbers}")
    rows, columns = x.shape[: x.ndim - count], kernel.shape[count:]
    inner = math.prod(kernel.shape[:count])
    options = multiply, precision, preferred_element_type
    result = _product(x.reshape(-1, inner), kernel.reshape(inner, -1), *options)
    return checkpoint_name(result, PRODUCT).reshape(*rows, *columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: jax.Array, kernel: jax.Array, multiply: Multiply, precision: Any, dtype: Any) -> jax.Array:
    """(R,I), (I,O) -> (R,O)."""
    return multiply(x, kernel, (1, 0), precision, dtype)


def _product_forward(x: jax.Array, kernel: jax.Array, *options: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel, *options), (x, kernel)


def _product_backward(
    multiply: Multiply, precision: Any, dtype: Any, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del dtype
    (x, kernel), gradient = saved, settled(gradient)
    of_x = multiply(gradient, kernel, (1, 1), precision, gradient.dtype)
    return of_x.astype(x.dtype), multiply(x, gradient, (0, 0), precision, x.dtype).astype(kernel.dtype)


_product.defvjp(_product_forward, _product_backward)


def settled(x: jax.Array) -> jax.Array:
    """x as the CPU's compiler has to write it down once, where it would compute it again in each of its uses."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(qkv: jax.Array, precision: Precision, segments: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over tokens, for each head.

    Args:
      qkv: queries, keys and values (B,N,3,H,d).
      precision: of the products, whose results are float32, as the softmax is.
      segments: (B,N) int: a token sees those of its own number only; None: it sees all.

    Returns:
      (B,N,H,d) in the type of `qkv`.
    """
    q, k, v = _heads_first(qkv)
    weights = _weights(q, k, segments, precision)
    mixed = _einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v, precision)
    # Divided after the product with v, N/d times fewer divisions; on the CPU this also keeps the compiler from fusing
    # the whole into one slow loop.
    return jnp.moveaxis((mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype), 1, 2)


def _attend_forward(
    qkv: jax.Array, precision: Precision, segments: jax.Array | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None, jax.Array]]:
    output = checkpoint_name(attend(qkv, precision, segments), ATTENTION)
    return output, (qkv, segments, output)


def _attend_backward(
    precision: Precision, saved: tuple[jax.Array, jax.Array | None, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    # The CPU's compiler multiplies on one core where the rows of the left matrix are summed over: two of the gradient's
    # five products with the scores' queries first, one with their keys first.
    of_qkv = jax.lax.platform_dependent(
        *(x for x in (*saved, gradient) if x is not None),
        cpu=functools.partial(attention_gradient, precision, keys_first=True),
        default=functools.partial(attention_gradient, precision),
    )
    return settled(of_qkv), None


def attention_gradient(precision: Precision, qkv: jax.Array, *rest: jax.Array, keys_first: bool = False) -> jax.Array:
    """As in FlashAttention (Dao et al., arXiv 2205.14135, section B.2): the weights w again, the output not.

    With o = w v / z and z the sum of w over keys, the gradient of a score is w (g v^T - (g . o)) / z.

    Args:
      precision: of the products.
      qkv: as `attend` got them.
      *rest: its segments if it got some, its output o, and the output's gradient g (B,N,H,d).
      keys_first: whether scores lie as (B,H,N of keys,N of queries) meanwhile. It changes how they are added up alone.

    Returns:
      The gradient of `qkv`.
    """
    *segments, output, gradient = rest
    q, k, v = _heads_first(qkv)
    scores, over_keys = ("bhkq", 2) if keys_first else ("bhqk", 3)
    weights = _weights(q, k, segments[0] if segments else None, precision, keys_first)
    gradient, output = (jnp.moveaxis(x, 2, 1).astype(jnp.float32) for x in (gradient, output))
    gradient = gradient / weights.sum(axis=over_keys)[..., None]
    along_output = jnp.expand_dims((gradient * output).sum(axis=-1), over_keys)
    gradient = gradient.astype(v.dtype)
    of_v = _einsum(f"{scores},bhqd->bhkd", weights.astype(v.dtype), gradient, precision)
    of_weights = _of_pairs(gradient, v, precision, keys_first) - along_output
    of_scores = (weights * of_weights * q.shape[-1] ** -0.5).astype(v.dtype)
    of_q = _einsum(f"{scores},bhkd->bhqd", of_scores, k, precision)
    of_k = _einsum(f"{scores},bhqd->bhkd", of_scores, q, precision)
    return jnp.stack([jnp.moveaxis(x.astype(qkv.dtype), 1, 2) for x in (of_q, of_k, of_v)], axis=2)


attend.defvjp(_attend_forward, _attend_backward)


def _heads_first(qkv: jax.Array) -> tuple[jax.Array, ...]:
    """(B,N,3,H,d) -> q, k and v, (B,H,N,d) each."""
    return tuple(jnp.moveaxis(qkv, (2, 3), (0, 2)))


def _weights(
    q: jax.Array, k: jax.Array, segments: jax.Array | None, precision: Precision, keys_first: bool = False
) -> jax.Array:
    """Softmax before its division, float32: 1 at the largest score of a query, 0 at keys of other segments."""
    scores = _of_pairs(q, k, precision, keys_first)
    if segments is not None:
        seen = segments[:, None, :, None] == segments[:, None, None, :]  # (B,1,N,N)
        scores = jnp.where(seen, scores, -jnp.inf)  # a token sees itself, so the largest score is finite
    return jnp.exp((scores - scores.max(axis=2 if keys_first else 3, keepdims=True)) * q.shape[-1] ** -0.5)


def _of_pairs(q: jax.Array, k: jax.Array, precision: Precision, keys_first: bool) -> jax.Array:
    """Products of every query with every key, (B,H,N,N) float32: a row a query, or with `keys_first` a row a key."""
    if keys_first:
        return _einsum("bhkd,bhqd->bhkq", k, q, precision)
    return _einsum("bhqd,bhkd->bhqk", q, k, precision)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array, precision: Precision) -> jax.Array:
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


@jax.custom_vjp
def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm over the last axis without affine part, times 1 + scale, plus shift; all in float32.

    Args:
      x: tokens (B,N,D).
      shift, scale: broadcast to x, (B,1,D) or (B,N,D) float32.

    Returns:
      (B,N,D) float32.
    """
    return _modulated_norm(x, shift, scale)[0]


def _modulated_norm(
    x: jax.Array, shift: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The result, and the two numbers a token that make it: mean and inverse deviation, (B,N,1)."""
    x = x.astype(jnp.float32)
    # They are named for remat policies to keep: their sums are not taken again.
    mean = checkpoint_name(x.mean(axis=-1, keepdims=True), NORM)
    centred = x - mean
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + LAYER_NORM_EPSILON), NORM)
    return centred * inverse * (1 + scale) + shift, (mean, inverse)


def _norm_forward(x: jax.Array, shift: jax.Array, scale: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    result, statistics = _modulated_norm(x, shift, scale)
    return result, (x, shift, scale, *statistics)


def _norm_backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    """With n the normed x and g the gradient times 1 + scale: (g - mean(g) - n mean(g n)) / deviation."""
    x, shift, scale, mean, inverse = saved
    normed = (x.astype(jnp.float32) - mean) * inverse
    of_normed = gradient * (1 + scale)
    along = of_normed.mean(axis=-1, keepdims=True), (of_normed * normed).mean(axis=-1, keepdims=True)
    of_x = inverse * (of_normed - along[0] - normed * along[1])
    return of_x.astype(x.dtype), _summed(gradient, shift), _summed(gradient * normed, scale)


def _summed(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """The gradient of what was broadcast: summed over the axes along which it has one entry."""
    axes = tuple(axis for axis, size in enumerate(like.shape) if size == 1 != gradient.shape[axis])
    return gradient.sum(axis=axes, keepdims=True).astype(like.dtype)


modulated_norm.defvjp(_norm_forward, _norm_backward)

_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh approximation, x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2; computed in float32."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jnp.tanh(_SLOPE * (wide + _CUBE * wide**3)))).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return checkpoint_name(gelu(x), GELU), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """By the sigmoid of twice the argument, (1 + tanh) / 2: the compiler does not see that the value's tanh would do,
    which it would write down for both."""
    wide = x.astype(jnp.float32)
    gate = jax.nn.sigmoid(2 * _SLOPE * (wide + _CUBE * wide**3))
    slope = gate + wide * gate * (1 - gate) * (2 * _SLOPE * (1 + 3 * _CUBE * wide**2))
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)
