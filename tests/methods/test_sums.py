"""Methods in sums: what may be added, one pass for all, and that each adds what it adds alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax import config as config_lib
from sra_jax.errors import UserError
from sra_jax.methods.method import Seen
from sra_jax.methods.registry import METHODS, Methods, names_of
from sra_jax.runs.state import Networks
from sra_jax.training.step import draw, summed, total_loss

BATCH = 4
TEACHING = [name for name in METHODS if METHODS[name]().teacher_taps]
ALONE = ("repa_conv",)  # beside repa it is refused; in the sums below repa stands for both
OTHERS = [name for name in METHODS if name not in (*TEACHING, *ALONE)]


def recipe(name):
    """A network of three blocks with a method or a sum, all of whose blocks and widths fit."""
    config = config_lib.default()
    config.data.update(image_size=4, channels=2, num_classes=3)
    config.model.update(patch=2, depth=3, width=8, heads=2)
    config.batch_size, config.steps = BATCH, 1
    blocks = {"student_block": 1, "teacher_block": 2, "target_block": 3, "block": 2}
    small = {"hidden": 8, "widths": (5,), "group": 2}
    for keys in (config.alignment, *(config.method[method] for method in METHODS if method != "sra")):
        keys.update({key: value for key, value in (blocks | small).items() if key in keys})
    config.method.name = name
    config_lib.check(config, 1)
    return config


def allowed_pairs():
    pairs = []
    for pair in itertools.combinations(METHODS, 2):
        try:
            recipe("+".join(pair))
        except UserError:
            continue
        pairs.append("+".join(pair))
    return pairs


@functools.cache
def setting(name):
    """The methods of a sum, its networks and process, and a batch that they drew."""
    config = recipe(name)
    methods, networks, process = config_lib.methods_of(config), Networks(config), config_lib.process_of(config)
    batch = {"label": jnp.arange(BATCH) % 3}
    x0 = jax.random.normal(jax.random.key(1), (BATCH, 4, 4, 2))
    example = draw(jax.random.key(2), x0, batch, process, methods, networks.shape, label_dropout=0.3)
    return methods, networks, process, example


def test_what_cannot_be_summed_is_exactly_what_decides_the_same_thing():
    refused = {frozenset(pair) for pair in itertools.combinations(METHODS, 2)}
    refused -= {frozenset(pair.split("+")) for pair in allowed_pairs()}
    assert refused == {frozenset(pair) for pair in itertools.combinations(TEACHING, 2)} | {
        frozenset(("repa", "repa_conv"))
    }


EVERY = 7
"""Of so many pairs one is in the quick suite."""


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=[pytest.mark.slow] * bool(i % EVERY)) for i, pair in enumerate(allowed_pairs())],
)  # fmt: skip
def test_each_pulls_the_tokens_as_it_does_alone(pair):
    """The gradients of a sum in what the networks made and in the heads are the sums of the gradients."""
    methods, networks, process, example = setting(pair)
    shape, tokens = networks.shape, (BATCH, networks.shape.tokens, networks.shape.width)
    rng = np.random.default_rng(0)

    def normal(*size):
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    made = {
        "student": {tap: normal(*tokens) for tap in methods.student_taps},
        "prediction": normal(BATCH, shape.input_size, shape.input_size, shape.output_channels),
    }  # fmt: skip
    taught = {tap: normal(*tokens) for tap in methods.teacher_taps}
    params = networks.init(jax.random.key(0))
    heads = {name: tree for name, tree in params.items() if name != "model"}

    def gradient(*parts):
        def loss(made, heads):
            seen = Seen(
                example, made["student"], taught, made["prediction"], example["t"][:, 0] if example["t"].ndim > 1
                else example["t"], process, shape, lambda name, x: networks.head(heads, name)(x),
            )  # fmt: skip
            return summed(seen, {part.name: part.weight_at(jnp.int32(0)) for part in parts}, Methods(parts))[0]

        return jax.grad(loss, argnums=(0, 1))(made, heads)

    one, other = methods
    both, none = gradient(one, other), gradient()
    expected = jax.tree.map(lambda a, b, c: a + b - c, gradient(one), gradient(other), none)
    for found, wanted in zip(jax.tree.leaves(both), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * max(float(np.abs(wanted).max()), 1e-3))


@pytest.mark.slow
@pytest.mark.parametrize("pair", allowed_pairs())
def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients(pair):
    """In every parameter, through the networks. A method that gives tokens their times is there with the weight 0 where
    it is not added, for the others' terms are of its times."""
    methods, networks, process, example = setting(pair)
    params, teacher = random_params(networks, 0), random_params(networks, 1)
    timed = any(part.groups > 1 for part in methods)

    def gradient(*names):
        parts = methods if timed else Methods(tuple(part for part in methods if part.name in names))
        weights = {part.name: part.weight_at(jnp.int32(0)) * (part.name in names) for part in parts}

        def loss(params):
            return total_loss(params, teacher, example, weights, networks=networks, process=process, methods=parts)[0]

        return jax.jit(jax.grad(loss))(params)

    one, other = pair.split("+")
    expected = jax.tree.map(lambda a, b, c: a + b - c, gradient(one), gradient(other), gradient())
    for found, wanted in zip(jax.tree.leaves(gradient(one, other)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4 * max(float(np.abs(wanted).max()), 1e-3))


def random_params(networks, seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)


@functools.cache
def loops(name):
    """Loops over blocks in the program of a loss and its gradient."""
    methods, networks, process, example = setting(name)
    params = jax.eval_shape(networks.init, jax.random.key(0))

    def loss(params, teacher):
        weights = methods.weights_at(jnp.int32(0))
        return total_loss(params, teacher, example, weights, networks=networks, process=process, methods=methods)[0]

    return jax.jit(jax.value_and_grad(loss)).lower(params, params).as_text().count("stablehlo.while")


def test_one_pass_of_the_student_and_one_of_the_teacher_whatever_the_sum():
    others = "+".join(OTHERS)
    assert loops(others) == loops("none")
    for name in TEACHING:
        assert loops(name) > loops("none")
        assert loops(f"{name}+{others}") == loops(name)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", ()), ("sra", ("sra",)), ("dispersive+sra", ("sra", "dispersive")),
        (" layersync + self_flow ", ("self_flow", "layersync")),
    ],
)  # fmt: skip
def test_names(text, names):
    assert names_of(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is unknown"), ("SRA", "'SRA' is unknown; allowed: none, self_flow"), ("sra+", "'' is unknown"),
        ("sra+sra", "each method once"), ("none+sra", "'none' stands alone"), ("none+none", "each method once"),
        ("sra,dispersive", "'sra,dispersive' is unknown"),
    ],
)  # fmt: skip
def test_names_that_are_none(text, message):
    with pytest.raises(UserError, match=message) as raised:
        names_of(text)
    assert "\n" not in str(raised.value)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        *((name, {"weight": weight}, "weight=") for name in METHODS for weight in (-1.0, NAN, INF)),
        *((name, {"student_block": block}, "student_block=") for name in (*TEACHING, "layersync", "sra2", "repa")
          for block in (0, 4)),
        *((name, {"teacher_block": 4}, "teacher_block=4 is beyond model.depth=3") for name in TEACHING),
        *((name, {"student_block": 3}, "is before") for name in TEACHING),
        ("layersync", {"target_block": 1}, "own block"),
        ("layersync", {"target_block": 4}, "target_block=4"),
        ("dispersive", {"block": 0}, "block=0"),
        ("dispersive", {"temperature": 0.0}, "temperature=0.0"),
        ("dispersive", {"group": 1}, "at least 2"),
        ("dispersive", {"group": 3}, "does not divide batch_size=4"),
        ("delta_fm", {"weight": 1.0}, "no minimum"),
        ("delta_fm", {"negatives": "same"}, "allowed: any, other_label"),
        ("self_flow", {"share": 1.5}, "share=1.5"),
        ("self_flow", {"share": NAN}, "share="),
        ("dts_as", {"ratios": ()}, "ratios is empty"),
        ("dts_as", {"ratios": (0.5, -0.5)}, "ratios="),
        ("dts_as", {"ratios": (1e-9, 1.0)}, "without any of the 4 tokens"),
        ("dts_as", {"teacher_mask": False}, "only teacher_time=self_flow gives"),
        ("dts_as", {"teacher_time": "later"}, "allowed: sra, self_flow, same"),
        ("dts_as", {"whole_share": 1.1}, "whole_share=1.1"),
        ("dts_as", {"whole_share": 0.5, "ratios": (0.5, 0.25, 0.25)}, "is for two groups, not for 3"),
        ("dts_as", {"distance": "cos"}, "'cos' is unknown"),
        ("sra2", {"beta": 0.0}, "beta=0.0"),
        ("sra2", {"hidden": 0}, "hidden=0"),
        ("sra2", {"standardise": "all"}, "allowed: none, target, both"),
        ("repa", {"widths": ()}, "widths is empty"),
        ("repa", {"hidden": 0}, "hidden=0"),
        ("repa_conv", {"kernel": 2}, "kernel=2 must be odd"),
        ("repa_conv", {"alpha": 1.5}, "alpha=1.5"),
        ("repa_conv", {"projection": "conv"}, "allowed: convolution, layers"),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused_in_one_line(name, keys, message):
    config = recipe(name)
    (config.alignment if name == "sra" else config.method[name]).update(keys)
    with pytest.raises(UserError, match=message) as raised:
        config_lib.check(config, 1)
    assert "\n" not in str(raised.value)
