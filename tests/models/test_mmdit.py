import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sra_jax.models.mmdit import MMDiT, MMDiTConfig
from sra_jax.models.stack import REMAT_POLICIES
from sra_jax.models.transformer import Condition, unpatchify

TINY = MMDiTConfig(
    input_size=8, channels=3, output_channels=5, patch=2, depth=4, width=24, heads=3, context_width=10, context_length=6
)  # fmt: skip
BATCH = 2


def networks(config=TINY):
    """graphdef and parameters in which nothing is zero, so that every part has influence."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(generator.normal(0, 0.1, x.shape), x.dtype), nnx.to_pure_dict(state)
    )  # fmt: skip
    return graphdef, params


def inputs(config=TINY):
    generator = np.random.default_rng(1)
    x = generator.normal(size=(BATCH, config.input_size, config.input_size, config.channels))
    context = generator.normal(size=(BATCH, config.context_length, config.context_width))
    y = {"context": jnp.asarray(context, jnp.float32), "end": jnp.array([2, 4])}
    return jnp.asarray(x, jnp.float32), jnp.array([0.1, 0.9]), y


def one(stack, index):
    graphdef, params = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[index], params))


def plain(model, x, t, y):
    """The network as a loop over blocks: prediction and the image tokens after each."""
    condition = model.condition(t, y)
    tokens, features = (model.context_embedding(y["context"]), model.embed(x)), []
    for block in [one(model.blocks, i) for i in range(model.config.depth - 1)] + [one(model.last_block, 0)]:
        tokens = block(tokens, condition)
        features.append(tokens[1])
    return unpatchify(model.final(tokens[1], Condition(condition)), model.config.patch), features


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_scan_and_stops_equal_a_plain_loop(stop):
    graphdef, params = networks()
    model = nnx.merge(graphdef, params)
    expected, features = plain(model, *inputs())
    prediction, tapped = jax.jit(functools.partial(model, taps=(1, 3, 4)))(*inputs())
    np.testing.assert_allclose(prediction, expected, atol=2e-6)
    for number, tokens in zip((1, 3, 4), tapped, strict=True):
        np.testing.assert_allclose(tokens, features[number - 1], atol=2e-6)
    nothing, (part,) = jax.jit(functools.partial(model, taps=(stop,), stop=stop))(*inputs())
    assert nothing is None
    np.testing.assert_allclose(part, features[stop - 1], atol=2e-6)


def gradient(config):
    graphdef, params = networks(config)

    def loss(params):
        prediction, (early, late) = nnx.merge(graphdef, params)(*inputs(), taps=(2, 4))
        return jnp.square(prediction).mean() + jnp.sin(early).mean() + jnp.cos(late).mean()

    return jax.jit(jax.grad(loss))(params)


@functools.cache
def reference_gradient():
    graphdef, params = networks()

    def loss(params):
        prediction, features = plain(nnx.merge(graphdef, params), *inputs())
        return jnp.square(prediction).mean() + jnp.sin(features[1]).mean() + jnp.cos(features[3]).mean()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize(
    "remat", [pytest.param(name, marks=() if name == "dots" else pytest.mark.slow) for name in REMAT_POLICIES]
)
def test_remat_changes_no_gradient(remat):
    found = gradient(dataclasses.replace(TINY, remat=remat))
    for expected, actual in zip(jax.tree.leaves(reference_gradient()), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max() + 1e-9)


def test_bfloat16_products_stay_close():
    graphdef, params = networks()
    low, _ = networks(dataclasses.replace(TINY, dtype=jnp.bfloat16))
    exact, _ = jax.jit(nnx.merge(graphdef, params))(*inputs())
    rounded, (tokens,) = jax.jit(functools.partial(nnx.merge(low, params), taps=(4,)))(*inputs())
    assert rounded.dtype == tokens.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def test_the_end_of_a_caption_is_read_only_where_it_is_pooled():
    x, t, y = inputs()
    elsewhere = {**y, "end": y["end"] + 1}
    for pooled in (False, True):
        graphdef, params = networks(dataclasses.replace(TINY, pooled=pooled))
        model = nnx.merge(graphdef, params)
        assert np.array_equal(model(x, t, y)[0], model(x, t, elsewhere)[0]) is not pooled


def test_every_token_of_a_caption_is_read():
    graphdef, params = networks()
    model = nnx.merge(graphdef, params)
    x, t, y = inputs()
    before, _ = model(x, t, y)
    for place in range(TINY.context_length):
        changed, _ = model(x, t, {**y, "context": y["context"].at[:, place].add(1.0)})
        assert np.abs(changed - before).max() > 1e-5


def test_initialisation_as_pytorchs():
    """U(-1, 1) / sqrt(inputs) for every kernel and bias: the largest lies just below, the spread is a uniform's."""
    config = dataclasses.replace(TINY, width=96, depth=3)
    params = jax.jit(lambda key: nnx.to_pure_dict(nnx.split(MMDiT(config, rngs=nnx.Rngs(key)))[1]))(jax.random.key(0))
    fans = {"patch_embedding": 12, "time_embedding/hidden": 256, "context_embedding": 10, "mlp/out": 4 * 96}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert len(leaves) > 30
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bound = next((inputs for part, inputs in fans.items() if part in name), 96) ** -0.5
        assert np.abs(leaf).max() <= bound
        if leaf.size > 4000:
            assert np.abs(leaf).max() > 0.99 * bound, name
            assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.03), name
    kernels = params["blocks"]["text"]["attention"]["qkv"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])


def test_initialisation_as_dits():
    config = dataclasses.replace(TINY, initialisation="adaln_zero")
    prediction, _ = jax.jit(lambda key: MMDiT(config, rngs=nnx.Rngs(key))(*inputs()))(jax.random.key(0))
    np.testing.assert_array_equal(prediction, 0)


def test_compiled_size_does_not_grow_with_depth():
    def operations(depth):
        graphdef, params = networks(dataclasses.replace(TINY, depth=depth))
        lowered = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p)(*inputs())[0].sum())).lower(params)
        return lowered.as_text().count("\n")

    assert operations(3) == operations(9)


@pytest.mark.parametrize(("taps", "stop"), [((0,), None), ((5,), None), ((3, 2), None), ((2, 2), None), ((3,), 2)])
def test_taps_out_of_range(taps, stop):
    graphdef, params = networks()
    with pytest.raises(ValueError, match="taps"):
        nnx.merge(graphdef, params)(*inputs(), taps=taps, stop=stop)
