"""Gradients that are written out against those that automatic differentiation derives from the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax.models import operations

HIGHEST = jax.lax.Precision.HIGHEST


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain_attention(qkv, precision):
    q, k, v = jnp.moveaxis(qkv, 2, 0)  # (B,N,H,d)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v, precision=precision)


def assert_equal_with_gradients(ours, plain, *inputs, tolerance=1e-5):
    """Values and gradients under a random cotangent agree, relative to the largest entry of each."""
    expected, expected_vjp = jax.vjp(plain, *inputs)
    result, vjp = jax.vjp(ours, *inputs)
    cotangent = normal(99, *expected.shape, dtype=expected.dtype)
    pairs = [(result, expected), *zip(vjp(cotangent), expected_vjp(cotangent), strict=True)]
    for got, wanted in pairs:
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("shape", [(2, 16, 3, 4, 8), (1, 9, 3, 1, 5), (3, 1, 3, 2, 4)])
@pytest.mark.parametrize("compiled", [False, True])
def test_attention(shape, compiled):
    def ours(qkv):
        return operations.attend(qkv, HIGHEST)

    assert_equal_with_gradients(
        jax.jit(ours) if compiled else ours, lambda qkv: plain_attention(qkv, HIGHEST), normal(0, *shape)
    )


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("keys_first", [False, True])
def test_attention_s_gradient_in_either_order_of_the_scores(keys_first, segmented):
    """The CPU takes one order and other devices the other, so that only one of them runs in a network here."""
    qkv = normal(3, 2, 9, 3, 4, 5)
    segments = jnp.asarray(np.random.default_rng(4).integers(0, 3, (2, 9)), jnp.int32)
    output, vjp = jax.vjp(lambda x: masked_attention(x, segments) if segmented else plain_attention(x, HIGHEST), qkv)
    gradient = normal(5, *output.shape)
    given = (segments, output, gradient) if segmented else (output, gradient)
    found = operations.attention_gradient(HIGHEST, qkv, *given, keys_first=keys_first)
    np.testing.assert_allclose(found, vjp(gradient)[0], rtol=0, atol=1e-5)


def test_attention_of_large_scores_stays_finite():
    """Scores of several thousand: the softmax is one-hot, and neither it nor its gradient overflows."""
    qkv = normal(1, 2, 8, 3, 2, 4) * jnp.array([100.0, 100.0, 1.0])[:, None, None]
    gradient = jax.grad(lambda x: operations.attend(x, HIGHEST).sum())(qkv)
    assert np.isfinite(gradient).all()
    assert_equal_with_gradients(
        lambda x: operations.attend(x, HIGHEST), lambda x: plain_attention(x, HIGHEST), qkv, tolerance=1e-4
    )


def test_attention_in_bfloat16_keeps_its_type_and_float32_sums():
    qkv = normal(2, 2, 64, 3, 2, 16, dtype=jnp.bfloat16)
    exact = plain_attention(qkv.astype(jnp.float32), HIGHEST)
    result, vjp = jax.vjp(lambda x: operations.attend(x, jax.lax.Precision.DEFAULT), qkv)
    (gradient,) = vjp(jnp.ones_like(result))
    assert result.dtype == gradient.dtype == jnp.bfloat16
    # two roundings to 8 bits: the weights', whose errors average out over 64 keys, and the result's
    np.testing.assert_allclose(result.astype(jnp.float32), exact, atol=2**-7)


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [((2, 5), (6,), (7,)), ((2, 5), (6,), (3, 2, 4)), ((2, 5), (2, 4), (6,)), ((4,), (3,), (5,))],
)  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
def test_product_is_dot_general(rows, inner, columns, compiled):
    x, kernel = normal(3, *rows, *inner), normal(4, *inner, *columns)
    count = len(inner)
    numbers = ((tuple(range(-count, 0)), tuple(range(count))), ((), ()))
    positive = ((tuple(range(x.ndim - count, x.ndim)), tuple(range(count))), ((), ()))

    def ours(x, kernel):
        return operations.product(x, kernel, positive, HIGHEST)

    def plain(x, kernel):
        return jnp.tensordot(x, kernel, axes=numbers[0], precision=HIGHEST)

    assert_equal_with_gradients(jax.jit(ours) if compiled else ours, plain, x, kernel)


@pytest.mark.parametrize("numbers", [(((0,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((2,), (1,)), ((0,), (0,)))])
def test_product_refuses_what_is_no_layer(numbers):
    with pytest.raises(ValueError, match="last axes"):
        operations.product(normal(0, 4, 4, 4), normal(1, 4, 4, 4), numbers)


def saved_shapes(policy, function, *inputs):
    """Shapes of what `jax.checkpoint` under a policy keeps for the backward pass beside the inputs."""
    kept = jax.eval_shape(lambda *x: jax.vjp(jax.checkpoint(function, policy=policy), *x)[1], *inputs)
    return sorted(leaf.shape for leaf in jax.tree.leaves(kept))


def test_dots_keeps_products_and_attention_but_no_scores():
    from sra_jax.models.stack import REMAT_POLICIES

    batch, tokens, heads, width = 3, 16, 4, 32

    def layer(x, kernel):
        qkv = operations.product(x, kernel, (((2,), (0,)), ((), ())), HIGHEST)
        return jnp.sin(operations.attend(qkv.reshape(batch, tokens, 3, heads, width // heads), HIGHEST)).sum()

    inputs = normal(5, batch, tokens, width), normal(6, width, 3 * width)
    for policy, scores, products in (("dots", 0, 1), ("block", 0, 0)):
        kept = saved_shapes(REMAT_POLICIES[policy], layer, *inputs)
        assert sum(shape == (batch, heads, tokens, tokens) for shape in kept) == scores
        assert sum(np.prod(shape) == batch * tokens * 3 * width and shape[0] != width for shape in kept) == products
        assert sum(shape == (batch, tokens, heads, width // heads) for shape in kept) == products


def masked_attention(qkv, segments):
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=HIGHEST) / np.sqrt(q.shape[-1])
    seen = (segments[:, :, None] == segments[:, None, :])[:, None]
    weights = jax.nn.softmax(scores, axis=-1, where=seen)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=HIGHEST)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_attention_within_segments(count):
    """Each token sees its own segment only; with as many segments as tokens, itself."""
    qkv = normal(7, 3, 9, 3, 2, 4)
    segments = jnp.asarray(np.random.default_rng(8).permuted(np.tile(np.arange(9) % count, (3, 1)), axis=1))
    assert_equal_with_gradients(
        lambda x: operations.attend(x, HIGHEST, segments), lambda x: masked_attention(x, segments), qkv
    )
    if count == 9:
        np.testing.assert_allclose(operations.attend(qkv, HIGHEST, segments), qkv[:, :, 2], atol=1e-6)


def test_a_large_score_of_another_segment_has_no_say():
    """Its softmax would leave nothing to the token's own segment."""
    qkv = normal(9, 1, 4, 3, 1, 4).at[0, 3].multiply(1e3)
    segments = jnp.array([[0, 0, 0, 1]])
    within = operations.attend(qkv, HIGHEST, segments)
    np.testing.assert_allclose(within[:, :3], operations.attend(qkv[:, :3], HIGHEST), atol=1e-6)
    assert np.isfinite(within).all()


def plain_norm(x, shift, scale):
    return jax.nn.standardize(x, epsilon=1e-6) * (1 + scale) + shift


@pytest.mark.parametrize("condition", [(3, 1, 12), (3, 5, 12), (1, 1, 12)])
@pytest.mark.parametrize("compiled", [False, True])
def test_modulated_norm(condition, compiled):
    """Of one condition an example, one a token, one for all."""
    x, shift, scale = 1 + 2 * normal(11, 3, 5, 12), normal(12, *condition), normal(13, *condition)
    ours = jax.jit(operations.modulated_norm) if compiled else operations.modulated_norm
    assert_equal_with_gradients(ours, plain_norm, x, shift, scale)


def test_a_token_of_equal_channels_has_a_finite_norm():
    x, none = jnp.full((1, 2, 8), 3.0), jnp.zeros((1, 1, 8))
    result, vjp = jax.vjp(lambda x: operations.modulated_norm(x, none, none), x)
    np.testing.assert_allclose(result, 0, atol=1e-3)
    assert np.isfinite(vjp(normal(14, 1, 2, 8))[0]).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_gelu(compiled):
    x = jnp.concatenate([normal(15, 50), jnp.array([-1e4, -20.0, -1.0, 0.0, 1.0, 20.0, 1e4])])
    ours = jax.jit(operations.gelu) if compiled else operations.gelu
    assert_equal_with_gradients(ours, lambda x: jax.nn.gelu(x, approximate=True), x)


def test_gelu_in_bfloat16_is_rounded_once():
    x = normal(16, 4096, dtype=jnp.bfloat16)
    exact, exact_vjp = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), x.astype(jnp.float32))
    result, vjp = jax.vjp(operations.gelu, x)
    for got, expected in ((result, exact), (vjp(jnp.ones_like(x))[0], exact_vjp(jnp.ones_like(exact))[0])):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


def test_what_policies_keep_of_a_block():
    """Two numbers a token for a norm with `gelu` and `dots`, the GELU with `gelu` alone."""
    from sra_jax.models.stack import REMAT_POLICIES

    batch, tokens, width, hidden = 3, 16, 8, 32

    def layer(x, kernel):
        none = jnp.zeros((batch, 1, width))
        normed = operations.modulated_norm(jnp.sin(x), none, none)
        x = operations.product(normed, kernel, (((2,), (0,)), ((), ())), HIGHEST)
        return jnp.sin(operations.gelu(x)).sum()

    inputs = normal(17, batch, tokens, width), normal(18, width, hidden)
    for policy, wide, statistics in (("gelu", 2, 2), ("dots", 1, 2), ("block", 0, 0)):
        kept = saved_shapes(REMAT_POLICIES[policy], layer, *inputs)
        assert sum(np.prod(shape) == batch * tokens * hidden for shape in kept) == wide
        assert sum(shape == (batch, tokens, 1) for shape in kept) == statistics
