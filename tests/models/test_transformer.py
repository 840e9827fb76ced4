import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.common import SIZES
from sra_jax.methods.groups import random_groups
from sra_jax.models import transformer
from sra_jax.models.stack import ANYWHERE, REMAT_POLICIES, Placement
from sra_jax.models.transformer import Condition, Transformer, TransformerConfig, patchify, unpatchify
from sra_jax.planning.compiled import Program

TINY = TransformerConfig(
    input_size=8, channels=3, output_channels=3, num_classes=5, patch=2, depth=4, width=32, heads=4
)  # fmt: skip
BATCH = 2


def networks(config=TINY, seed=0, placement=ANYWHERE):
    """graphdef and parameters in which nothing is zero, so that every part has influence."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), placement=placement)))
    generator = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(generator.normal(0, 0.1, x.shape), x.dtype), nnx.to_pure_dict(state)
    )  # fmt: skip
    return graphdef, params


def inputs(config=TINY, batch=BATCH):
    generator = np.random.default_rng(1)
    x = jnp.asarray(generator.normal(size=(batch, config.input_size, config.input_size, config.channels)), jnp.float32)
    return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % (config.num_classes + 1)


def count(config):
    state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[1]
    return sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(state)))


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_published_parameters(size, millions):
    """DiT, table 1 and 4: S/2 33M, B/2 130M, L/2 458M, XL/2 675M (with the learned variance's channels)."""
    config = TransformerConfig(
        input_size=32, channels=4, output_channels=8, num_classes=1000, patch=2, **SIZES[size]
    )  # fmt: skip
    assert round(count(config) / 1e6) == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_any_patch_and_channels(patch):
    config = TransformerConfig(
        input_size=8, channels=2, output_channels=5, num_classes=3, patch=patch, depth=2, width=16, heads=2
    )  # fmt: skip
    graphdef, params = networks(config)
    prediction, (tokens,) = nnx.merge(graphdef, params)(*inputs(config), taps=(1,))
    assert prediction.shape == (BATCH, 8, 8, 5)
    assert tokens.shape == (BATCH, config.tokens, 16)
    assert np.ptp(prediction) > 0


def test_patches_come_back():
    x, _, _ = inputs()
    np.testing.assert_array_equal(unpatchify(patchify(x, 4), 4), x)
    row, column = patchify(x, 4)[0].reshape(2, 2, 4, 4, 3)[1, 0, 2, 3], x[0, 6, 3]
    np.testing.assert_array_equal(row, column)


def test_initialisation():
    """DiT's: a new network predicts 0; kernels within Xavier's bound, tables and time network N(0, 0.02)."""
    config = TransformerConfig(
        input_size=8, channels=4, output_channels=4, num_classes=100, patch=2, depth=3, width=64, heads=4
    )  # fmt: skip
    model = Transformer(config, rngs=nnx.Rngs(0))
    prediction, _ = model(*inputs(config))
    np.testing.assert_array_equal(prediction, 0)
    blocks = nnx.to_pure_dict(nnx.split(model.blocks)[1])
    for kernel, fans in [
        (blocks["attention"]["qkv"]["kernel"], 64 + 3 * 64),
        (blocks["attention"]["out"]["kernel"], 64 + 64),
        (blocks["mlp"]["hidden"]["kernel"], 64 + 256),
        (model.patch_embedding.kernel[...], 16 + 64),
    ]:
        bound = np.sqrt(6 / fans)
        assert 0.95 * bound < np.abs(kernel).max() <= bound
    assert np.unique(blocks["mlp"]["hidden"]["kernel"][:, 0, 0]).size == 3  # blocks differ
    for table in (model.label_embedding.embedding, model.time_embedding.hidden.kernel, model.time_embedding.out.kernel):
        assert np.std(table[...]) == pytest.approx(0.02, rel=0.1)
    biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(model)[1]))
              if "bias" in jax.tree_util.keystr(path)]  # fmt: skip
    assert biases
    assert all(not np.any(bias) for bias in biases)


def reference(model, params, x, t, y):
    """The network as a plain loop over blocks, with attention written with explicit heads."""
    config = model.config
    condition = model.condition(t, y)
    tokens, features = model.embed(x), []
    for i in range(config.depth):
        block = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in jnp.split(
                condition @ block["modulation"]["kernel"] + block["modulation"]["bias"], 6, axis=-1
            )
        )  # fmt: skip
        normed = jax.nn.standardize(tokens, epsilon=1e-6) * (1 + scale_a) + shift_a
        heads = []
        for h in range(config.heads):
            q, k, v = (
                normed @ block["attention"]["qkv"]["kernel"][:, j, h] + block["attention"]["qkv"]["bias"][j, h]
                for j in range(3)
            )
            weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
            heads.append(weights @ v @ block["attention"]["out"]["kernel"][h])
        tokens += gate_a * (sum(heads) + block["attention"]["out"]["bias"])
        normed = jax.nn.standardize(tokens, epsilon=1e-6) * (1 + scale_m) + shift_m
        hidden = jax.nn.gelu(normed @ block["mlp"]["hidden"]["kernel"] + block["mlp"]["hidden"]["bias"])
        tokens += gate_m * (hidden @ block["mlp"]["out"]["kernel"] + block["mlp"]["out"]["bias"])
        features.append(tokens)
    return unpatchify(model.final(tokens, Condition(condition)), config.patch), features


def test_scan_equals_a_plain_loop():
    graphdef, params = networks()
    model = nnx.merge(graphdef, params)
    expected, features = reference(model, params, *inputs())
    prediction, tapped = model(*inputs(), taps=(1, 3, 4))
    np.testing.assert_allclose(prediction, expected, atol=2e-5)
    for number, tokens in zip((1, 3, 4), tapped, strict=True):
        np.testing.assert_allclose(tokens, features[number - 1], atol=2e-5)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopping_gives_the_same_tokens(stop):
    graphdef, params = networks()
    model = nnx.merge(graphdef, params)
    _, whole = model(*inputs(), taps=(1, stop) if stop > 1 else (1,))
    prediction, part = model(*inputs(), taps=(1, stop) if stop > 1 else (1,), stop=stop)
    assert prediction is None
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_later_blocks_have_no_influence_and_no_cost():
    graphdef, params = networks()

    def stopped(params, stop=2):
        return nnx.merge(graphdef, params)(*inputs(), taps=(stop,), stop=stop)[1][0]

    broken = jax.tree.map(lambda p: p.at[2:].set(jnp.nan), params["blocks"])
    final = jax.tree.map(lambda p: p * jnp.nan, params["final"])
    np.testing.assert_array_equal(stopped(params), stopped({**params, "blocks": broken, "final": final}))

    def loops_and_flops(fun):
        compiled = jax.jit(fun).lower(params).compile()
        counts = [int(n) for n in re.findall(r'"known_trip_count":\{"n":"(\d+)"', compiled.as_text())]
        return counts, compiled.cost_analysis()["flops"]  # of one pass through each loop's body

    cut_loops, cut_flops = loops_and_flops(stopped)
    whole_loops, whole_flops = loops_and_flops(lambda p: nnx.merge(graphdef, p)(*inputs())[0])
    assert (cut_loops, whole_loops) == ([2], [4])
    assert cut_flops < whole_flops


def loss_of(config, placement=ANYWHERE):
    """A loss that every block has a part in, as a function of parameters, and these."""
    graphdef, params = networks(config, placement=placement)

    def loss(params):
        prediction, (tokens,) = nnx.merge(graphdef, params)(*inputs(), taps=(2,))
        return jnp.square(prediction).mean() + jnp.sin(tokens).mean()

    return loss, params


def with_remat(policy):
    return TransformerConfig(**{**vars(TINY), "remat": policy})


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(
    "remat", [pytest.param(name, marks=() if name == "dots" else pytest.mark.slow) for name in REMAT_POLICIES]
)
def test_remat_changes_no_gradient(remat, unrolled):
    loss, params = loss_of(with_remat(remat), Placement(unrolled=unrolled))
    found = jax.jit(jax.grad(loss))(params)
    for expected, actual in zip(jax.tree.leaves(reference_gradient()), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max() + 1e-9)


def test_unrolled_blocks_are_no_loop_and_are_recomputed_as_the_policy_says():
    """Nothing loops; and `block` runs each block's products a second time, which CSE would otherwise undo."""

    def compiled(remat):
        loss, params = loss_of(with_remat(remat), Placement(unrolled=True))
        return jax.jit(jax.grad(loss)).lower(params).compile()

    dots, block = (compiled(remat) for remat in ("dots", "block"))
    assert " while(" not in dots.as_text() and " while(" not in block.as_text()
    tokens, width = BATCH * TINY.tokens, TINY.width
    again = 2 * tokens * width * (4 * width + 4 * width)  # qkv, attention's output, the MLP's first layer
    more = Program(block.as_text()).cost().flops - Program(dots.as_text()).cost().flops
    assert more >= (TINY.depth - 1) * again


def test_unrolled_blocks_stop_and_give_tokens_as_a_loop_does():
    _, params = networks()
    whole, part = (
        [nnx.merge(networks(placement=Placement(unrolled=unrolled))[0], params)(*inputs(), taps=(1, 3), stop=stop)
         for stop in (None, 3)] for unrolled in (False, True)
    )  # fmt: skip
    assert part[1][0] is None
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@functools.cache
def reference_gradient():
    """Gradient through the plain loop."""
    graphdef, params = networks()

    def loss(params):
        prediction, features = reference(nnx.merge(graphdef, params), params, *inputs())
        return jnp.square(prediction).mean() + jnp.sin(features[1]).mean()

    return jax.jit(jax.grad(loss))(params)


def test_bfloat16_products_stay_close():
    graphdef, params = networks()
    low_def, _ = networks(TransformerConfig(**{**vars(TINY), "dtype": jnp.bfloat16}))
    exact, _ = nnx.merge(graphdef, params)(*inputs())
    rounded, (tokens,) = nnx.merge(low_def, params)(*inputs(), taps=(4,))
    assert rounded.dtype == tokens.dtype == jnp.float32
    assert 0 < np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


def test_compiled_size_does_not_grow_with_depth():
    def operations(depth):
        graphdef, params = networks(TransformerConfig(**{**vars(TINY), "depth": depth}))
        lowered = jax.jit(jax.grad(lambda p: nnx.merge(graphdef, p)(*inputs())[0].sum())).lower(params)
        return lowered.as_text().count("\n")

    assert operations(3) == operations(12)


@pytest.mark.parametrize(("taps", "stop"), [((0,), None), ((5,), None), ((3, 2), None), ((2, 2), None), ((3,), 2)])
def test_taps_out_of_range(taps, stop):
    graphdef, params = networks()
    with pytest.raises(ValueError, match="taps"):
        nnx.merge(graphdef, params)(*inputs(), taps=taps, stop=stop)


def test_position_table_against_the_definition():
    """Entry by entry from the definition: sin and cos of column, then of row."""
    width, grid = 16, 3
    table = transformer.position_table(width, grid)
    for row in range(grid):
        for column in range(grid):
            frequency = [10000 ** (-i / 4) for i in range(4)]
            expected = [f(u * w) for u in (column, row) for f in (np.sin, np.cos) for w in frequency]
            np.testing.assert_allclose(table[row * grid + column], expected, atol=1e-7)


def test_groups_of_known_sizes_attend_as_masked_ones_do():
    """Scores within groups alone, or all of them with a mask: prediction, tokens on the way and gradients are equal."""
    graphdef, params = networks()
    x, _, y = inputs()
    sizes = (5, len(x[0].reshape(-1)) // x.shape[-1] // nnx.merge(graphdef, params).config.patch ** 2 - 5)
    draws = jax.random.uniform(jax.random.key(1), (len(x), sum(sizes)))
    groups = random_groups(draws, np.array(sizes))
    t = jax.random.uniform(jax.random.key(2), (len(x), 2))

    def summary(params, sizes):
        prediction, taps = nnx.merge(graphdef, params)(x, t, y, groups=groups, segments=groups, sizes=sizes,
                                                            taps=(1, 3))  # fmt: skip
        return sum(jnp.sin(part).sum() for part in (prediction, *taps)), (prediction, taps)

    run = jax.jit(jax.value_and_grad(summary, has_aux=True), static_argnums=1)
    (_, sorted_result), sorted_gradient = run(params, sizes)
    (_, masked_result), masked_gradient = run(params, None)
    for a, b in zip(jax.tree.leaves(sorted_result), jax.tree.leaves(masked_result), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(jax.tree.leaves(sorted_gradient), jax.tree.leaves(masked_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_groups_are_the_computation_of_every_token_by_itself(count):
    """Times of few groups, of many, and one a token: what a modulation of each token gives, gradients included."""
    graphdef, params = networks()
    x, _, y = inputs()
    tokens = TINY.tokens
    groups = jnp.asarray(np.random.default_rng(5).permuted(np.tile(np.arange(tokens) % count, (len(x), 1)), axis=1))
    t = jax.random.uniform(jax.random.key(3), (len(x), count))
    each = jnp.broadcast_to(jnp.arange(tokens), groups.shape)

    @jax.jit
    def run(params, t, groups):
        def loss(params):
            prediction, (tap,) = nnx.merge(graphdef, params)(x, t, y, groups=groups, taps=(2,))
            return jnp.sin(prediction).sum() + tap.mean(), (prediction, tap)

        return jax.grad(loss, has_aux=True)(params)

    found, expected = run(params, t, groups), run(params, jnp.take_along_axis(t, groups, axis=1), each)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))
