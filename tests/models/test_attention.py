"""Every implementation of attention against the plain one, TPU kernels operation by operation on the CPU; which is
chosen where, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import digits, sit_xl2
from sra_jax import config as config_lib
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.models import attention, operations
from sra_jax.models.mmdit import MMDiT, MMDiTConfig
from sra_jax.models.stack import REMAT_POLICIES, Placement
from sra_jax.models.transformer import Transformer, TransformerConfig
from sra_jax.planning.compiled import Program
from sra_jax.runs.state import Networks

HIGHEST = jax.lax.Precision.HIGHEST
FLASH = functools.partial(attention.flash, interpret=True)
SPLASH = functools.partial(attention.splash, interpret=True)
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-6}
"""Of the largest entry; bfloat16 rounds the weights, the output and, in the backward pass, the scores' gradients."""


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def shuffled(seed, batch, tokens, count):
    """Segments in random order, of unequal sizes."""
    numbers = np.sort(np.random.default_rng(seed).integers(count, size=tokens))
    return jnp.asarray(np.random.default_rng(seed).permuted(np.tile(numbers, (batch, 1)), axis=1), jnp.int32)


def assert_equal_with_gradients(attend, qkv, segments=None):
    """Output and gradient under a random cotangent, against the plain operation on the same numbers in float32."""

    def both(attend, qkv):
        result, vjp = jax.vjp(lambda x: attend(x, HIGHEST, segments), qkv)
        return result, *vjp(normal(9, *result.shape).astype(qkv.dtype).astype(result.dtype))

    expected = jax.jit(functools.partial(both, operations.attend))(qkv.astype(jnp.float32))
    for got, exact in zip(jax.jit(functools.partial(both, attend))(qkv), expected, strict=True):
        assert (got.shape, got.dtype) == (exact.shape, qkv.dtype)
        difference = np.abs(np.asarray(got, np.float64) - np.asarray(exact, np.float64)).max()
        assert difference < TOLERANCE[qkv.dtype.name] * np.abs(exact).max()


@pytest.mark.parametrize(
    ("tokens", "head", "segments", "dtype"),
    [
        (256, 72, 0, "float32"), (256, 64, 0, "bfloat16"), (256, 72, 2, "bfloat16"), (128, 64, 3, "float32"),
        (333, 64, 0, "bfloat16"), (200, 72, 2, "float32"), (16, 24, 0, "float32"),
    ],
)  # fmt: skip
def test_flash_equals_plain(tokens, head, segments, dtype):
    """333 tokens are text and image of an MMDiT; the kernel takes multiples of 128."""
    given = shuffled(1, 2, tokens, segments) if segments else None
    assert_equal_with_gradients(FLASH, normal(0, 2, tokens, 3, 2, head, dtype=dtype), given)


@pytest.mark.parametrize(("tokens", "segments"), [(1101, 0), (1024, 2)])
def test_flash_of_more_queries_than_it_takes_at_a_time(tokens, segments):
    """1,101 tokens are text and image at 512 pixels; their scores are made in parts, forward and backward."""
    given = shuffled(2, 1, tokens, segments) if segments else None
    assert_equal_with_gradients(FLASH, normal(2, 1, tokens, 3, 3, 8), given)


@pytest.mark.parametrize(
    ("tokens", "segments", "dtype"), [(700, 0, "float32"), (200, 2, "float32"), (256, 0, "bfloat16")]
)
def test_splash_equals_plain(tokens, segments, dtype):
    given = shuffled(1, 1, tokens, segments) if segments else None
    assert_equal_with_gradients(SPLASH, normal(0, 1, tokens, 3, 2, 72, dtype=dtype), given)


@pytest.mark.parametrize("attend", [FLASH, SPLASH])
def test_a_large_score_of_another_segment_or_of_padding_has_no_say(attend):
    qkv = normal(3, 1, 20, 3, 1, 8).at[0, 19].multiply(1e3)
    segments = jnp.zeros((1, 20), jnp.int32).at[0, 19].set(1)
    within = attend(qkv, HIGHEST, segments)
    np.testing.assert_allclose(within[:, :19], operations.attend(qkv[:, :19], HIGHEST), atol=1e-5)
    assert np.isfinite(within).all()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA GPUs")
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("tokens", "head", "segments"), [(256, 64, 0), (1024, 72, 0), (256, 72, 2), (333, 64, 3)])
def test_cudnn_equals_plain(tokens, head, segments, apart):
    def attend(qkv, *rest):
        return attention.cudnn(tuple(jnp.moveaxis(qkv, 2, 0)) if apart else qkv, *rest)

    given = shuffled(1, 2, tokens, segments) if segments else None
    assert_equal_with_gradients(attend, normal(0, 2, tokens, 3, 2, head, dtype="bfloat16"), given)


@pytest.mark.parametrize("segmented", [False, True])
def test_each_device_attends_for_its_examples_and_heads(segmented):
    """On a mesh of all three axes: equal to the plain one, and no device asks another for anything."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    qkv, segments = normal(4, 8, 40, 3, 4, 8), shuffled(5, 8, 40, 3) if segmented else None
    split = sharding.split_attention(FLASH, mesh)

    def both(attend, qkv):
        result, vjp = jax.vjp(lambda x: attend(x, HIGHEST, segments), qkv)
        return result, *vjp(jnp.cos(result))

    heads = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"), None, None, "model"))
    compiled = jax.jit(functools.partial(both, split), in_shardings=heads).lower(qkv).compile()
    text = compiled.as_text()
    assert not any(kind in text for kind in ("all-gather", "all-to-all", "all-reduce", "collective-permute"))
    found = compiled(jax.device_put(qkv, heads))
    for got, expected in zip(found, jax.jit(functools.partial(both, operations.attend))(qkv), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("attend", [FLASH, SPLASH])
def test_remat_policies_keep_its_output_and_not_its_scores(attend):
    """With `dots` the kernel of the forward pass does not run again, and nothing of N*N entries is kept."""
    tokens, heads, width = 256, 2, 8
    qkv = normal(6, 1, tokens, 3, heads, width)

    def layer(qkv):
        return jnp.sin(attend(jnp.cos(qkv), HIGHEST))

    def under(policy):
        return jax.checkpoint(layer, policy=REMAT_POLICIES[policy], prevent_cse=False)

    def products(function):
        """Products of all queries with all keys in each of three layers of a compiled gradient."""

        def layers(qkv):
            return jax.lax.scan(lambda x, _: (x + function(x)[:, :, None], None), qkv, length=3)[0].sum()

        text = jax.jit(jax.grad(layers)).lower(qkv).compile().as_text()
        return Program(text).cost().flops / (3 * 2 * heads * tokens**2 * width)

    assert products(layer) == 2 + 5
    assert products(under("dots")) == 2 + 5
    assert products(under("block")) > 2 + 5
    for function in (layer, under("dots")):
        kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(function, x)[1], qkv))  # noqa: B023
        assert max(np.prod(leaf.shape) for leaf in kept) <= qkv.size < heads * tokens**2


TINY = TransformerConfig(
    input_size=8, channels=3, output_channels=3, num_classes=5, patch=2, depth=2, width=24, heads=3
)


class Watched:
    """XLA's own attention, which notes what it is asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, qkv, precision, segments=None):
        q, k, v = qkv if isinstance(qkv, tuple) else jnp.moveaxis(qkv, 2, 0)
        self.asked.append((q.shape[1], segments is not None, isinstance(qkv, tuple)))
        mask = None if segments is None else segments[:, None, :, None] == segments[:, None, None, :]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def random_network(make):
    """A module in which nothing is zero, so that every part has influence."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    generator = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda x: jnp.asarray(generator.normal(0, 0.1, x.shape), x.dtype), nnx.to_pure_dict(state)
    )


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-9)


def assert_attends_as_placed(make, run, asked):
    """A network gives with `Watched` in its placement what it gives with the plain operation, and asks as it should.

    Queries, keys and values come as one array or, where the placement says so, as three; so do their gradients.
    """

    def found(placement):
        graphdef, params = random_network(lambda: make(placement))

        def loss(params):
            given = run(nnx.merge(graphdef, params))
            return sum(jnp.sin(x).sum() for x in jax.tree.leaves(given)), given

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected = found(Placement())
    for apart in (False, True):
        watched = Watched()
        assert_same(found(Placement(attend=watched, apart=apart)), expected)
        assert set(watched.asked) == {(*each, apart) for each in asked}


GROUPS = shuffled(7, 2, TINY.tokens, 2)
SIZES = tuple(int(size) for size in np.bincount(GROUPS[0]))
TIMES = jnp.array([[0.2, 0.9], [0.4, 0.1]])


@pytest.mark.parametrize(
    ("t", "extra", "asked"),
    [
        (TIMES[0], {}, {(16, False)}),
        (TIMES, {"groups": GROUPS}, {(16, False)}),
        (TIMES, {"groups": GROUPS, "segments": GROUPS}, {(16, True)}),
        (TIMES, {"groups": GROUPS, "segments": GROUPS, "sizes": SIZES}, {(size, False) for size in SIZES}),
    ],
    ids=["one time", "two times", "segments", "segments of known sizes"],
)  # fmt: skip
def test_a_transformer_attends_as_its_placement_says(t, extra, asked):
    """Separated attention through segments, or within each where all examples have as many of each."""
    x, y = normal(8, 2, 8, 8, 3), jnp.array([0, 5])
    assert_attends_as_placed(
        lambda placement: Transformer(TINY, rngs=nnx.Rngs(0), placement=placement),
        lambda model: model(x, t, y, taps=(1,), **extra), asked,
    )  # fmt: skip


def test_an_mmdit_attends_as_its_placement_says():
    shape = MMDiTConfig(
        input_size=8, channels=3, output_channels=3, patch=2, depth=2, width=24, heads=3, context_width=10,
        context_length=6,
    )  # fmt: skip
    assert shape.attended == 16 + 6
    x, t = normal(8, 2, 8, 8, 3), jnp.array([0.2, 0.9])
    y = {"context": normal(9, 2, 6, 10), "end": jnp.array([2, 4])}
    assert_attends_as_placed(
        lambda placement: MMDiT(shape, rngs=nnx.Rngs(0), placement=placement),
        lambda model: model(x, t, y, taps=(1, 2)), {(22, False)},
    )  # fmt: skip


def test_a_network_on_a_mesh_attends_as_one_on_a_device():
    """Blocks gathered over `fsdp`, heads split over `model`, the kernel in a scan under remat `dots`."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    config = digits.get_config()
    config.update_from_flattened_dict({
        "model.width": 16, "model.heads": 2, "model.depth": 2, "model.remat": "dots", "alignment.student_block": 1,
        "alignment.teacher_block": 2,
    })  # fmt: skip
    x, t, y = normal(10, 8, 8, 8, 1), jnp.linspace(0, 1, 8), jnp.arange(8)

    def gradient(placement):
        networks = Networks(config, placement)
        _, params = random_network(lambda: Transformer(networks.shape, rngs=nnx.Rngs(0)))

        def loss(params):
            prediction, (tokens,) = networks.model({"model": params})(x, t, y, taps=(1,))
            return jnp.square(prediction).mean() + jnp.sin(tokens).mean()

        return jax.jit(jax.grad(loss))(params)

    on_mesh = sharding.placement(mesh, jnp.float32, sharding.split_attention(FLASH, mesh))
    assert_same(gradient(on_mesh), gradient(Placement()))


def case(platform, dtype="bfloat16", head=72, tokens=256):
    return attention.Case(platform, jnp.dtype(dtype), head, tokens)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (case("cpu"), "plain"), (case("cpu", tokens=4096), "plain"), (case("cuda"), "cudnn"),
        (case("cuda", head=64, tokens=333), "cudnn"), (case("cuda", dtype="float32"), "plain"),
        (case("cuda", head=60), "plain"), (case("cuda before Ampere"), "plain"), (case("rocm"), "plain"),
        (case("tpu"), "flash"), (case("tpu", dtype="float32", tokens=1024), "flash"),
        (case("tpu", tokens=4096), "splash"), (case("tpu", tokens=4096, dtype="float32"), "plain"),
        (case("tpu", tokens=64), "plain"),
    ],
)  # fmt: skip
def test_what_auto_chooses(given, expected):
    assert attention.chosen("auto", given) == expected
    assert attention.chosen(expected, given) == expected
    assert attention.chosen("plain", given) == "plain"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cudnn", case("cpu"), "runs on NVIDIA GPUs of the Ampere generation or newer, and this is cpu"),
        ("cudnn", case("cuda before Ampere"), "this is cuda before Ampere"),
        ("cudnn", case("cuda", dtype="float32"), "computes in 16 bits, and dtype=float32"),
        ("cudnn", case("cuda", head=60), "these have 60"),
        ("splash", case("cuda"), "runs on TPUs, and this is cuda"),
        ("splash", case("tpu", dtype="float32"), "dtype=float32"),
        ("splash", case("tpu", head=512), "these have 512"),
        ("flash", case("cpu"), "runs on TPUs, and this is cpu"),
        ("flash", case("tpu", tokens=4096), "takes at most 2048 tokens, and there are 4096"),
        ("pallas", case("tpu"), "allowed: auto, cudnn, flash, splash, plain"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(name, given, message):
    with pytest.raises(UserError, match=message) as refused:
        attention.chosen(name, given)
    assert "\n" not in str(refused.value)


def test_a_config_is_checked_before_any_work():
    """What no device can do, without knowing the devices; what these devices cannot do, with them."""
    config = sit_xl2.get_config()
    config.model.attention = "splash"
    config_lib.check(config)
    config_lib.check(config, platform="tpu")
    with pytest.raises(UserError, match=r"model\.attention=splash runs on TPUs, and this is cpu; use auto"):
        config_lib.check(config, platform="cpu")
    config.dtype = "float32"
    with pytest.raises(UserError, match="computes in bfloat16"):
        config_lib.check(config)


def test_auto_on_a_cpu_is_the_plain_operation_itself():
    """So that its program is the same one, on one device and on eight."""
    shape = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    for size in (1, 8):
        mesh = sharding.make_mesh({"data": size, "fsdp": 1, "model": 1}, jax.devices()[:size])
        assert sharding.attention_on(mesh, "auto", shape) is operations.attend
