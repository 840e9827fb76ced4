"""SRA on MMDiT: latents, captions, loss, gradients, optimizer, EMA. The goldens' README.t2i.md explains every array."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sra_jax import config as config_lib
from sra_jax.diffusion.guidance import without
from sra_jax.diffusion.interpolant import Interpolant
from sra_jax.interop import mmdit as interop
from sra_jax.methods import distances
from sra_jax.methods.heads import Head
from sra_jax.models.autoencoder import AutoencoderConfig, posterior
from sra_jax.models.mmdit import MMDiT
from sra_jax.runs.state import make_optimizer
from sra_jax.training.step import update_ema
from tests.parity.test_goldens_mmdit_forward import close, nhwc, shape_of, state_dict

GRADIENT_TOLERANCE = 1e-4
DISTANCES = {"sml1": "smooth_l1", "l1": "l1", "l2": "l2", "cos_token": "cosine_tokens", "cos_feature": "cosine"}
"""The file's names of distances and ours."""


@pytest.fixture(scope="module")
def stored(golden):
    arrays = golden("mmdit_sra_loss")
    return arrays, json.loads(str(arrays["meta/config"]))


def nchw(x):
    return jnp.moveaxis(x, -1, 1)


def latents(moments, noise, scale):
    mean, std = posterior(nhwc(moments))
    return nchw(AutoencoderConfig(scaling_factor=scale).scale(mean + std * nhwc(noise)))


def test_mmdit_sra_loss_latents(stored):
    """Mean and log-variance, clipped."""
    arrays, meta = stored
    close(latents(arrays["in/moments"], arrays["in/posterior_noise"], meta["latents_scale"]), arrays["in/x0"])
    if "posterior/z" in arrays:
        found = latents(arrays["posterior/moments"], arrays["posterior/noise"], meta["latents_scale"])
        np.testing.assert_allclose(found, arrays["posterior/z"], rtol=1e-5)


def test_mmdit_sra_loss_captions(stored):
    """The chosen captions, and the empty one where the draw is below the rate."""
    arrays, meta = stored
    index = arrays["in/caption_index"]
    assert (index < arrays["in/n_captions"]).all()
    dropped = arrays["in/drop_u"] < meta["caption_dropout"]
    np.testing.assert_array_equal(dropped, arrays["in/drop"])
    chosen = {"context": jnp.asarray(arrays["in/captions"][np.arange(len(index)), index])}
    found = without(chosen, {"context": arrays["in/context_null"]}, jnp.asarray(dropped))
    np.testing.assert_array_equal(found["context"], arrays["in/context"])


class Golden:
    """The golden networks and what the losses are made of."""

    def __init__(self, arrays, meta):
        tensors = state_dict(arrays)
        self.arrays, self.meta = arrays, meta
        self.grid = round(tensors[interop.POSITION_TABLE].shape[1] ** 0.5)
        shape = shape_of(tensors, meta["num_heads"], self.grid, arrays["in/context"].shape[1])
        self.channels = shape.channels
        self.graphs = {
            "model": nnx.graphdef(nnx.eval_shape(lambda: MMDiT(shape, rngs=nnx.Rngs(0)))),
            "head": nnx.graphdef(nnx.eval_shape(lambda: Head(shape, rngs=nnx.Rngs(0)))),
        }

    @property
    def objectives(self):
        """Names of the aligned totals whose gradients the file has -> the distance of each; cos is over features."""
        names = {key.removesuffix("/grad_l2") for key in self.arrays if key.endswith("/grad_l2")} - {"gen"}
        return {name: name if name in DISTANCES else f"{name}_feature" for name in sorted(names)}

    def tree(self, prefix="sd/"):
        return jax.tree.map(
            jnp.asarray, interop.params_from_pytorch(state_dict(self.arrays, prefix), self.meta["num_heads"])
        )

    def as_tensors(self, tree):
        return interop.pytorch_from_params(tree, self.channels, self.grid)

    def parts(self, params):
        """Every quantity of the loss, by the file's names."""
        arrays, meta, process = self.arrays, self.meta, Interpolant("linear")
        x0, e, y = nhwc(arrays["in/x0"]), nhwc(arrays["in/noise"]), {"context": jnp.asarray(arrays["in/context"])}
        t = jnp.asarray(arrays["in/t"])
        s = jnp.maximum(t - arrays["in/k"], 0)
        student_block, teacher_block = meta["block_out_s"], meta["block_out_t"]
        model, head = (nnx.merge(self.graphs[name], params[name]) for name in ("model", "head"))
        prediction, (tap,) = model(process.perturb(x0, e, t), t, y, taps=(student_block,))
        teacher = nnx.merge(self.graphs["model"], self.tree("ema/")["model"])
        _, (target,) = teacher(process.perturb(x0, e, s), s, y, taps=(teacher_block,), stop=teacher_block)
        projected = head(tap)
        found = {
            "in/t_teacher": s, "x_t": nchw(process.perturb(x0, e, t)), "x_t_teacher": nchw(process.perturb(x0, e, s)),
            "target": nchw(process.target(x0, e, t)), "v_pred": nchw(prediction), "student_tap": tap,
            "student_proj": projected, "teacher_feat": target, "gen_loss": process.loss(prediction, x0, e, t),
            "align_cos_token_map": distances.cosine(projected, target, axis=1),
            "align_cos_feature_map": distances.cosine(projected, target, axis=-1),
        }  # fmt: skip
        for theirs, ours in DISTANCES.items():
            found[f"align_{theirs}"] = distances.mean_distance(ours, projected, target, meta["sml1_beta"])
        found["repa_proj_loss"] = found["align_cos_feature"] - 1
        found["total_gen"] = found["gen_loss"].mean()
        for name, distance in self.objectives.items():
            found[f"total_{name}"] = found["total_gen"] + meta[f"{name}_weight"] * found[f"align_{distance}"]
        return found

    def value_and_grad(self, objective):
        return jax.jit(jax.value_and_grad(lambda params: self.parts(params)[f"total_{objective}"]))

    def optimizer(self):
        config = config_lib.default()
        meta = self.meta
        config.optimizer.update(
            learning_rate=meta["lr"], b1=meta["betas"][0], b2=meta["betas"][1], eps=meta["eps"],
            weight_decay=meta["weight_decay"], clip_norm=meta["clip_norm"],
        )  # fmt: skip
        return make_optimizer(config, steps=10)


@pytest.fixture(scope="module")
def golden_networks(stored):
    return Golden(*stored)


def test_mmdit_sra_loss_parts(stored, golden_networks):
    """Inputs of both networks, their outputs and features, distances, totals: all that is at the file's top level."""
    arrays, _ = stored
    found = jax.jit(golden_networks.parts)(golden_networks.tree())
    top = [key for key in arrays if "/" not in key and not key.endswith("_names")]
    assert top
    for key in top + [key for key in ("in/t_teacher",) if key in arrays]:
        close(found[key], arrays[key], key)


def compare_gradients(arrays, objective, gradients, tree_norm):
    """Norms of all gradients, of the thirds of qkv, and whole gradients, as far as the file has them."""
    norms = [np.linalg.norm(gradients[str(name)]) for name in arrays["param_names"]]
    norms = {"grad_l2": norms, "grad_norm": tree_norm}
    if "qkv_names" in arrays:
        thirds = [np.split(np.asarray(gradients[str(name)]), 3) for name in arrays["qkv_names"]]
        norms["grad_l2_qkv"] = [[np.linalg.norm(third) for third in of_one] for of_one in thirds]
    for name, value in norms.items():
        if f"{objective}/{name}" in arrays:
            close(value, arrays[f"{objective}/{name}"], name, GRADIENT_TOLERANCE)
    for name, expected in state_dict(arrays, f"{objective}/grad/").items():
        close(gradients[name], expected, name, GRADIENT_TOLERANCE)


def test_mmdit_sra_loss_baseline_gradients(stored, golden_networks):
    arrays, _ = stored
    if "gen/grad_l2" not in arrays:
        pytest.skip("this set has no baseline")
    _, gradients = golden_networks.value_and_grad("gen")(golden_networks.tree())
    compare_gradients(arrays, "gen", golden_networks.as_tensors(gradients), optax.tree.norm(gradients))


@pytest.fixture(scope="module")
def two_steps(golden_networks):
    """Of each objective: the optimizer run twice on the golden batch, teacher unchanged."""
    assert golden_networks.objectives
    return {objective: run_twice(golden_networks, objective) for objective in golden_networks.objectives}


def run_twice(golden_networks, objective):
    """Parameters, moments and losses."""
    optimizer, grad = golden_networks.optimizer(), golden_networks.value_and_grad(objective)
    params = golden_networks.tree()
    state, history = optimizer.init(params), []
    for _ in range(2):
        total, gradients = grad(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        moments = next(node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node))
        history.append({
            "total": total, "grad_norm": optax.tree.norm(gradients),
            **{name: golden_networks.as_tensors(tree) for name, tree in (
                ("gradients", gradients), ("new", params), ("exp_avg", moments.mu), ("exp_avg_sq", moments.nu))},
        })  # fmt: skip
    return history


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_mmdit_sra_loss_gradients(stored, two_steps):
    arrays, _ = stored
    for objective, (first, _) in two_steps.items():
        compare_gradients(arrays, objective, first["gradients"], first["grad_norm"])


def test_mmdit_sra_loss_gradients_of_keys_and_unused_queries(two_steps):
    """A shift of all scores changes nothing, so that the streams' key biases pull opposite ways."""
    for first, _ in two_steps.values():
        gradients = first["gradients"]
        depth = interop.depth_of(gradients)
        largest = max(np.abs(gradient).max() for gradient in gradients.values())
        for i in range(depth):
            names = [f"joint_blocks.{i}.{stream}.attn.qkv.bias" for stream in interop.STREAMS]
            text, image = (np.split(gradients[name], 3) for name in names)
            np.testing.assert_allclose(text[1], -image[1], atol=1e-6 * largest)
        for kind in ("weight", "bias"):
            query, _, _ = np.split(gradients[f"joint_blocks.{depth - 1}.context_block.attn.qkv.{kind}"], 3)
            np.testing.assert_array_equal(query, 0)


def test_mmdit_sra_loss_adam(stored, two_steps):
    arrays, meta = stored
    for objective, (first, _) in two_steps.items():
        clip = min(1.0, meta["clip_norm"] / (first["grad_norm"] + 1e-6))
        if f"{objective}/clip_coef" in arrays:
            close(clip, arrays[f"{objective}/clip_coef"], "clip_coef", GRADIENT_TOLERANCE)
        new = state_dict(arrays, f"{objective}/new/")
        assert new, objective
        for name, expected in new.items():
            old, tolerance = arrays[f"sd/{name}"], max(2e-7, 2e-3 * meta["lr"])
            moves = np.abs(clip * first["gradients"][name]) > 1e-6  # elsewhere Adam's first step has rounding's sign
            compare_moves(first["new"][name], expected, old, moves, tolerance, f"{objective} {name}")
            farthest = meta["lr"] * (1.001 + meta["weight_decay"] * np.abs(old).max())
            assert np.abs(first["new"][name] - old).max() <= farthest
        for moment in ("exp_avg", "exp_avg_sq"):
            for name, expected in state_dict(arrays, f"{objective}/{moment}/").items():
                close(first[moment][name], expected, name, GRADIENT_TOLERANCE)


def compare_moves(found, expected, old, moves, tolerance, name):
    """Where a parameter is known to move, it moves as expected."""
    np.testing.assert_allclose(np.where(moves, found - old, 0), np.where(moves, expected - old, 0), rtol=0,
                               atol=tolerance, err_msg=name)  # fmt: skip


def test_mmdit_sra_loss_second_step(stored, two_steps):
    arrays, meta = stored
    for objective, (first, second) in two_steps.items():
        step2 = state_dict(arrays, f"{objective}/step2/")
        if "total" in step2:
            close(second["total"], step2["total"])
        if "grad_norm" in step2:
            close(second["grad_norm"], step2["grad_norm"], "grad_norm", GRADIENT_TOLERANCE)
        for name, expected in state_dict(step2, "new/").items():
            steady = np.minimum(*(np.abs(step["gradients"][name]) for step in (first, second))) > 1e-5
            old, tolerance = arrays[f"sd/{name}"], max(4e-7, 4e-3 * meta["lr"])
            compare_moves(second["new"][name], expected, old, steady, tolerance, f"{objective} {name}")


def test_mmdit_sra_loss_ema(stored, golden_networks):
    """The train step's average, fed with the golden student: rounding apart it is the authors'."""
    arrays, meta = stored
    for objective in golden_networks.objectives:
        for decay in meta["ema_decays"]:
            averages = state_dict(arrays, f"{objective}/ema_{decay}/")
            assert averages, (objective, decay)
            for name, expected in averages.items():
                teacher, student = arrays[f"ema/{name}"], arrays[f"{objective}/new/{name}"]
                close(update_ema({"x": teacher}, {"x": student}, decay)["x"], expected, name)
