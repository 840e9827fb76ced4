"""Dual-time scheduling and attention separation as their authors compute them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sra_jax import config as config_lib
from sra_jax.methods import distances
from sra_jax.methods.dts_as import HEAD
from sra_jax.methods.groups import counts, position_times, random_groups, shares, token_times
from sra_jax.methods.registry import Methods
from sra_jax.models.transformer import patchify
from sra_jax.runs.state import Networks, clip_by_global_norm, make_optimizer
from sra_jax.training.step import look, summed, update_ema
from tests.parity.goldens import GRADIENT_TOLERANCE, Golden, close, nchw, nhwc, with_gradients

DISTANCES = {"cos_token": "cosine_tokens", "cos_feature": "cosine"}
"""The file's objectives: what the code computes, and what the papers write."""
GRADIENTS = {"cos_token": "", "cos_feature": "feature_"}
"""What stands before the names of their gradients."""
GIVEN = ("perm_draw", "whole_draw", "group_t", "group_k")
STEP = ("grad_norm", "clip_coef", "new/", "exp_avg/", "exp_avg_sq/", "ema_")
"""Of an optimizer's step."""


@pytest.fixture(scope="module")
def file(golden):
    return Golden(golden("dts_as"), {"ap_head.linear1": (HEAD, "hidden"), "ap_head.linear2": (HEAD, "out")})


def config_of(file, settings, distance="cosine"):
    meta = file.meta
    return file.recipe(
        "dts_as", path=settings["path_type"], student_block=meta["block_out_s"], teacher_block=meta["block_out_t"],
        weight=meta["align_weight"], distance=distance, ratios=tuple(settings["ratios"]),
        dual_time=settings["dual_time"], separate=settings["attention_separation"],
        teacher_time=settings["teacher_t"], interval=(0.0, meta["t_max"]), teacher_mask=settings["teacher_mask"],
        whole_share=settings["full_sample_prob"],
    )  # fmt: skip


def method_of(config):
    (method,) = config_lib.methods_of(config)
    return method


def example_of(file, name, config):
    """The run's batch, of its stored draws."""
    stored, method, process = file.below(f"{name}/"), method_of(config), config_lib.process_of(config)
    t = jnp.asarray(stored["group_t"])
    t = t[:, 0] if method.groups == 1 else t
    earlier = t
    if "group_k" in stored:
        offset = jnp.asarray(stored["group_k"]).reshape(t.shape)
        earlier = process.teacher_time(jax.random.key(0), t, (offset, offset))  # an interval of one number
    example = file.example()
    tokens = Networks(config).shape.tokens
    order = jnp.asarray(stored.get("perm_draw", np.zeros((t.shape[0], tokens), np.float32)))
    whole = jnp.asarray(stored.get("whole_draw", np.ones(t.shape[0], np.float32)))
    labels = {"label": example["y"], "y": jnp.asarray(file.arrays["in/labels_student"])}
    example |= labels | method.arranged(t, earlier, order, whole)
    if "perm_draw" not in stored and "groups" in stored:
        example["groups"] = jnp.asarray(stored["groups"])
    return example


def is_faulty(settings):
    """The authors' code gives this teacher the clean latents in all groups but the first, at the smallest time."""
    several = len(shares(tuple(settings["ratios"]))) > 1
    return settings["teacher_t"] == "self_flow" and settings["teacher_mask"] and several


def stacked(x):
    """(G,B,H,W,C) -> (G*B,C,H,W), as the file has the images of groups."""
    return nchw(x.reshape(-1, *x.shape[2:]))


@functools.cache
def program(path, methods, faulty, file):
    """A run's losses, by the method of each objective, and gradients."""
    methods = dict(methods)
    config = file.recipe("dts_as", path=path)
    networks, process = Networks(config), config_lib.process_of(config)
    shape = networks.shape
    method = next(iter(methods.values()))

    def images(example, t):
        """x_t of each group (G,B,H,W,C)."""
        x0, e = example["x0"], example["e"]
        return jnp.stack([process.perturb(x0, e, t[:, g]) for g in range(t.shape[1])])

    def losses(params, teacher, example):
        seen = look(params, teacher, example, networks=networks, process=process, methods=Methods((method,)))
        view = method.teacher_view(example, shape)
        s = view.t if view.t.ndim > 1 else view.t[:, None]
        t = example["t"] if example["t"].ndim > 1 else example["t"][:, None]
        student_x, teacher_x = images(example, t), images(example, s)
        if faulty:
            clean = jnp.broadcast_to(example["x0"], teacher_x.shape)
            teacher_x = jnp.concatenate([teacher_x[:1], clean[1:]])
            group = position_times(jnp.broadcast_to(jnp.arange(s.shape[1]), s.shape), view.groups, shape)
            x = jnp.take_along_axis(teacher_x, group[None, ..., None], axis=0)[0]
            n = method.teacher_block
            _, (tokens,) = networks.model(teacher)(
                x, view.t, view.y, groups=view.groups, segments=view.segments, sizes=view.sizes, taps=(n,), stop=n
            )
            seen = dataclasses.replace(seen, teacher={n: tokens})
        tokens, target = seen.student[method.student_block], seen.teacher[method.teacher_block]
        projected = seen.head(HEAD, tokens)
        of_target = process.target(example["x0"], example["e"], seen.position_times)
        groups = example.get("groups")
        of_teacher = s if view.groups is None else token_times(s, view.groups)
        found = {
            "groups": groups, "token_t": example["t"] if groups is None else token_times(t, groups),
            "teacher_token_t": jnp.broadcast_to(of_teacher, (s.shape[0], shape.tokens)),
            "student_x": stacked(student_x), "teacher_x": stacked(teacher_x), "student_tap": tokens,
            "student_proj": projected, "teacher_feat": target, "gen_loss": seen.denoising,
            "pred_tokens": patchify(seen.prediction, shape.patch), "target_tokens": patchify(of_target, shape.patch),
            "gen_token": patchify(jnp.square(seen.prediction - of_target), shape.patch).mean(axis=-1),
            "align_cos_token_map": distances.cosine(projected, target, axis=1),
            "align_cos_feature_map": distances.cosine(projected, target, axis=-1),
            "align_sml1": distances.mean_distance("smooth_l1", projected, target, method.beta),
        }  # fmt: skip
        totals = {}
        for name, one in methods.items():
            total, (metrics, _) = summed(seen, {one.name: one.weight_at(jnp.int32(0))}, Methods((one,)))
            found |= {f"align_{name}": metrics["dts_as/loss"], f"total_{name}": total}
            totals[name] = total
        return totals, {key: x for key, x in found.items() if x is not None}

    return with_gradients(losses)


def computed(file, name, settings):
    """The run by this project: what was found, gradients by objective, and the config of what the code computes."""
    configs = {key: config_of(file, settings, distance) for key, distance in DISTANCES.items()}
    config = configs["cos_token"]
    # What they decide in their draws alone is made equal, for it makes no other program.
    drawn = {"dual_time": True, "teacher_time": "same"}
    methods = tuple((key, dataclasses.replace(method_of(one), **drawn)) for key, one in configs.items())
    run = program(settings["path_type"], methods, is_faulty(settings), file)
    _, found, gradients = run(file.tree(), file.tree("ema/"), example_of(file, name, config))
    return found, gradients, config


def test_dts_as_runs(file):
    for name, settings in file.meta["variants"].items():
        found, gradients, config = computed(file, name, settings)
        tensors = {GRADIENTS[key]: file.tensors(gradient) for key, gradient in gradients.items()}
        step = [rest for rest in file.below(f"{name}/") if rest.startswith(STEP)]
        unit = [f"align_{key}" for key in DISTANCES]
        file.compare(f"{name}/", found, tensors, given=(*GIVEN, *step), unit=unit)
        if step:
            compare_step(file, name, gradients["cos_token"], config)


def compare_step(file, name, gradient, config):
    """The clipped optimizer's first step on the gradient of what the code computes, and the EMA after it."""
    meta, stored = file.meta, file.below(f"{name}/")
    config.optimizer.update(
        learning_rate=meta["lr"], b1=meta["betas"][0], b2=meta["betas"][1], eps=meta["eps"],
        weight_decay=meta["weight_decay"], clip_norm=meta["clip_norm"], warmup_steps=0,
    )  # fmt: skip
    params = file.tree()
    norm = optax.tree.norm(gradient)
    clipped, _ = clip_by_global_norm(meta["clip_norm"]).update(gradient, optax.EmptyState())
    factor = optax.tree.norm(clipped) / norm
    optimizer = make_optimizer(config, steps=10)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    moments = next(s for s in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(s))
    new = file.tensors(optax.apply_updates(params, updates))
    gradients = file.tensors(gradient)
    averages = {"exp_avg/": file.tensors(moments.mu), "exp_avg_sq/": file.tensors(moments.nu)}
    for rest, expected in stored.items():
        if not rest.startswith(STEP):
            continue
        kind, _, parameter = rest.partition("/")
        if rest in ("grad_norm", "clip_coef"):
            close({"grad_norm": norm, "clip_coef": factor}[rest], expected, GRADIENT_TOLERANCE, what=rest)
        elif kind == "new":
            old = file.arrays[f"sd/{parameter}"]
            moves = np.abs(factor * gradients[parameter]) > 1e-6  # elsewhere the first step's sign is rounding noise
            difference = np.where(moves, new[parameter] - expected, 0)
            np.testing.assert_allclose(difference, 0, rtol=0, atol=2e-7, err_msg=rest)
            assert np.abs(new[parameter] - old).max() <= 1.001 * meta["lr"]
            assert np.abs(expected - old).max() <= 1.001 * meta["lr"]
        elif kind.startswith("ema_"):
            student = stored.get(f"new/{parameter}", new[parameter])  # theirs, so that noise does not count twice
            average = update_ema({"x": file.arrays[f"ema/{parameter}"]}, {"x": student}, float(kind[len("ema_"):]))
            close(average["x"], expected, what=rest)
        else:
            close(averages[f"{kind}/"][parameter], expected, GRADIENT_TOLERANCE, what=rest)


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_dts_as_groups(file):
    """Shares, counts and the random order alone, for numbers of tokens beside the network's."""
    for number in file.names("mask/"):
        stored = file.below(f"mask/{number}/")
        ratios = tuple(float(str(ratio)) for ratio in stored["ratios"])  # as they were before float32
        sizes = counts(ratios, stored["perm_draw"].shape[1])
        close(shares(ratios), stored["normalized"])
        np.testing.assert_array_equal(sizes, stored["counts"])
        np.testing.assert_array_equal(random_groups(jnp.asarray(stored["perm_draw"]), sizes), stored["groups"])


PASSES = {
    "mixed": (True, "token_t"), "mixed_one_time": (True, "t"), "token_time": (False, "token_t"),
    "one_time": (False, "t"), "mask_ignored": (False, "token_t"),
}  # fmt: skip
"""The file's forward passes: whether an example is mixed of the images of groups, and its times. A mask without groups
of images is ignored by the authors' network; here nobody can ask for one."""


def test_dts_as_network(file):
    if not file.names("fwd/"):
        pytest.skip("the file has no forward passes")
    stored = {name: jnp.asarray(x) for name, x in file.below("fwd/").items() if "/" not in name}
    networks, block = Networks(file.recipe("dts_as")), file.meta["block_out_s"]
    shape, groups, batch = networks.shape, stored["groups"], stored["y"].shape[0]
    images = jnp.moveaxis(stored["x_groups"], 1, -1).reshape(-1, batch, *nhwc(stored["x_groups"]).shape[1:])
    own = jnp.broadcast_to(jnp.arange(len(images)), (batch, len(images)))
    mixed = jnp.take_along_axis(images, position_times(own, groups, shape)[None, ..., None], axis=0)[0]

    @jax.jit
    def run(params, x, t, segments):
        each = None if t.ndim == 1 else jnp.broadcast_to(jnp.arange(shape.tokens), t.shape)
        v, (tap,) = networks.model(params)(x, t, stored["y"], groups=each, segments=segments, taps=(block,))
        return {"v": nchw(v), "tap": tap}

    compared = 0
    for attention in ("separated", "full"):
        for kind in file.names(f"fwd/{attention}/"):
            mixes, times = PASSES[kind]
            segments = groups if mixes and attention == "separated" else None
            found = run(file.tree(), mixed if mixes else images[0], stored[times], segments)
            file.compare(f"fwd/{attention}/{kind}/", found)
            compared += 1
    assert compared


def test_dts_as_the_right_teacher_is_offered(file):
    """Where the authors' teacher gets clean latents at a wrong time, this one gets every group at the smallest time."""
    for name, settings in file.meta["variants"].items():
        if not is_faulty(settings):
            continue
        config = config_of(file, settings)
        example, process, shape = example_of(file, name, config), config_lib.process_of(config), Networks(config).shape
        view = method_of(config).teacher_view(example, shape)
        smallest = jnp.asarray(file.arrays[f"{name}/group_t"]).min(axis=1)
        x = process.perturb(example["x0"], example["e"], position_times(view.t, view.groups, shape))
        np.testing.assert_array_equal(x, process.perturb(example["x0"], example["e"], smallest))


def test_dts_as_every_array_is_read(file):
    file.check_prefixes("in/", "mask/", "fwd/", *(f"{name}/" for name in file.meta["variants"]))
