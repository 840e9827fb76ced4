"""Self-Flow: the network as its authors released it, the loss by the paper's formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax import config as config_lib
from sra_jax.interop.families import from_original_sit
from sra_jax.methods import distances
from sra_jax.methods.groups import position_times, token_times
from sra_jax.methods.self_flow import HEAD
from sra_jax.models.transformer import patchify
from sra_jax.runs.state import Networks
from sra_jax.training.step import look, summed
from tests.parity.goldens import EitherTime, Golden, close, nchw, nhwc, with_gradients

REVERSED = {"net": False, "official": True}
"""What of the network the file's arrays are of: the bare one, or the whole, which feeds it 1 - t and turns the sign."""


@pytest.fixture(scope="module")
def file(golden):
    return Golden(golden("self_flow"), {f"projector.linear{i + 1}": (HEAD, part) for i, part in
                                        enumerate(("hidden", "out"))})  # fmt: skip


def packed(x, shape):
    """Latents (B,H,W,C) as the official model takes them: tokens (B,N,C*p*p), a channel's entries in a row."""
    tokens = patchify(x, shape.patch)
    by_channel = tokens.reshape(*tokens.shape[:2], -1, x.shape[-1]).swapaxes(-1, -2)
    return by_channel.reshape(tokens.shape)


@pytest.fixture(scope="module")
def forward(file):
    """`forward(params, t, reverse)`: everything of one pass over `fwd/x`, times (B,) or one a token (B,N)."""
    networks = Networks(file.recipe("self_flow"))
    shape, blocks = networks.shape, tuple(range(1, networks.shape.depth + 1))

    @jax.jit
    def run(params, t, reverse):
        x, y = nhwc(file.arrays["fwd/x"]), jnp.asarray(file.arrays["fwd/y"])
        groups = None if t.ndim == 1 else jnp.broadcast_to(jnp.arange(shape.tokens), t.shape)
        v, taps = EitherTime(networks, reverse).model(params)(x, t, y, groups=groups, taps=blocks)
        found = {"v": nchw(v), "v_tokens": packed(v, shape)}
        for block, tokens in zip(blocks, taps, strict=True):
            found |= {f"feat/block_{block}": tokens, f"proj/block_{block}": networks.head(params, HEAD)(tokens)}
        return found

    return shape, run


TIMES = {"per_token": "token_t", "one_time": "t"}
"""The file's forward passes and their times."""


def test_self_flow_network(file, forward):
    shape, run = forward
    if "fwd/x_tokens" in file.arrays:
        close(packed(nhwc(file.arrays["fwd/x"]), shape), file.arrays["fwd/x_tokens"])
    passes = 0
    for convention in set(REVERSED).intersection(file.names("fwd/")):
        for times in file.names(f"fwd/{convention}/"):
            found = run(file.tree(), jnp.asarray(file.arrays[f"fwd/{TIMES[times]}"]), REVERSED[convention])
            file.compare(f"fwd/{convention}/{times}/", found)
            passes += 1
    assert passes


def test_self_flow_checkpoints(file, forward):
    """Twice the output channels, and the released network's time, folded into the weights."""
    final = file.below("learn_sigma/")
    if "v_tokens" not in final:
        pytest.skip("the file has no such output")
    del final["v_tokens"]
    shape, run = forward
    theirs = dataclasses.replace(shape, output_channels=len(final["final_layer.linear.bias"]) // shape.patch**2)
    folded = {name: from_original_sit(name, x, theirs) for name, x in (file.below("sd/") | final).items()}
    found = run(file.tree(changes=folded), jnp.asarray(file.arrays["fwd/token_t"]), False)
    file.compare("learn_sigma/", found, given=final)


@pytest.mark.parametrize("part", ["draws", "losses"])
def test_self_flow_runs(file, part):
    for name, settings in file.meta["runs"].items():
        config = file.recipe(
            "self_flow", student_block=settings["student_block"], teacher_block=settings["teacher_block"],
            weight=settings["gamma"], share=settings["mask_ratio"],
        )  # fmt: skip
        stored = file.below(f"{name}/")
        t, s = jnp.asarray(stored["t"]), jnp.asarray(stored["s"])
        u = jnp.asarray(stored["u"] if "u" in stored else 1.0 - stored["mask"])
        (method,) = config_lib.methods_of(config)
        example = file.example() | method.arranged(t, s, u)
        (draws if part == "draws" else losses)(file, name, config, example)


def draws(file, name, config, example):
    process, shape = config_lib.process_of(config), Networks(config).shape
    tau = token_times(example["t"], example["groups"])
    of_position = position_times(example["t"], example["groups"], shape)
    found = {
        "mask": example["groups"], "tau": tau, "tau_min": example["s"],
        "x_tau": nchw(process.perturb(example["x0"], example["e"], of_position)),
        "x_tau_min": nchw(process.perturb(example["x0"], example["e"], example["s"])),
    }  # fmt: skip
    if found.keys() & file.names(f"{name}/"):
        file.compare(f"{name}/", found, given=("t", "s", "u", *(f"{part}/" for part in REVERSED)))
    view = config_lib.methods_of(config).teaching.teacher_view(example, shape)
    np.testing.assert_array_equal(view.t, jnp.minimum(*(file.arrays[f"{name}/{part}"] for part in "ts")))


def losses(file, name, config, example):
    networks, process, methods = Networks(config), config_lib.process_of(config), config_lib.methods_of(config)
    (method,) = methods
    weight = method.weight_at(jnp.int32(0))

    def of(params, teacher, example, reverse):
        seen = look(
            params, teacher, example, networks=EitherTime(networks, reverse), process=process, methods=methods
        )
        total, (metrics, _) = summed(seen, {method.name: weight}, methods)
        projected = seen.head(HEAD, seen.student[method.student_block])
        target = seen.teacher[method.teacher_block]
        error = seen.prediction - process.target(example["x0"], example["e"], seen.position_times)
        return {"": total}, {
            "v_pred": nchw(seen.prediction), "student_proj": projected, "teacher_feat": target,
            "gen_token": patchify(jnp.square(error), networks.shape.patch).mean(axis=-1), "gen_loss": seen.denoising,
            "rep_map": distances.cosine(projected, target, axis=-1) - 1, "rep_loss": metrics["self_flow/loss"] - 1,
            "total": total - weight,
        }  # fmt: skip

    run = with_gradients(of)
    conventions = [part for part in REVERSED if file.names(f"{name}/{part}/")]
    assert conventions, f"nothing to compare of {name}"
    for convention in conventions:
        _, found, gradients = run(file.tree(), file.tree("ema/"), example, jnp.asarray(REVERSED[convention]))
        tensors = {"": file.tensors(gradients[""])}
        file.compare(f"{name}/{convention}/", found, tensors, unit=("rep_loss",))


def test_self_flow_every_array_is_read(file):
    file.check_prefixes("in/", "fwd/", "learn_sigma/", *(f"{name}/" for name in file.meta["runs"]))
    known = {"x", "x_tokens", "y", *TIMES.values(), *REVERSED}
    assert set(file.names("fwd/")) <= known
