import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax.errors import UserError
from sra_jax.runs.checkpoints import Checkpoints
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
    state, meta, damaged = checkpoints.restore_newest(abstract())
    same(state, state_at(4, 4.0))
    assert meta == {"step": 4, "data": {"next_batch": 4}}
    assert damaged == []
    same(checkpoints.restore_item("ema", abstract().ema, 3), state_at(3, 3.0).ema)
    checkpoints.close()


@pytest.mark.parametrize("how", ["item", "data", "truncated"])
def test_a_damaged_newest_checkpoint_is_set_aside(saved, how):
    damage(saved, 4, how)
    checkpoints = Checkpoints(saved, keep=3)
    state, meta, damaged = checkpoints.restore_newest(abstract())
    same(state, state_at(3, 3.0))
    assert meta["step"] == 3
    assert len(damaged) == 1
    assert "checkpoints/4 is damaged" in damaged[0]
    assert (saved / "damaged_checkpoints" / "4").is_dir()
    checkpoints.save(state_at(4, 4.5), {"step": 4})  # its step is free again
    checkpoints.wait()
    same(checkpoints.restore(abstract(), 4)[0], state_at(4, 4.5))
    checkpoints.close()


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
