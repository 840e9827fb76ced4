"""What a recipe leaves open of mesh, recomputation and accumulation is chosen by the memory, and nothing else is."""

import json
import re

import jax
import pytest

from configs import sit_b2, sit_xl2, sit_xl2_512, t2i_coco
from sra_jax import config as config_lib
from sra_jax.data import registry
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.training import fitting
from sra_jax.training import program as program_lib
from sra_jax.training.loop import train
from tests.training.test_loop import recipe

GB = 10**9


def needs(state, activations):
    """A stand-in for the compiler: so many bytes of state, and of activations by remat policy, of the whole batch."""

    def attempt(config):
        attempted.append((config.mesh.fsdp, config.model.remat, config.accumulation))
        peak = state // config.mesh.fsdp + activations[config.model.remat] // config.accumulation
        return fitting.Attempt(peak <= 16 * GB, peak, None)

    attempted = []
    return attempt, attempted


def chosen(config, attempt, **options):
    return fitting.choose(config, 16, 16 * GB, attempt, lambda _: None, **options)[0]


def test_the_state_takes_a_third_of_the_memory():
    for recipe_, memory, fsdp in ((sit_xl2, 16, 4), (sit_xl2, 33, 1), (sit_b2, 16, 1), (sit_xl2, 2, 16)):
        config = recipe_.get_config()
        first = next(fitting.candidates(config, 16, memory * GB, fitting.whole_state(config)))
        assert first == {"mesh.fsdp": fsdp, "model.remat": "dots", "accumulation": 1}


def test_the_state_is_split_within_a_slice():
    config = sit_xl2.get_config()
    for slices, most in ((1, 64), (4, 16), (64, 1)):
        found = list(fitting.candidates(config, 64, GB, 0, slices))
        assert max(settings["mesh.fsdp"] for settings in found) == most


def test_mesh_then_remat_then_accumulation():
    config = sit_xl2_512.get_config()
    state = fitting.whole_state(config)
    attempt, attempted = needs(state, {"dots": 14 * GB, "block": 5 * GB, "full": GB})
    best = chosen(config, attempt)
    assert (best.mesh.fsdp, best.model.remat, best.accumulation) == (16, "dots", 1) and len(attempted) == 2
    attempt, attempted = needs(state, {"dots": 20 * GB, "block": 5 * GB, "full": GB})
    best = chosen(config, attempt)
    assert (best.mesh.fsdp, best.model.remat, best.accumulation) == (4, "block", 1)
    assert attempted == [(4, "dots", 1), (4, "block", 1)]  # a state split further would not have helped
    attempt, attempted = needs(state, {"dots": 200 * GB, "block": 40 * GB, "full": GB})
    best = chosen(config, attempt)
    assert (best.model.remat, best.accumulation) == ("block", 4)
    assert not any(remat == "full" for _, remat, _ in attempted)


def test_on_gpus_a_batch_is_cut_before_blocks_run_twice():
    """Down to parts that keep a GPU busy; the GELUs are kept first, where the state is whole."""
    config = sit_xl2.get_config()
    state = fitting.whole_state(config)

    def order(devices, memory):
        found = fitting.candidates(config, devices, memory * GB, state, gpu=True)
        return [(each["mesh.fsdp"], each["model.remat"], each["accumulation"]) for each in found]

    quick = [(1, remat, parts) for parts in (1, 2, 4, 8) for remat in ("gelu", "dots")]
    assert order(1, 1000)[:9] == [*quick, (1, "block", 1)]
    assert order(1, 64)[:7] == [*quick[2:], (1, "block", 1)]  # the uncut batch does not fit by what it keeps alone
    assert order(8, 1000)[:3] == [(1, "gelu", 1), (1, "dots", 1), (4, "dots", 1)]
    assert order(8, 1000)[4:6] == [(1, "block", 1), (4, "block", 1)]  # halves would be of 16 examples a GPU
    assert {remat for fsdp, remat, _ in order(4, 24) if fsdp == 4} == {"dots", "block", "full"}
    assert len(set(order(8, 1000))) == len(order(8, 1000))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "unroll", "captions"),
    [("gelu", "no", False), ("dots", "yes", False), ("dots", "no", True), ("block", "no", False), ("full", "no", True)],
)
def test_a_step_needs_at_least_what_is_said(remat, unroll, captions):
    """By the compiler, of a network whose blocks are most of it."""
    config = (t2i_coco if captions else sit_xl2).get_config("smoke")
    config.update_from_flattened_dict({
        "model.depth": 8, "model.remat": remat, "model.unroll": unroll, "accumulation": 1, "batch_size": 64,
        "mesh.fsdp": 2, "mesh.data": 4,
    })  # fmt: skip
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, 8))
    dataset = registry.training_set(config)
    program = program_lib.build(config, mesh, dataset, 4)
    found = fitting.compile_step(program, program_lib.abstract_batch(dataset, 64, mesh), None)
    least = fitting.least_bytes(config, 8, fitting.whole_state(config))
    assert 0.1 * found.peak < least <= found.peak


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "digits_captions"])
def test_what_a_step_holds_on_one_device(name):
    """Against the temporaries of the compiled step, which the C library gives and takes back."""
    config = fitting.cheapest(config_lib.load(f"configs/{name}.py"))
    if name != "digits_captions":
        config.data.name = "synthetic"
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
    dataset = registry.training_set(config)
    program = program_lib.build(config, mesh, dataset, 4)
    found = fitting.compile_step(program, program_lib.abstract_batch(dataset, config.batch_size, mesh), None)
    temporaries = fitting.memory_parts(found.result)["temporaries"]
    assert 0.25 * temporaries < config_lib.held_by_a_step(config) <= temporaries


def test_what_recipes_hold():
    """Gradients grow with the network, what blocks keep with the batch; what is not valid is left to its checks."""
    config = sit_b2.get_config()
    with config.unlocked():
        config.batch_size, config.model.remat = 8, "full"
    gradients = 4 * 130e6
    assert gradients * 0.97 < config_lib.held_by_a_step(config) < 1.2 * gradients
    config.model.remat = "none"
    one = config_lib.held_by_a_step(config)
    config.batch_size = 16
    two = config_lib.held_by_a_step(config)
    assert two - one == pytest.approx(one - gradients, rel=0.05)
    config.batch_size = 0
    assert config_lib.held_by_a_step(config) == 0


def test_what_is_given_stays():
    config = sit_xl2_512.get_config()
    with config.unlocked():
        config.mesh.fsdp, config.model.remat = 2, "dots"
    attempt, attempted = needs(fitting.whole_state(config), {"dots": 40 * GB})
    best = chosen(config, attempt)
    assert {(fsdp, remat) for fsdp, remat, _ in attempted} == {(2, "dots")} and best.accumulation == 4
    with config.unlocked():
        config.accumulation = 2
    assert not fitting.is_open(config)


def test_nothing_fits():
    attempt, _ = needs(10**12, {"dots": 0, "block": 0, "full": 0})
    with pytest.raises(UserError, match=r"no mesh, model.remat and accumulation .*16 device.*use more devices"):
        chosen(sit_xl2.get_config(), attempt)


def test_an_out_of_memory_error_is_told_from_others():
    text = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.30G of"
    assert fitting.refused_bytes(RuntimeError(text)) == int(18.3 * 2**30)
    with pytest.raises(ValueError, match="shape"):
        fitting.refused_bytes(ValueError("a shape is wrong"))


def open_recipe(**changes):
    config = recipe(steps=2, checkpoint_every=2, log_every=1)
    with config.unlocked():
        config.update_from_flattened_dict({"mesh.fsdp": 0, "model.remat": "auto", "accumulation": 0, **changes})
    return config


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    """The losses of two steps with the state whole on each device, and what the step needs."""
    workdir = tmp_path_factory.mktemp("undivided")
    train(open_recipe(), workdir)
    return logged(workdir)


def logged(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_chooses_and_says_so(undivided, tmp_path, capsys):
    """On eight devices whose memory is a little more than twice the state."""
    state = fitting.whole_state(open_recipe())
    train(open_recipe(device_memory=2.2 * state / 1e9), tmp_path)
    out = capsys.readouterr().out
    line = re.search(r"chosen for 8 device\(s\): mesh (\d) x (\d) \(data x fsdp\).* needs (.*) of (.*)", out)
    assert line, out
    assert int(line[1]) * int(line[2]) == 8 and int(line[2]) > 1
    assert logged(tmp_path) == pytest.approx(undivided, rel=1e-5)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["mesh"]["fsdp"] == int(line[2]) and saved["model"]["remat"] in ("dots", "block")


@pytest.mark.slow
def test_the_flags_that_are_named_do_fit(undivided, tmp_path):
    """Given by hand is what does not fit: one line names what would, and that runs."""
    state = fitting.whole_state(open_recipe())
    given = open_recipe(**{"mesh.fsdp": 1, "model.remat": "none", "accumulation": 1}, device_memory=state / 1e9)
    with pytest.raises(UserError, match=r"^out of memory: the step needs .* a device, of .*; this fits") as refusal:
        train(given, tmp_path)
    assert "\n" not in str(refusal.value)
    named = dict(re.findall(r"--config\.(\S+)=(\S+)", str(refusal.value)))
    assert set(named) == set(fitting.KEYS)
    changes = {key: value if key == "model.remat" else int(value) for key, value in named.items()}
    train(open_recipe(**changes, device_memory=state / 1e9), tmp_path)
    assert logged(tmp_path) == pytest.approx(undivided, rel=1e-5)


def test_what_a_compiled_step_needs_is_read():
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((256, 256), "float32")).compile()
    parts = fitting.memory_parts(compiled)
    assert parts["arguments"] == parts["outputs"] == 256 * 256 * 4
