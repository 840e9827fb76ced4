"""Beginning a new run from the weights of another: fine-tuning, or SRA on top of a trained baseline."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax import remote
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.runs import CONFIG, profiles
from sra_jax.runs.checkpoints import Checkpoints, check_place
from sra_jax.runs.state import Networks, TrainState


def start_from(config: ConfigDict, state: TrainState) -> tuple[TrainState, str]:
    """A new run's state with the EMA of the run at `config.init_from` as student and teacher.

    The EMA is taken because it is the better model and the one that samples come from. The newest checkpoint is read.
    A projection head is taken where both runs have one; otherwise the new run's own is kept. Step and optimizer are
    the new run's. Resolutions may differ: positions are not parameters.

    Args:
      config: the new run's.
      state: fresh, laid out over the devices.

    Returns:
      The state and a message that says what was taken.

    Raises:
      UserError: no such run, or a model of other shapes.
    """
    workdir = remote.path(config.init_from)
    check_place("--config.init_from", workdir)
    try:
        saved = config_lib.read(workdir / CONFIG)
    except UserError as error:
        raise UserError(f"--config.init_from={workdir}: {error}") from error
    shapes = jax.eval_shape(Networks(saved).init, jax.random.key(0))
    wrong = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {old.shape} there, {new.shape} here"
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(shapes["model"]), jax.tree.leaves(state.params["model"]), strict=True
        )
        if old.shape != new.shape
    ]
    if wrong:
        raise UserError(
            f"--config.init_from={workdir} holds a model of other shapes:\n  " + "\n  ".join(wrong[:5])
            + "\nGive this run the model, data.channels, data.num_classes and process of that one"
        )  # fmt: skip
    placed = state.step.sharding
    assert isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh), "a state lies on a mesh"
    layout = sharding.state_shardings(shapes, placed.mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        step, taken = checkpoints.read(None, lambda step: profiles.restore(checkpoints, saved, abstract, step))
    finally:
        checkpoints.close()
    params = {name: taken.get(name, own) for name, own in state.params.items()}
    head = " and its head" if any(name != "model" and name in taken for name in params) else ""
    message = f"starting from the EMA{head} of step {step} in {workdir}"
    copies = {name: jax.tree.map(jnp.copy, params) for name in state.profiles}
    return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params), profiles=copies), message
