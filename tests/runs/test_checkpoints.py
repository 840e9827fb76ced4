import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sra_jax.errors import RunError, UserError
from sra_jax.runs import checksums
from sra_jax.runs.checkpoints import Checkpoints, Damaged
from sra_jax.runs.state import TrainState


def state_at(step, value=1.0):
    def tree(scale):
        return {"model": {"a": jnp.full((3, 4), scale * value), "b": jnp.arange(5.0) * scale}}

    return TrainState(step=jnp.int32(step), params=tree(1), ema=tree(2), opt_state=(tree(3), jnp.int32(step)))


def abstract():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state_at(0))


@pytest.fixture
def saved(tmp_path):
    """Steps 1 to 4, of which the newest three are kept."""
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in range(1, 5):
        checkpoints.save(state_at(step, float(step)), {"step": step, "data": {"next_batch": step}})
    checkpoints.close()
    return tmp_path


def damage(workdir, step, how):
    """What disks and half-done copies do."""
    folder = workdir / "checkpoints" / str(step)
    if how == "item":
        shutil.rmtree(folder / "ema")
    elif how == "data":
        for path in (folder / "params").rglob("d/*"):
            path.unlink()
    else:
        for path in [p for p in folder.rglob("*") if p.is_file()]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_and_keep(saved):
    checkpoints = Checkpoints(saved, keep=3)
    assert checkpoints.steps() == [2, 3, 4]
    state, meta, damaged, checked = checkpoints.restore_newest(abstract())
    same(state, state_at(4, 4.0))
    assert meta == {"step": 4, "data": {"next_batch": 4}}
    assert damaged == []
    assert checked
    same(checkpoints.restore_item("ema", abstract().ema, 3), state_at(3, 3.0).ema)
    checkpoints.close()


@pytest.mark.faults
@pytest.mark.parametrize("how", ["item", "data", "truncated"])
def test_a_damaged_newest_checkpoint_is_set_aside(saved, how):
    damage(saved, 4, how)
    checkpoints = Checkpoints(saved, keep=3)
    state, meta, damaged, _ = checkpoints.restore_newest(abstract())
    same(state, state_at(3, 3.0))
    assert meta["step"] == 3
    assert len(damaged) == 1
    assert "checkpoints/4 is damaged" in damaged[0]
    assert (saved / "damaged_checkpoints" / "4").is_dir()
    checkpoints.save(state_at(4, 4.5), {"step": 4})  # its step is free again
    checkpoints.wait()
    same(checkpoints.restore(abstract(), 4)[0], state_at(4, 4.5))
    checkpoints.close()


@pytest.mark.faults
def test_all_damaged(saved):
    for step in (2, 3, 4):
        damage(saved, step, "data")
    checkpoints = Checkpoints(saved, keep=3)
    with pytest.raises(UserError, match=r"no checkpoint can be read.*another --workdir"):
        checkpoints.restore_newest(abstract())
    assert checkpoints.steps() == [2, 3, 4]  # nothing is moved or lost
    checkpoints.close()


def test_an_unfinished_save_is_not_a_checkpoint(saved):
    shutil.copytree(saved / "checkpoints" / "4", saved / "checkpoints" / "5.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(saved, keep=3)
    assert checkpoints.steps() == [2, 3, 4]
    checkpoints.close()


def test_choosing_a_step(saved, tmp_path_factory):
    checkpoints = Checkpoints(saved, read_only=True)
    assert checkpoints.choose(None) == 4
    assert checkpoints.choose(2) == 2
    with pytest.raises(UserError, match=r"--step=7 is not saved.*2, 3, 4"):
        checkpoints.choose(7)
    with pytest.raises(UserError, match=r"checkpoints/3 cannot be read"):
        checkpoints.restore_item("ema", {"model": {"a": jax.ShapeDtypeStruct((9, 9), jnp.float32)}}, 3)
    checkpoints.close()
    empty = Checkpoints(tmp_path_factory.mktemp("empty"), read_only=True)
    with pytest.raises(UserError, match=r"no checkpoints"):
        empty.choose(None)
    empty.close()


def test_nothing_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.restore_newest(abstract()) is None
    checkpoints.close()


def array_files(folder):
    """The files that hold arrays, all of them."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d")


@pytest.mark.faults
def test_one_flipped_bit_in_any_array_file_is_noticed(tmp_path):
    """At three places of each file, one after the other. Small arrays lie among orbax's own, checked, data."""
    rng = np.random.default_rng(0)
    large = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=(40, 50)), jnp.float32) if x.ndim else x, state_at(4))
    layout = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), large)
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(large, {"step": 4})
    checkpoints.wait()
    named = set()
    for path in array_files(tmp_path / "checkpoints" / "4"):
        whole = path.read_bytes()
        for place in (0.1, 0.5, 0.9):
            damaged = bytearray(whole)
            damaged[int(place * len(whole))] ^= 4
            path.write_bytes(damaged)
            try:
                state, meta = checkpoints.restore(wanted, 4)
            except Damaged as damage:
                named |= {str(damage).split()[3]} if "checksum" in str(damage) else set()
            else:  # a byte that means nothing
                same(state, large)
                assert meta == {"step": 4}
        path.write_bytes(whole)
    same(checkpoints.restore(wanted, 4)[0], large)
    checkpoints.close()
    arrays = {f"{tree}/model/{name}" for tree in ("params", "ema", "opt_state/0") for name in "ab"}
    assert named == arrays


def flip(folder, array):
    """Change one bit of an array, in a checkpoint that is otherwise as orbax wrote it."""
    checkpoints = ocp.StandardCheckpointer()
    tree = checkpoints.restore(folder)
    path = array.split("/")
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    changed = np.array(inner[path[-1]])
    changed.reshape(-1).view(np.uint8)[7] ^= 1
    inner[path[-1]] = jnp.asarray(changed)
    checkpoints.save(folder, tree, force=True)
    checkpoints.close()


@pytest.mark.faults
def test_a_changed_array_is_named_and_the_one_before_it_used(saved):
    flip(saved / "checkpoints" / "4" / "ema", "model/b")
    checkpoints = Checkpoints(saved, keep=3)
    with pytest.raises(UserError, match=r"ema of checkpoint .*4 .*checksum of ema/model/b is not.*Other steps.*2, 3"):
        checkpoints.restore_item("ema", abstract().ema, 4)
    same(checkpoints.restore_item("params", abstract().params, 4), state_at(4, 4.0).params)
    state, _, damaged, checked = checkpoints.restore_newest(abstract())
    same(state, state_at(3, 3.0))
    assert "checksum of ema/model/b is not" in damaged[0]
    assert checked
    checkpoints.close()


@pytest.mark.faults
def test_tools_take_the_newest_that_can_be_read_and_refuse_a_damaged_one_that_is_named(saved, capsys):
    flip(saved / "checkpoints" / "4" / "ema", "model/b")
    checkpoints = Checkpoints(saved, read_only=True)

    def ema(step):
        return checkpoints.restore_item("ema", abstract().ema, step)

    step, found = checkpoints.read(None, ema)
    assert step == 3
    same(found, state_at(3, 3.0).ema)
    said = capsys.readouterr().err
    assert "checkpoints/4 cannot be read: the checksum of ema/model/b is not" in said
    assert said.endswith("Step 3 is used, the newest that can be read\n")
    assert checkpoints.read(None, lambda step: checkpoints.restore_item("params", abstract().params, step))[0] == 4
    assert checkpoints.read(2, ema)[0] == 2
    for wanted, reading in ((4, ema), (None, lambda _: ema(4))):  # named, or one that the newer ones are made from
        with pytest.raises(UserError, match=r"ema of checkpoint .*4 cannot be read"):
            checkpoints.read(wanted, reading)
    for step in (2, 3):
        damage(saved, step, "item")
    with pytest.raises(UserError, match=r"ema of checkpoint .*4 cannot be read"):
        checkpoints.read(None, ema)
    assert checkpoints.steps() == [2, 3, 4]  # nothing is moved
    checkpoints.close()


@pytest.mark.faults
@pytest.mark.parametrize(("old", "new"), [('"next_batch": 4', '"next_batch": 5'), ('"step": 4', '"step": 6')])
def test_changed_meta_data_are_noticed(saved, old, new):
    path = saved / "checkpoints" / "4" / "meta" / "metadata"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    checkpoints = Checkpoints(saved, keep=3)
    _, meta, damaged, _ = checkpoints.restore_newest(abstract())
    assert meta["step"] == 3
    assert "checksum of meta is not" in damaged[0]
    checkpoints.close()


@pytest.mark.faults
def test_a_checkpoint_without_checksums_is_read_and_that_is_said(saved, capsys):
    shutil.rmtree(saved / "checkpoints" / "4" / "checksums")
    checkpoints = Checkpoints(saved, keep=3)
    same(checkpoints.restore_item("ema", abstract().ema, 4), state_at(4, 4.0).ema)
    assert "saved without checksums" in capsys.readouterr().err
    state, _, damaged, checked = checkpoints.restore_newest(abstract())
    same(state, state_at(4, 4.0))
    assert (damaged, checked) == ([], False)
    checkpoints.close()


@pytest.mark.faults
@pytest.mark.parametrize("tree", ["params", "ema", "opt_state"])
def test_what_is_not_finite_is_neither_saved_nor_gone_on_from(saved, monkeypatch, tree):
    bad = state_at(5)
    changed = jax.tree.map(lambda x: x, getattr(bad, tree))
    (changed[0] if tree == "opt_state" else changed)["model"]["a"] = jnp.full((3, 4), jnp.nan)
    bad = bad.replace(**{tree: changed})
    checkpoints = Checkpoints(saved, keep=3)
    with pytest.raises(RunError, match=rf"after step 5.*{tree}/.*a.*newest whole checkpoint is step 4"):
        checkpoints.save(bad, {"step": 5})
    assert checkpoints.steps() == [2, 3, 4]
    with monkeypatch.context() as before:  # as it was saved once
        measure = checksums.arrays
        before.setattr(checksums, "arrays", lambda tree: (measure(tree)[0], []))
        checkpoints.save(bad, {"step": 5})
        checkpoints.wait()
    state, _, damaged, _ = checkpoints.restore_newest(abstract())
    same(state, state_at(4, 4.0))
    assert "holds NaN or infinity" in damaged[0]
    checkpoints.close()


@pytest.mark.faults
def test_a_copy_under_another_step_s_name_is_not_that_step(saved):
    shutil.copytree(saved / "checkpoints" / "4", saved / "checkpoints" / "9")
    checkpoints = Checkpoints(saved, keep=3)
    _, meta, damaged, _ = checkpoints.restore_newest(abstract())
    assert meta["step"] == 4
    assert "it is of step 4" in damaged[0]
    checkpoints.close()
