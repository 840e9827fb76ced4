import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from sra_jax import config as config_lib
from sra_jax.data import pipeline, registry
from sra_jax.distributed import sharding
from sra_jax.methods.registry import METHODS
from sra_jax.runs.state import clip_by_global_norm, ema_decay, learning_rate
from sra_jax.training import program as program_lib
from sra_jax.training.step import draw, total_loss

BATCH = 16


def recipe(**changes):
    config = digits.get_config()
    small = {"model.depth": 4, "model.width": 32, "model.heads": 2, "batch_size": BATCH, "optimizer.warmup_steps": 0}
    config.update_from_flattened_dict(small | changes)
    return config


def program(config, devices=1):
    """The run's program on some of the simulated devices, its first state, and its data."""
    config_lib.check(config, devices)
    dataset = registry.load(config.data)
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, devices), jax.devices()[:devices])
    built = program_lib.build(config, mesh, dataset, steps=100)
    return built, built.init(jax.random.key(config.seed)), dataset


def batches(dataset, config, start=0):
    return pipeline.batches(
        dataset.source, batch_size=config.batch_size, seed=config.seed, rows=range(config.batch_size), start=start
    )


def losses(config, devices=1, steps=20):
    built, state, dataset = program(config, devices)
    history = []
    for _, batch in zip(range(steps), batches(dataset, config), strict=False):
        state, metrics = built.train_step(state, sharding.put_batch(batch, built.mesh))
        metrics.pop("samples")
        history.append(jax.device_get(metrics))
    return history, state


@functools.cache
def one_device():
    return losses(recipe())


@pytest.mark.parametrize(
    ("data", "fsdp", "model"),
    [(2, 2, 2), pytest.param(8, 1, 1, marks=pytest.mark.slow), pytest.param(1, 8, 1, marks=pytest.mark.slow)],
)
def test_eight_devices_give_the_losses_of_one(data, fsdp, model):
    """Twenty steps, with the state whole on every device, split over all, and everything at once."""
    expected, _ = one_device()
    actual, state = losses(recipe(**{"mesh.data": data, "mesh.fsdp": fsdp, "mesh.model": model}), devices=8)
    for name in ("loss", "loss_denoising", "loss_alignment", "grad_norm", "teacher_feature_norm"):
        np.testing.assert_allclose([m[name] for m in actual], [m[name] for m in expected], rtol=1e-5, err_msg=name)
    kernel = state.ema["model"]["blocks"]["mlp"]["hidden"]["kernel"]
    assert kernel.addressable_shards[0].data.size * fsdp * model == kernel.size


def test_accumulation_changes_nothing():
    expected, whole = one_device()
    actual, parts = losses(recipe(accumulation=4))
    for name in expected[0]:
        np.testing.assert_allclose([m[name] for m in actual], [m[name] for m in expected], rtol=2e-4, err_msg=name)
    for a, b in zip(jax.tree.leaves(whole.ema), jax.tree.leaves(parts.ema), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_metrics_are_complete():
    names = {
        "loss", "loss_denoising", "loss_alignment", "alignment_weight", "learning_rate", "grad_norm", "param_norm",
        "update_norm", "student_feature_norm", "teacher_feature_norm",
    }  # fmt: skip
    history, _ = one_device()
    assert history[0].keys() == names
    first = history[0]
    assert first["loss"] == pytest.approx(first["loss_denoising"] + 0.2 * first["loss_alignment"], rel=1e-6)


def test_both_losses_of_one_batch_can_be_overfitted():
    """Fifty steps on the same examples, noise and times."""
    config = recipe(**{"ema.decay": 0.9})
    built, state, dataset = program(config)
    batch = {name: jnp.asarray(x) for name, x in next(batches(dataset, config)).items()}
    example = draw(
        jax.random.key(3), dataset.encode(batch, None), batch, config_lib.process_of(config),
        config_lib.methods_of(config), built.networks.shape, label_dropout=0.1,
    )  # fmt: skip
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, ema, opt_state):
        (_, (metrics, _)), gradients = jax.value_and_grad(total_loss, has_aux=True)(
            params, ema, example, {"sra": 0.2}, networks=built.networks, process=config_lib.process_of(config),
            methods=config_lib.methods_of(config),
        )  # fmt: skip
        updates, opt_state = optimizer.update(gradients, opt_state)
        return jax.tree.map(jnp.add, params, updates), opt_state, metrics

    params, opt_state = state.params, optimizer.init(state.params)
    history = []
    for _ in range(50):
        params, opt_state, metrics = step(params, state.ema, opt_state)
        history.append(metrics)
    for name in ("loss_denoising", "loss_alignment"):
        assert history[-1][name] < 0.5 * history[0][name]


def loss_arguments(config, networks):
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 1)), jnp.float32)
    process, methods = config_lib.process_of(config), config_lib.methods_of(config)
    example = draw(
        jax.random.key(0), x0, {"label": jnp.arange(4)}, process, methods, networks.shape, label_dropout=0.0
    )
    options = {"networks": networks, "process": process, "methods": methods}
    return example, options


def random_params(state, seed=0):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(0, 0.1, x.shape), x.dtype), state.params)


def test_the_teacher_gets_no_gradient_and_late_blocks_no_say():
    config = recipe()
    built, state, _ = program(config)
    example, options = loss_arguments(config, built.networks)
    student, teacher = random_params(state), random_params(state, 1)

    def loss(params, ema):
        return total_loss(params, ema, example, {"sra": 1.0}, **options)[0]

    for leaf in jax.tree.leaves(jax.grad(loss, argnums=1)(student, teacher)):
        np.testing.assert_array_equal(leaf, 0)
    late = config.alignment.teacher_block
    teacher_broken = jax.tree.map(lambda x: x, teacher)
    teacher_broken["model"]["blocks"] = jax.tree.map(lambda x: x.at[late:].set(jnp.nan), teacher["model"]["blocks"])
    teacher_broken["model"]["final"] = jax.tree.map(lambda x: x * jnp.nan, teacher["model"]["final"])
    teacher_broken["head"] = jax.tree.map(lambda x: x * jnp.nan, teacher["head"])
    assert loss(student, teacher_broken) == loss(student, teacher)
    early = teacher_broken | {"model": teacher["model"] | {
        "blocks": jax.tree.map(lambda x: x.at[late - 1].multiply(1.5), teacher["model"]["blocks"])
    }}  # fmt: skip
    assert loss(student, early) != loss(student, teacher)


def test_the_alignment_gradient_stops_at_the_student_block():
    """L_sa alone moves blocks 1..m, the embeddings and the head; later blocks and the final layer stay."""
    config = recipe()
    built, state, _ = program(config)
    example, options = loss_arguments(config, built.networks)
    params, teacher = random_params(state), random_params(state, 1)

    def loss(params):
        _, (metrics, _) = total_loss(params, teacher, example, {"sra": 1.0}, **options)
        return metrics["loss_alignment"]

    gradient = jax.grad(loss)(params)
    for leaf in jax.tree.leaves(gradient["model"]["blocks"]):
        per_block = np.abs(leaf).reshape(4, -1).max(axis=1)
        np.testing.assert_array_equal(per_block[2:], 0)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient["head"]))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["model"]["final"]))


def test_baseline_runs_no_teacher():
    config = recipe(**{"alignment.enabled": False})
    built, state, dataset = program(config)
    assert state.params.keys() == {"model"}
    batch = sharding.put_batch(next(batches(dataset, config)), built.mesh)
    lowered = built.train_step.lower(state, batch)
    loops = lowered.as_text().count("stablehlo.while")
    aligned_built, aligned_state, _ = program(recipe())
    assert aligned_built.train_step.lower(aligned_state, batch).as_text().count("stablehlo.while") > loops
    _, metrics = built.train_step(state, batch)
    assert "loss_alignment" not in metrics
    assert metrics["loss"] == metrics["loss_denoising"]


def test_without_a_head_tokens_are_compared_as_they_are():
    config = recipe(**{"alignment.head": False, "alignment.interval": (0.0, 0.0), "alignment.teacher_block": 2})
    built, state, _ = program(config)
    assert state.params.keys() == {"model"}
    example, options = loss_arguments(config, built.networks)
    params = random_params(state)
    example["s"] = example["t"]
    _, (metrics, _) = total_loss(params, params, example, {"sra": 1.0}, **options)
    assert float(metrics["loss_alignment"]) < 1e-9  # same block, time and parameters


def test_draws():
    """Dropped labels in the right share, teacher earlier than student, everything a function of the key."""
    config = recipe()
    labels = jnp.arange(20_000) % 10
    x0 = jnp.zeros((20_000, 1, 1, 1))

    def drawn(seed):
        return draw(
            jax.random.key(seed), x0, {"label": labels}, config_lib.process_of(config), config_lib.methods_of(config),
            config_lib.transformer_of(config), label_dropout=0.1,
        )  # fmt: skip

    example = drawn(5)
    dropped = np.asarray(example["y"]) == 10
    assert dropped.mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(np.asarray(example["y"])[~dropped], np.asarray(labels)[~dropped])
    assert np.all(example["s"] <= example["t"])
    assert np.std(example["e"]) == pytest.approx(1, abs=0.02)
    again, other = drawn(5), drawn(6)
    for name in ("e", "y", "t", "s"):
        np.testing.assert_array_equal(example[name], again[name])
        assert not np.array_equal(example[name], other[name])


def test_ema_and_its_schedules():
    config = recipe(**{"ema.decay": 0.996, "ema.schedule": "cosine"})
    decay = ema_decay(config, steps=100)
    assert [float(decay(jnp.int32(step))) for step in (0, 50, 100, 150)] == pytest.approx([0.996, 0.998, 1, 1])
    built, state, dataset = program(recipe(**{"ema.decay": 0.25}))
    before = jax.device_get(state.ema)
    after, _ = built.train_step(state, sharding.put_batch(next(batches(dataset, recipe())), built.mesh))
    for old, new, average in zip(*map(jax.tree.leaves, (before, after.params, after.ema)), strict=True):
        np.testing.assert_allclose(average, 0.25 * old + 0.75 * new, atol=1e-6)


def test_learning_rate_schedules():
    constant = learning_rate(recipe(**{"optimizer.learning_rate": 0.5}), steps=100)
    assert [float(constant(s)) for s in (0, 99)] == [0.5, 0.5]
    warm = learning_rate(recipe(**{"optimizer.learning_rate": 0.5, "optimizer.warmup_steps": 10}), steps=100)
    assert [float(warm(s)) for s in (0, 5, 10, 99)] == pytest.approx([0, 0.25, 0.5, 0.5])
    cosine = learning_rate(
        recipe(**{"optimizer.learning_rate": 0.5, "optimizer.warmup_steps": 10, "optimizer.schedule": "cosine"}), 110
    )
    assert [float(cosine(s)) for s in (10, 60, 110)] == pytest.approx([0.5, 0.25, 0], abs=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_is_optax_own(scale):
    """Below the limit nothing changes; above it the global norm is the limit. Zero gradients stay zero."""
    generator = np.random.default_rng(0)
    gradients = {"a": jnp.asarray(scale * generator.normal(size=(3, 4)), jnp.float32), "b": jnp.float32(scale)}
    ours, theirs = clip_by_global_norm(2.0), optax.clip_by_global_norm(2.0)
    clipped, _ = ours.update(gradients, ours.init(gradients))
    expected, _ = theirs.update(gradients, theirs.init(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    assert optax.tree.norm(ours.update(zeros, ours.init(zeros))[0]) == 0


BLOCKS = {
    **{f"method.{name}.student_block": 1 for name in ("self_flow", "dts_as", "layersync", "sra2", "repa", "repa_conv")},
    "method.self_flow.teacher_block": 3, "method.dts_as.teacher_block": 3, "method.layersync.target_block": 3,
    "alignment.student_block": 1, "alignment.teacher_block": 3, "method.dispersive.block": 2,
    "method.dispersive.group": 4, "method.delta_fm.drop_null": True, "label_dropout": 0.5,
}  # fmt: skip
EVERYTHING = "self_flow+layersync+dispersive+delta_fm+sra2+repa"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "dispersive" else pytest.mark.slow)
        for name in (*METHODS, "dts_as+delta_fm", EVERYTHING)
    ],
)
def test_a_method_knows_neither_devices_nor_microbatches(name):
    """What compares examples compares those of the global batch."""

    def two_steps(devices=1, **changes):
        history, _ = losses(recipe(**BLOCKS, **changes, **{"method.name": name, "batch_size": 32}), devices, steps=2)
        return history

    expected, actual = two_steps(), two_steps(8, accumulation=4)
    for one, other in zip(expected, actual, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            np.testing.assert_allclose(other[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
