"""MMDiT equals REPA's. The goldens' README.t2i.md explains every array; sizes and names are read from the file."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sra_jax.interop import mmdit as interop
from sra_jax.models.mmdit import INITIALISATIONS, MMDiT, MMDiTConfig
from sra_jax.models.transformer import Condition, patchify, position_table, time_features

TOLERANCE = 1e-5


def close(actual, expected, name="", tolerance=TOLERANCE):
    """Equal to `tolerance` times the largest magnitude of what is expected."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def state_dict(arrays, prefix="sd/"):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def shape_of(tensors, heads, grid, context_length, **others) -> MMDiTConfig:
    """The network that a state dict and the side of its position table describe."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    return MMDiTConfig(
        input_size=grid * patch, channels=channels, patch=patch, width=width, heads=heads,
        output_channels=tensors["final_layer.linear.weight"].shape[0] // patch**2, depth=interop.depth_of(tensors),
        context_width=tensors["context_embedder.weight"].shape[1], context_length=context_length,
        mlp_ratio=tensors["joint_blocks.0.x_block.mlp.fc1.weight"].shape[0] / width,
        pooled="y_embedder" in interop.parts_of(tensors), **others,
    )  # fmt: skip


class Network:
    """A golden network and what it is asked."""

    def __init__(self, tensors, positions, heads, context):
        self.grid = round(positions.shape[1] ** 0.5)
        self.shape = shape_of(tensors, heads, self.grid, context.shape[1])
        self.tensors = tensors
        self.tree = jax.tree.map(jnp.asarray, interop.params_from_pytorch(tensors, heads))
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: MMDiT(self.shape, rngs=nnx.Rngs(0))))
        self.model: MMDiT = nnx.merge(graphdef, self.tree["model"])

    def block(self, number):
        """Block `number`, counted from 1, by itself."""
        stack, index = (
            (self.model.last_block, 0) if number == self.shape.depth else (self.model.blocks, number - 1)
        )
        graphdef, params = nnx.split(stack)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[index], params))

    def multilayer(self, prefix, tokens):
        """SRA's head or a projector of REPA's on tokens, from its own tensors."""
        names = sorted({name.rpartition(".")[0] for name in self.tensors if name.startswith(f"{prefix}.")})
        for i, name in enumerate(names):
            tokens = tokens if i == 0 else jax.nn.silu(tokens)
            kernel = jnp.asarray(self.tensors[f"{name}.weight"].T)
            tokens = jnp.matmul(tokens, kernel, precision="highest") + self.tensors[f"{name}.bias"]
        return tokens


def answers(network, x, t, context, tap):
    """Everything that can be known of one forward pass, by the goldens' names; blocks are run one by one as well."""
    model, shape = network.model, network.shape
    projectors = {name.split(".")[1] for name in network.tensors if name.startswith("projectors.")}
    numbers = tuple(range(1, shape.depth + 1))

    @jax.jit
    def compute(x, t, y):
        prediction, features = model(x, t, y, taps=numbers)
        condition = model.condition(t, y)
        text = model.context_embedding(y["context"])
        found = {
            "cond/t_freq": time_features(t), "cond/t_emb": model.time_embedding(t), "ctx_embed": text,
            "tok/patch": model.patch_embedding(patchify(x, shape.patch)),
            "pos_embed": position_table(shape.width, network.grid)[None], "out/v": jnp.moveaxis(prediction, -1, 1),
        }  # fmt: skip
        found |= {f"feat/x_block_{number}": tokens for number, tokens in enumerate(features, start=1)}
        found |= {f"proj/repa_{i}": network.multilayer(f"projectors.{i}", features[tap - 1]) for i in projectors}
        if "ap_head" in interop.parts_of(network.tensors):
            found |= {f"proj/ap_block_{i}": network.multilayer("ap_head", x) for i, x in enumerate(features, start=1)}
        tokens = (text.astype(jnp.float32), model.embed(x))
        for number in numbers:
            block = network.block(number)
            found |= {f"block{number}/{name}": value for name, value in inside(block, tokens, condition).items()}
            tokens = block(tokens, condition)
            if number < shape.depth:
                found[f"feat/ctx_block_{number}"] = tokens[0]
        return found

    return compute(nhwc(x), jnp.asarray(t), {"context": jnp.asarray(context)})


def inside(block, tokens, condition):
    """The parts of a block, both streams'."""
    streams = {"ctx": (block.text, tokens[0]), "x": (block.image, tokens[1])}
    of = {name: stream.modulations(condition) for name, (stream, _) in streams.items()}
    qkv = {name: stream.project(z, *of[name][:2]) for name, (stream, z) in streams.items()}
    q, k, v = (jnp.concatenate([qkv[name][:, :, i] for name in streams], axis=1) for i in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * q.shape[-1] ** -0.5
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v, precision="highest")
    found, start = {}, 0
    for name, (stream, z) in streams.items():
        own = mixed[:, start : start + z.shape[1]]
        start += z.shape[1]
        found[f"{name}_mod"] = jnp.concatenate(of[name], axis=-1)
        found[f"{name}_qkv"] = qkv[name].reshape(*z.shape[:2], -1)
        found[f"{name}_attn"] = own.reshape(*z.shape[:2], -1)
        if hasattr(stream, "mlp"):
            found[f"{name}_mid"] = stream.add_attention(z, own, of[name][2])
    return found


def compare(arrays, found, ignored):
    """Every array that is not an input is among what was found, and equals it; some there are."""
    results = {key: value for key, value in arrays.items() if not re.match(ignored, key)}
    assert results
    for key, expected in results.items():
        assert key in found, f"nothing computes {key}"
        close(found[key], expected, key)


@pytest.fixture(scope="module")
def forward(golden):
    arrays = golden("mmdit_forward")
    return arrays, json.loads(str(arrays["meta/config"]))


@pytest.fixture(scope="module")
def main(forward):
    arrays, meta = forward
    tensors = state_dict(arrays)
    return Network(tensors, tensors[interop.POSITION_TABLE], meta["num_heads"], arrays["in/context"])


@pytest.fixture(scope="module")
def full(forward):
    """The second network: the class as released."""
    arrays, meta = forward
    if "full" not in meta:
        pytest.skip("this set has no second network")
    own = meta["full"]
    tensors = state_dict(arrays, "full/sd/")
    return Network(tensors, arrays["full/pos_embed"], own["num_heads"], arrays["full/in/context"]), own


def test_mmdit_forward_long_context(forward, main):
    arrays, meta = forward
    found = answers(main, arrays["in/x"], arrays["in/t"], arrays["in/context"], meta["block_s"])
    compare(arrays, found, r"(meta|sd|in|short|full|eps)/")


def test_mmdit_forward_short_context(forward, main):
    arrays, meta = forward
    if "in/context_short" not in arrays:
        pytest.skip("this set has no short context")
    found = answers(main, arrays["in/x"], arrays["in/t"], arrays["in/context_short"], meta["block_s"])
    compare(state_dict(arrays, "short/"), found, r"in/")


def test_mmdit_forward_released_class(forward, full):
    arrays, _ = forward
    network, own = full
    found = answers(network, *(arrays[f"full/in/{name}"] for name in ("x", "t", "context")), own["block_s"])
    compare(state_dict(arrays, "full/"), found, r"(sd|in|crop)/")


def test_mmdit_forward_crop(forward, full):
    """A smaller and not square input takes the centre of the position table."""
    arrays, _ = forward
    network, own = full
    crop = state_dict(arrays, "full/crop/")
    if not crop:
        pytest.skip("this set has no cropped input")
    found = answers(network, crop["x"], arrays["full/in/t"], arrays["full/in/context"], own["block_s"])
    model, x = network.model, nhwc(crop["x"])
    positions = model.embed(x[:1]) - model.patch_embedding(patchify(x[:1], network.shape.patch))
    names = {"v": found["out/v"], "pos": positions} | {
        name.removeprefix("proj/"): value for name, value in found.items() if name.startswith("proj/")
    }
    compare(crop, names, r"x$")


def test_mmdit_forward_layer_norm_epsilon(forward, main):
    """Tokens of tiny variance, where the norm's epsilon decides."""
    arrays, _ = forward
    eps = state_dict(arrays, "eps/")
    if not eps:
        pytest.skip("this set has no probe")
    condition = main.model.condition(jnp.asarray(arrays["in/t"]), {})
    tokens = (jnp.asarray(eps["ctx_small"]), jnp.asarray(eps["x_small"]))
    found = {
        "final_tokens": main.model.final(tokens[1], Condition(condition)),
        "last_x": main.block(main.shape.depth)(tokens, condition)[1],
    }
    for number in range(1, main.shape.depth):
        of_text, of_image = main.block(number)(tokens, condition)
        found |= {f"block{number}_ctx": of_text, f"block{number}_x": of_image}
    compare(eps, found, r"(x|ctx)_small$")


def test_mmdit_forward_stops_early(forward, main):
    arrays, _ = forward
    y = {"context": jnp.asarray(arrays["in/context"])}
    x, t = nhwc(arrays["in/x"]), jnp.asarray(arrays["in/t"])
    stops = [int(key.rpartition("_")[2]) for key in arrays if key.startswith("feat/x_block_")]
    assert stops
    for stop in stops:
        prediction, (tokens,) = jax.jit(functools.partial(main.model, taps=(stop,), stop=stop))(x, t, y)
        assert prediction is None
        close(tokens, arrays[f"feat/x_block_{stop}"])


def test_mmdit_forward_names_round_trip(forward, main):
    """Names, shapes and values, and the number of trainable parameters."""
    _, meta = forward
    tensors = interop.pytorch_from_params(main.tree, main.shape.channels, main.grid)
    expected = {name: value for name, value in main.tensors.items() if not name.startswith("projectors.")}
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, expected[name], atol=1e-7 if name == interop.POSITION_TABLE else 0, rtol=0)
    head = "ap_head" in interop.parts_of(main.tensors)
    assert interop.expected_shapes(main.shape, head) == {name: value.shape for name, value in expected.items()}
    assert sum(x.size for x in jax.tree.leaves(main.tree["model"])) == meta["num_params"]


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_mmdit_forward_new_networks_have_the_same_shapes(forward, main, initialisation):
    arrays, _ = forward
    length = arrays["in/context"].shape[1]
    shape = shape_of(main.tensors, main.shape.heads, main.grid, length, initialisation=initialisation)
    fresh = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: MMDiT(shape, rngs=nnx.Rngs(0))))[1])
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, main.tree["model"])
