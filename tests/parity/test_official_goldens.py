"""Equality with the authors' PyTorch code on small random networks. The goldens' README explains every array.

The goldens' suggested tolerances are relative to the largest magnitude in the array; every size is read from the
arrays, so that any other set of the same format can be checked.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.diffusion.guidance import Guidance
from sra_jax.diffusion.interpolant import Interpolant
from sra_jax.diffusion.registry import SAMPLERS
from sra_jax.interop.pytorch import depth_of, params_from_pytorch, pytorch_from_params
from sra_jax.methods import distances
from sra_jax.models.transformer import Block, Condition, FinalLayer, patchify, position_table, time_features
from sra_jax.runs.state import Networks, make_optimizer
from sra_jax.training.step import total_loss, update_ema
from tests.parity.stored import blocks, require

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


def close(actual, expected, tolerance=TOLERANCE):
    """Equal to `tolerance` times the largest magnitude of what is expected."""
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def state_dict(arrays, prefix="sd/"):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def recipe(arrays, size_from="in/x0") -> ConfigDict:
    """A config of the golden network and its alignment; `size_from` names an array of latents (...,C,H,W)."""
    meta = json.loads(str(arrays["meta/config"]))
    tensors = state_dict(arrays)
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    config = config_lib.default()
    config.data.update(
        image_size=arrays[size_from].shape[-1], channels=channels,
        num_classes=tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
    )  # fmt: skip
    config.model.update(
        patch=patch, depth=depth_of(tensors), width=width, heads=meta["num_heads"],
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
    )  # fmt: skip
    config.alignment.update(student_block=1, teacher_block=1)
    if "align_weight" in meta:
        config.alignment.update(
            student_block=meta["block_out_s"], teacher_block=meta["block_out_t"], weight=meta["align_weight"]
        )
        config.optimizer.update(learning_rate=meta["lr"])
    config.steps = 10
    config_lib.check(config.lock())
    return config


def trees(arrays, prefix="sd/"):
    heads = json.loads(str(arrays["meta/config"]))["num_heads"]
    return jax.tree.map(jnp.asarray, params_from_pytorch(state_dict(arrays, prefix), heads))


# ---------------------------------------------------------------- sit_forward


@pytest.fixture(scope="module")
def forward(golden):
    """The golden network, its parameters and everything one forward pass gives."""
    arrays = golden("sit_forward")
    config = recipe(arrays, "in/x")
    networks, params = Networks(config), trees(arrays)
    taps = tuple(range(1, config.model.depth + 1))
    model = networks.model(params)
    x, t, y = nhwc(arrays["in/x"]), jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/y"])
    prediction, features = jax.jit(functools.partial(model, taps=taps))(x, t, y)
    return arrays, model, networks, params, prediction, features


def test_sit_forward_prediction(forward):
    arrays, *_, prediction, _ = forward
    close(jnp.moveaxis(prediction, -1, 1), arrays["out/v"])


def test_sit_forward_tokens_after_every_block(forward):
    arrays, *_, features = forward
    for number, expected in blocks(arrays, "feat/block_#").items():
        close(features[number - 1], expected)


def test_sit_forward_stops_early(forward):
    arrays, model, *_ = forward
    for stop, expected in blocks(arrays, "feat/block_#").items():
        prediction, (tokens,) = model(
            nhwc(arrays["in/x"]), jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/y"]), taps=(stop,), stop=stop
        )
        assert prediction is None
        close(tokens, expected)


def test_sit_forward_head(forward):
    arrays, _, networks, params, _, features = forward
    for number, expected in blocks(arrays, "proj/block_#").items():
        close(networks.head(params, "head")(features[number - 1]), expected)


def test_sit_forward_embeddings(forward):
    arrays, model, *_ = forward
    config = model.config
    t, y = jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/y"])
    close(time_features(t), arrays["cond/t_freq"])
    close(model.time_embedding(t), arrays["cond/t_emb"])
    close(model.label_embedding(y), arrays["cond/y_emb"])
    close(model.condition(t, y), jax.nn.silu(arrays["cond/c"]))
    close(model.patch_embedding(patchify(nhwc(arrays["in/x"]), config.patch)), arrays["tok/patch"])
    close(position_table(config.width, config.input_size // config.patch)[None], arrays["pos_embed"], 1e-7)


def test_sit_forward_layer_norm_epsilon(forward):
    """Tokens of tiny variance, where the norm's epsilon decides."""
    arrays, model, *_ = forward
    condition = Condition(jax.nn.silu(jnp.asarray(arrays["cond/c"])))
    graphdef, stacked = nnx.split(model.blocks)
    for number, expected in blocks(arrays, "eps/block#_out").items():
        block: Block = nnx.merge(graphdef, jax.tree.map(lambda x, number=number: x[number - 1], stacked))
        close(block(jnp.asarray(arrays["eps/x_small"]), condition), expected)
    final: FinalLayer = model.final
    close(final(jnp.asarray(arrays["eps/x_small"]), condition), arrays["eps/final_tokens"])


def test_sit_forward_names_round_trip(forward):
    arrays, model, _, params, *_ = forward
    tensors = pytorch_from_params(params, model.config.channels, model.config.input_size)
    expected = state_dict(arrays)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


# ---------------------------------------------------------------- sit_sra_loss

PATHS = ("linear", "cosine")
DISTANCES = {"sml1": "smooth_l1", "l1": "l1", "l2": "l2", "cos_token": "cosine_tokens", "cos_feature": "cosine"}


def loss_of(arrays, path, distance="smooth_l1", weight=None):
    """`loss(params) -> (total, (metrics, samples))` on the golden batch."""
    config = recipe(arrays)
    with config.unlocked():
        config.alignment.distance = distance
        config.alignment.weight = config.alignment.weight if weight is None else weight
    example = {
        "x0": nhwc(arrays["in/x0"]), "e": nhwc(arrays["in/noise"]), "y": jnp.asarray(arrays["in/labels"]),
        "t": jnp.asarray(arrays["in/t"]), "s": jnp.asarray(arrays["in/t_teacher"]),
    }  # fmt: skip
    teacher = trees(arrays, "ema/")
    return lambda params: total_loss(
        params, teacher, example, {"sra": config.alignment.weight}, networks=Networks(config),
        process=Interpolant(path), methods=config_lib.methods_of(config),
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_sit_sra_loss_process(golden, path):
    arrays = golden("sit_sra_loss")
    require(arrays, f"{path}/x_t")
    process = Interpolant(path)
    x0, e = nhwc(arrays["in/x0"]), nhwc(arrays["in/noise"])
    t, s = jnp.asarray(arrays["in/t"]), jnp.asarray(arrays["in/t_teacher"])
    close(jnp.moveaxis(process.perturb(x0, e, t), -1, 1), arrays[f"{path}/x_t"])
    close(jnp.moveaxis(process.perturb(x0, e, s), -1, 1), arrays[f"{path}/x_t_teacher"])
    close(jnp.moveaxis(process.target(x0, e, t), -1, 1), arrays[f"{path}/target"])
    close(process.loss(nhwc(arrays[f"{path}/v_pred"]), x0, e, t), arrays[f"{path}/gen_loss"])
    close(jnp.maximum(t - arrays["in/k"], 0), s)


@pytest.mark.parametrize("path", PATHS)
def test_sit_sra_loss_distances(golden, path):
    """Every distance on the stored features, and the maps of the two cosines."""
    arrays = golden("sit_sra_loss")
    require(arrays, f"{path}/student_proj")
    student, teacher = jnp.asarray(arrays[f"{path}/student_proj"]), jnp.asarray(arrays[f"{path}/teacher_feat"])
    stored = {theirs for theirs in DISTANCES if f"{path}/align_{theirs}" in arrays}
    assert stored
    for theirs in stored:
        close(distances.mean_distance(DISTANCES[theirs], student, teacher), arrays[f"{path}/align_{theirs}"])
    close(distances.cosine(student, teacher, axis=1), arrays[f"{path}/align_cos_token_map"])
    close(distances.cosine(student, teacher, axis=-1), arrays[f"{path}/align_cos_feature_map"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("theirs", ["sml1", "cos_token", "cos_feature"])
def test_sit_sra_loss_total_and_gradients(golden, path, theirs):
    """The whole loss from latents, times and labels, and its gradient in every stored parameter."""
    arrays = golden("sit_sra_loss")
    require(arrays, f"{path}/total_{theirs}")
    weight = None if theirs == "sml1" else json.loads(str(arrays["meta/config"]))["cos_weight"]
    loss = loss_of(arrays, path, DISTANCES[theirs], weight)
    (total, (metrics, _)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trees(arrays))
    close(total, arrays[f"{path}/total_{theirs}"])
    close(metrics["loss_denoising"], arrays[f"{path}/gen_loss"].mean())
    close(metrics["loss_alignment"], arrays[f"{path}/align_{theirs}"])

    tensors = as_tensors(arrays, gradients)
    prefix = f"{path}/grad/" if theirs == "sml1" else f"{path}/grad_{theirs}/"
    stored = state_dict(arrays, prefix)
    assert stored
    for name, expected in stored.items():
        close(without_key_bias(name, tensors[name]), without_key_bias(name, expected), GRADIENT_TOLERANCE)
    if theirs == "sml1":
        norms = [np.linalg.norm(tensors[str(name)]) for name in arrays["param_names"]]
        close(norms, arrays[f"{path}/grad_l2"], GRADIENT_TOLERANCE)
        close(optax.tree.norm(gradients), arrays[f"{path}/grad_norm"], GRADIENT_TOLERANCE)


def as_tensors(arrays, tree):
    """A tree like the parameters under PyTorch names."""
    _, channels, size, _ = arrays["in/x0"].shape
    return pytorch_from_params(tree, channels, size)


def without_key_bias(name, tensor):
    """The key third of the qkv bias has a true gradient of zero; what is stored there is rounding noise."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = np.split(np.asarray(tensor), 3)
    return np.concatenate([query, value])


@pytest.fixture(scope="module", params=PATHS)
def two_steps(golden, request):
    """The optimizer run twice on the golden batch, teacher unchanged: parameters, moments and losses."""
    arrays = golden("sit_sra_loss")
    path = request.param
    require(arrays, f"{path}/clip_coef")
    optimizer = make_optimizer(recipe(arrays), steps=10)
    grad = jax.jit(jax.value_and_grad(loss_of(arrays, path), has_aux=True))
    params = trees(arrays)
    opt_state = optimizer.init(params)
    history = []
    for _ in range(2):
        (total, _), gradients = grad(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        history.append({"total": total, "gradients": gradients, "params": params, "opt_state": opt_state})
    return arrays, path, history


def test_sit_sra_loss_adam(two_steps):
    arrays, path, (first, _) = two_steps
    clip = arrays[f"{path}/clip_coef"]
    gradients, new = as_tensors(arrays, first["gradients"]), as_tensors(arrays, first["params"])
    moments = next(s for s in jax.tree.leaves(first["opt_state"], is_leaf=is_adam) if is_adam(s))
    averages = {"exp_avg": as_tensors(arrays, moments.mu), "exp_avg_sq": as_tensors(arrays, moments.nu)}
    for name, expected in state_dict(arrays, f"{path}/new/").items():
        old = arrays[f"sd/{name}"]
        moves = np.abs(clip * gradients[name]) > 1e-6  # elsewhere Adam's first step has the sign of rounding noise
        np.testing.assert_allclose(np.where(moves, new[name] - old, 0), np.where(moves, expected - old, 0), rtol=0,
                                   atol=2e-7, err_msg=name)  # fmt: skip
        assert np.abs(new[name] - old).max() <= 1.001 * json.loads(str(arrays["meta/config"]))["lr"]
    for moment, tensors in averages.items():
        for name, expected in state_dict(arrays, f"{path}/{moment}/").items():
            close(tensors[name], expected, GRADIENT_TOLERANCE)


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_sit_sra_loss_unused_labels_stay(two_steps):
    arrays, _, (_, second) = two_steps
    name = "y_embedder.embedding_table.weight"
    unused = np.setdiff1d(np.arange(arrays[f"sd/{name}"].shape[0]), arrays["in/labels"])
    moved = as_tensors(arrays, second["params"])[name]
    np.testing.assert_array_equal(moved[unused], arrays[f"sd/{name}"][unused])


def test_sit_sra_loss_second_step(two_steps):
    arrays, path, (first, second) = two_steps
    close(second["total"], arrays[f"{path}/step2/total_sml1"])
    close(optax.tree.norm(second["gradients"]), arrays[f"{path}/step2/grad_norm"], GRADIENT_TOLERANCE)
    gradients = [as_tensors(arrays, step["gradients"]) for step in (first, second)]
    tensors = as_tensors(arrays, second["params"])
    for name, expected in state_dict(arrays, f"{path}/step2/new/").items():
        steady = np.minimum(*(np.abs(g[name]) for g in gradients)) > 1e-5
        old = arrays[f"sd/{name}"]
        np.testing.assert_allclose(np.where(steady, tensors[name] - old, 0), np.where(steady, expected - old, 0),
                                   rtol=0, atol=4e-7, err_msg=name)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_sit_sra_loss_ema(golden, path):
    """The train step's average, fed with the golden student: rounding apart it is the authors'."""
    arrays = golden("sit_sra_loss")
    for decay in json.loads(str(arrays["meta/config"]))["ema_decays"]:
        stored = state_dict(arrays, f"{path}/ema_{decay}/")
        require(arrays, f"{path}/x_t")
        assert stored.keys() & state_dict(arrays, f"{path}/new/").keys()
        for name, expected in stored.items():
            if name == "pos_embed":  # a constant here; equal in student and teacher, so that its average is itself
                close(arrays[f"sd/{name}"], expected)
                continue
            if f"{path}/new/{name}" in arrays:  # those whose update is rounding noise are not stored
                teacher, student = arrays[f"ema/{name}"], arrays[f"{path}/new/{name}"]
                close(update_ema({"x": teacher}, {"x": student}, decay)["x"], expected)


# ---------------------------------------------------------------- sit_sampling

RUNS = {
    "ode": ("ode", "linear", (1.0, 0.0, 1.0)),
    "ode_cfg": ("ode", "linear", (1.8, 0.0, 0.7)),
    "ode_cfg_low": ("ode", "linear", (2.5, 0.2, 0.8)),
    "ode_heun": ("heun", "linear", (1.0, 0.0, 1.0)),
    "ode_heun_cfg": ("heun", "linear", (1.8, 0.0, 0.7)),
    "sde": ("sde", "linear", (1.0, 0.0, 1.0)),
    "sde_cfg": ("sde", "linear", (1.8, 0.0, 0.7)),
    "sde_cfg_low": ("sde", "linear", (2.5, 0.2, 0.8)),
    "sde_cosine": ("sde", "cosine", (1.0, 0.0, 1.0)),
    "sde_cosine_cfg": ("sde", "cosine", (1.8, 0.0, 0.7)),
}


@pytest.mark.parametrize("run", RUNS)
def test_sit_sampling(golden, run):
    """From the stored noise to latents inside one jitted program, and what the network was asked on the way."""
    arrays, weights = golden("sit_sampling"), golden("sit_sra_loss")
    require(arrays, f"run/{run}/x")
    name, path, (scale, low, high) = RUNS[run]
    config = recipe(weights)
    model = Networks(config).model(trees(weights))
    increments = nhwc(arrays["sde/noise"])
    guidance = Guidance(config.data.num_classes, scale, low, high)
    calls = []

    def denoise(x, t, y):
        jax.debug.callback(lambda t, size=x.shape[0]: calls.append((float(t[0]), size)), t, ordered=True)
        return model(x, t, y)[0]

    @jax.jit
    def sample(noise, labels):
        return SAMPLERS[name].sample(
            Interpolant(path), denoise, noise, labels, lambda i: increments[i],
            steps=len(arrays[f"{name if name == 'sde' else 'ode'}/t_steps"]) - 1, guidance=guidance,
        )  # fmt: skip

    latents = sample(nhwc(arrays["in/z"]), jnp.asarray(arrays["in/y"]))
    close(jnp.moveaxis(latents, -1, 1), arrays[f"run/{run}/x"])
    jax.effects_barrier()
    times, sizes = zip(*calls, strict=True)
    np.testing.assert_allclose(times, arrays[f"run/{run}/eval_t"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(sizes, arrays[f"run/{run}/eval_batch"])
