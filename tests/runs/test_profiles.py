"""EMAs beside the teacher's: tracked, saved, resumed, chosen, and made from others afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from configs import digits
from sra_jax import config as config_lib
from sra_jax.config.profiles import profile, profiles
from sra_jax.data import registry
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.planning.report import state_bytes
from sra_jax.runs.profiles import combination, inner
from sra_jax.runs.trained import TrainedModel
from sra_jax.runs.warm_start import start_from
from sra_jax.training import loop
from sra_jax.training import program as program_lib
from sra_jax.training.step import update_profiles
from tests.in_process import call

TRACKED = "0.5,power:0.05,power:0.1,power:0.2"


def recipe(**changes):
    config = digits.get_config()
    config.update_from_flattened_dict({
        "model.width": 32, "model.depth": 2, "model.heads": 2, "alignment.teacher_block": 2, "batch_size": 16,
        "optimizer.warmup_steps": 0, "log_every": 4, "sample_every": 0, "checkpoint_every": 4, "keep": 1,
        "keep_every": 8, "ema.decay": 0.8, "ema.profiles": TRACKED, "steps": 20, "sampling.steps": 2, **changes,
    })  # fmt: skip
    return config


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.28, 0.17)])
def test_the_width_of_a_power_function(width, gamma):
    """Against the published exponents, and the deviation of the weights themselves."""
    found = profile("", f"power:{width}").gamma
    assert found == pytest.approx(gamma, abs=0.02)
    times = (np.arange(200_000) + 0.5) / 200_000
    weights = times**found / (times**found).sum()
    mean = weights @ times
    assert np.sqrt(weights @ (times - mean) ** 2) == pytest.approx(width, rel=1e-4)


def test_tracked_averages_are_weighted_sums_of_all_steps():
    """Of random parameters theta_1..theta_t; the closed form of the recursion, in float64."""
    wanted = profiles("", "0.9,power:0.05,power:0.25")
    history = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    start = {one.name: jnp.full(4, 7.0) for one in wanted}

    def step(averages, i):
        return update_profiles(averages, jnp.asarray(history)[i], wanted, i), None

    found, _ = jax.lax.scan(step, start, jnp.arange(len(history), dtype=jnp.int32))
    steps = np.arange(1, len(history) + 1)
    decayed = 0.1 * 0.9 ** (len(steps) - steps)
    np.testing.assert_allclose(found["0.9"], decayed @ history + 7 * 0.9 ** len(steps), atol=1e-5)
    for one in wanted[1:]:
        power = one.gamma + 1
        weights = (steps**power - (steps - 1.0) ** power) / len(steps) ** power
        assert weights.sum() == pytest.approx(1)
        np.testing.assert_allclose(found[one.name], weights @ history, atol=1e-5)


def test_rates_of_late_steps_are_exact():
    """1 - 1/t loses its digits in float32 where t is a million."""
    one = profile("", "power:0.05")
    expected = -np.expm1((one.gamma + 1) * np.log1p(-1 / 1_000_001.0))
    assert float(one.rate_at(jnp.int32(1_000_000))) == pytest.approx(expected, rel=1e-6)
    assert float(one.rate_at(jnp.int32(0))) == 1


def test_the_inner_product_of_profiles():
    """Against the integral, by the midpoint rule."""

    def density(gamma, end, times):
        return np.where(times <= end, (gamma + 1) * times**gamma / end ** (gamma + 1), 0)

    times = (np.arange(400_000) + 0.5) / 100_000  # 0 to 4
    for a, b in (((3.0, 2), (0.5, 4)), ((6.94, 4), (16.97, 3)), ((2.0, 3), (2.0, 3))):
        expected = (density(*a, times) * density(*b, times)).sum() / 100_000
        assert inner(a, b) == pytest.approx(expected, rel=1e-3)
        assert inner(b, a) == inner(a, b)


def test_a_tracked_profile_is_made_of_itself():
    snapshots = [(gamma, step) for step in (100, 200, 300) for gamma in (16.97, 6.94)]
    for number, one in enumerate(snapshots):
        weights, rest = combination(snapshots, one)
        np.testing.assert_allclose(weights, np.eye(len(snapshots))[number], atol=1e-5)
        assert rest < 1e-4


def walk(steps, snapshots_every, names):
    """Power functions of a random walk of parameters: {name: (snapshots, D)} at every so many steps."""
    wanted = profiles("", names)
    moves = np.random.default_rng(1).normal(size=(steps, 64)).astype(np.float32)
    path = jnp.asarray(np.cumsum(moves, axis=0) / np.sqrt(steps))

    def step(averages, i):
        averages = update_profiles(averages, path[i], wanted, i)
        return averages, averages

    start = {one.name: path[0] for one in wanted}
    _, history = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return {name: np.asarray(x)[snapshots_every - 1 :: snapshots_every] for name, x in history.items()}


@pytest.mark.parametrize(("name", "worst"), [("power:0.07", 0.01), ("power:0.15", 0.02), ("power:0.25", 0.03)])
@pytest.mark.parametrize("end", [2000, 3000])
def test_a_profile_made_afterwards_is_the_one_tracked_directly(name, worst, end):
    """From two others, saved every 100 steps; errors in units of the distance between the two."""
    every, base = 100, ("power:0.05", "power:0.1")
    history = walk(3000, every, ",".join((*base, name)))
    saved = range(every, end + 1, every)
    snapshots = [(profile("", one).gamma, step) for step in saved for one in base]
    weights, rest = combination(snapshots, (profile("", name).gamma, end))
    trees = np.stack([history[one][step // every - 1] for step in saved for one in base])
    tracked = history[name][end // every - 1]
    distance = np.linalg.norm(trees[-1] - trees[-2])
    assert rest < 0.1
    assert np.linalg.norm(weights @ trees - tracked) < worst * distance
    assert np.linalg.norm(trees[-1] - tracked) > 0.2 * distance


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The workdir of a run with further EMAs, of twenty steps at once, all of its checkpoints kept."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    loop.train(recipe(keep=5), workdir)
    return workdir


def saved(workdir, step=20):
    with ocp.CheckpointManager(
        workdir / "checkpoints", item_names=("params", "ema", "opt_state", "profiles"),
        options=ocp.CheckpointManagerOptions(read_only=True),
    ) as manager:  # fmt: skip
        items = {name: ocp.args.StandardRestore() for name in ("params", "ema", "opt_state", "profiles")}
        return dict(manager.restore(step, args=ocp.args.Composite(**items)))


@pytest.mark.slow
def test_a_resumed_run_has_the_same_averages(averaged, tmp_path):
    loop.train(recipe(steps=12), tmp_path)
    loop.train(recipe(), tmp_path)
    expected = saved(averaged)
    assert set(expected["profiles"]) == set(TRACKED.split(","))
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path), expected)
    folders = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert folders == [8, 16, 20]  # every eighth step for good, and the newest
    with pytest.raises(UserError, match=r"ema.profiles='0.5,power:.*', not '0.5'.*cannot begin later"):
        loop.train(recipe(**{"ema.profiles": "0.5"}), tmp_path, allow_config_change=True)


@pytest.mark.slow
def test_the_tools_take_any_of_them(averaged, tmp_path):
    content = saved(averaged)

    def same(model, tree):
        jax.tree.map(np.testing.assert_array_equal, model.params, tree)

    same(TrainedModel(averaged), content["ema"])
    same(TrainedModel(averaged, ema="power:0.1"), content["profiles"]["power:0.1"])
    same(TrainedModel(averaged, ema=".5"), content["profiles"]["0.5"])

    def sampled(name, *flags, code=0):
        path = tmp_path / f"{name}.npz"
        done = call("sample", f"--workdir={averaged}", "--num_samples=4", f"--output={path}", *flags, code=code)
        return done if code else (done.stderr, np.load(path)["arr_0"].astype(int))

    _, teacher = sampled("teacher")
    _, short = sampled("short", "--ema=0.5")
    said, made = sampled("made", "--ema=power:0.15")
    assert "power:0.15 is made from 15 snapshots, power:0.05, power:0.1, power:0.2 at 5 step(s)" in said
    assert not np.array_equal(short, teacher)
    assert not np.array_equal(made, teacher)
    for flags, message in (
        (("--ema=0.7",), "--ema=0.7 was not tracked; there are teacher, 0.5, power:0.05"),
        (("--ema=long",), "--ema=long is no EMA: a decay such as 0.9999, or power:S"),
        (("--ema=power:0.4",), "0.4 must be at least 0.001 and at most 0.28"),
        (("--ema=0.5", "--weights=params"), "--ema=0.5 names an EMA, and params are asked for"),
    ):
        assert message in sampled("refused", *flags, code=2).stderr
    output = tmp_path / "long.safetensors"
    call("convert_checkpoint", f"--workdir={averaged}", "--export=ema", "--ema=power:0.2", f"--output={output}")
    bias = content["profiles"]["power:0.2"]["model"]["final"]["linear"]["bias"]
    np.testing.assert_array_equal(load_file(output)["final_layer.linear.bias"], bias)


@pytest.mark.slow
def test_a_real_run_s_average_made_afterwards_is_near_the_tracked_one(averaged):
    """power:0.1 from power:0.05 and power:0.2, five times each: less than half as far off as the nearer of the two."""
    content = saved(averaged)["profiles"]
    steps = (4, 8, 12, 16, 20)
    others = [profile("", name) for name in ("power:0.05", "power:0.2")]
    snapshots = [(one.gamma, step) for step in steps for one in others]
    weights, _ = combination(snapshots, (profile("", "power:0.1").gamma, 20))
    flat = {step: saved(averaged, step)["profiles"] for step in steps}

    def vector(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    made = weights @ np.stack([vector(flat[step][one.name]) for step in steps for one in others])
    error = np.linalg.norm(made - vector(content["power:0.1"]))
    nearest = min(np.linalg.norm(vector(content[one.name]) - vector(content["power:0.1"])) for one in others)
    assert error < 0.5 * nearest


@pytest.mark.slow
def test_a_new_run_begins_at_the_sampled_one(averaged):
    source = config_lib.read(averaged / "config.json")
    source.ema.sampled = "power:0.05"
    (averaged / "config.json").write_text(config_lib.to_json(source))
    config = recipe(**{"init_from": str(averaged), "ema.profiles": "0.9"})
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
    program = program_lib.build(config, mesh, registry.load(config.data), steps=4)
    state, _ = start_from(config, program.init(jax.random.key(0)))
    for tree in (state.params, state.ema, state.profiles["0.9"]):
        jax.tree.map(np.testing.assert_array_equal, tree, saved(averaged)["profiles"]["power:0.05"])


def test_averages_lie_as_the_parameters_do_and_are_counted():
    config = recipe(**{"mesh.fsdp": 4})
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, 8), jax.devices()[:8])
    program = program_lib.build(config, mesh, registry.load(config.data), steps=4)
    for tree in program.state.profiles.values():
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(program.state.params), strict=True):
            assert one.sharding == other.sharding
    sizes = state_bytes(program)
    assert sizes["profiles"] == 4 * sizes["params"]
    config.ema.profiles = ""
    plain = program_lib.build(config, mesh, registry.load(config.data), steps=4)
    assert plain.state.profiles == {}
    assert state_bytes(plain).keys() == {"params", "ema", "opt_state"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema.profiles": "1.0"}, r"ema.profiles=1.0 must be at least 0 and below 1"),
        ({"ema.profiles": "fast"}, r"ema.profiles=fast is no EMA"),
        ({"ema.profiles": "0.9,"}, r"ema.profiles= is no EMA"),
        ({"ema.profiles": "power:0.3"}, r"at least 0.001 and at most 0.28"),
        ({"ema.profiles": "0.9,0.90"}, r"names one EMA twice"),
        ({"ema.sampled": "0.9"}, r"ema.sampled='0.9' is not tracked; allowed: teacher, 0.5, power:0.05"),
        ({"keep_every": 6}, r"keep_every=6 must be a multiple of checkpoint_every=4"),
    ],
)
def test_wrong_averages_are_refused(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        config_lib.check(recipe(**changes))
    assert "\n" not in str(caught.value)
