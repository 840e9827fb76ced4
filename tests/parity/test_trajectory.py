"""A hundred training steps of ours beside a hundred of PyTorch's, on the same draws.

Both round differently, and an optimizer that divides by the root of small squares makes more of it. How much, the first
steps say: what is apart there, in one step, is rounding, and may grow no faster than that times the number of steps and
`SLACK`. A difference in what is computed, however small, is larger from the first step on, or grows faster.
"""

import jax
import numpy as np
import pytest

from configs import dit_b2, sit_b2
from sra_jax import config as config_lib
from sra_jax.benchmarks.peers import PeerStep
from sra_jax.interop.pytorch import pytorch_from_params
from sra_jax.runs.state import Networks, TrainState, make_optimizer
from sra_jax.training.step import draw, make_train_step

STEPS, FIRST = 100, 10
LOOKED_AT = np.array([*range(1, FIRST + 1), *range(2 * FIRST, STEPS + 1, FIRST)])
SLACK = 4.0
ROUNDING = 1e-5
"""More than this share of its way, or of the loss, no trajectory is off after its first steps by rounding alone."""

RECIPES = {"sit": sit_b2, "dit": dit_b2}
BATCH = 4


def recipe(name, method):
    config = RECIPES[name].get_config(f"smoke,{method}")
    with config.unlocked():
        config.batch_size = BATCH
        config.data.image_size = 8
        config.model.update(width=32, depth=3, heads=2)
        config.alignment.update(student_block=1, teacher_block=2)
    return config


def trajectories(config, **peer_changes):
    """Losses (STEPS,2) of both, how far ours is from PyTorch's after the steps LOOKED_AT and from where it began,
    parameters and EMA (S,2), and the norm of all parameters."""
    networks, process, methods = Networks(config), config_lib.process_of(config), config_lib.methods_of(config)
    optimizer = make_optimizer(config, STEPS)
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(networks.init, jax.random.key(0))
    params = jax.tree.map(lambda x: generator.normal(0, 0.05, x.shape).astype(np.float32), shapes)
    data, model, aligned = config.data, config.model, config.alignment
    size = (BATCH, data.image_size, data.image_size, data.channels)

    def encode(batch, key):
        return batch["x0"]

    step = jax.jit(
        make_train_step(
            networks=networks, process=process, methods=methods, encode=encode, optimizer=optimizer,
            learning_rate=lambda step: config.optimizer.learning_rate, ema_decay=lambda step: config.ema.decay,
            seed=config.seed, label_dropout=config.label_dropout, accumulation=1,
        )
    )  # fmt: skip

    @jax.jit
    def drawn(number, batch):  # as the train step draws them
        _, key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number))
        return draw(
            key, batch["x0"], batch, process, methods, networks.shape, label_dropout=config.label_dropout
        )  # fmt: skip

    peer = PeerStep(
        {
            "input_size": data.image_size, "patch": model.patch, "channels": data.channels, "width": model.width,
            "depth": model.depth, "heads": model.heads, "hidden": 4 * model.width, "classes": data.num_classes,
            "outputs": config_lib.transformer_of(config).output_channels,
        },
        pytorch_from_params(params, data.channels, data.image_size),
        **{
            "process": config.process.name, "student_block": aligned.student_block,
            "teacher_block": aligned.teacher_block, "weight": aligned.weight, "threads": 1,
            "distance": aligned.distance, **peer_changes,
        },
    )  # fmt: skip
    teacher = "truncated" if methods.teaching else "none"
    state = TrainState(np.int32(0), params, params, optimizer.init(params))
    begun = pytorch_from_params(params, data.channels, data.image_size)
    losses, apart, way = [], [], []
    for number in range(STEPS):
        labels = generator.integers(0, data.num_classes, BATCH).astype(np.int32)
        batch = {"x0": generator.normal(size=size).astype(np.float32), "label": labels}
        example = {name: np.asarray(array) for name, array in drawn(number, batch).items()}
        example.setdefault("s", example["t"])  # a teacher's time, of which the baseline draws none
        example |= {name: example[name].astype(np.float32) for name in ("t", "s")}
        state, metrics = step(state, batch)
        theirs = peer.step(
            {k: v.transpose(0, 3, 1, 2).copy() if v.ndim == 4 else v for k, v in example.items()}, teacher
        )
        losses.append((float(metrics["loss"]), theirs))
        if number + 1 not in LOOKED_AT:
            continue
        ours = {
            tree: pytorch_from_params(getattr(state, tree), data.channels, data.image_size)
            for tree in ("params", "ema")
        }
        apart.append([
            distance(ours[tree], {name: x.numpy() for name, x in network.state_dict().items()})
            for tree, network in (("params", peer.student), ("ema", peer.teacher))
        ])  # fmt: skip
        way.append([distance(ours[tree], begun) for tree in ("params", "ema")])
    return np.array(losses), np.array(apart), np.array(way), distance(begun, dict.fromkeys(begun, 0.0))


def distance(one, other):
    """The L2 norm of the difference of all tensors together, biases of keys apart.

    A softmax does not see the latter: their gradients are rounding and nothing else, and Adam makes whole steps of it.
    """
    total = 0.0
    for name in one:
        difference = np.float64(one[name]) - other[name]
        if name.endswith("attn.qkv.bias"):
            difference.reshape(3, -1)[1] = 0
        total += float(np.square(difference).sum())
    return total**0.5


def within_rounding(losses, apart, way, norm):
    """Whether two trajectories differ by rounding alone."""
    off = np.abs(losses[:, 0] / losses[:, 1] - 1)
    steps = LOOKED_AT
    per_step = (apart / steps[:, None])[:FIRST].max(axis=0)
    # every update rounds all parameters once, however short its way: the EMA's is a ten thousandth of theirs
    floor = np.finfo(np.float32).eps * norm * steps[:, None]
    # after FIRST steps: in the very first, an entry whose gradient is next to nothing may go the other way
    begun_alike = (apart < ROUNDING * way + floor)[FIRST - 1].all() and (off[:FIRST] < ROUNDING).all()
    parameters = (apart <= SLACK * per_step * steps[:, None]).all()
    return begun_alike and parameters and (off <= SLACK * off[:FIRST].max() * np.arange(1, STEPS + 1)).all()


@pytest.mark.parametrize("method", ["none", "sra", "sra_cosine"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_hundred_steps_are_pytorchs(name, method):
    found = trajectories(recipe(name, method))
    assert within_rounding(*found)
    losses, *_ = found
    assert losses[-FIRST:, 0].mean() < losses[:FIRST, 0].mean()


@pytest.mark.parametrize("change", [{"weight": 0.501}, {"teacher_block": 3}])
def test_a_small_difference_is_more_than_rounding(change):
    assert not within_rounding(*trajectories(recipe("sit", "sra_cosine"), **change))
