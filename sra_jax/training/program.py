"""The compiled parts of a run: made from a checked config and a mesh, whose devices need not exist."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.data.dataset import Dataset
from sra_jax.distributed import sharding
from sra_jax.runs.state import (
    Networks,
    TrainState,
    ema_decay,
    init_state,
    learning_rate,
    make_optimizer,
    placement_on,
)
from sra_jax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a run on a mesh; nothing here holds data or parameters.

    Attributes:
      mesh: the devices.
      networks: functions of a parameter tree.
      state: a TrainState of shapes, types and shardings.
      init: `init(key) -> TrainState`, jitted; no array is ever whole on one device unless the rules say so.
      train_step: `train_step(state, batch) -> (state, metrics)`, jitted, the state donated.
    """

    mesh: Mesh
    networks: Networks
    state: TrainState
    init: Callable[[jax.Array], TrainState]
    train_step: jax.stages.Wrapped


def build(config: ConfigDict, mesh: Mesh, dataset: Dataset, steps: int) -> Program:
    """Everything that is jitted, from a checked config.

    Args:
      config: the recipe.
      mesh: the devices; they need not exist (ahead-of-time compilation for a described topology).
      dataset: gives `encode`.
      steps: length of the run, for schedules.
    """
    networks = Networks(config, placement_on(mesh, config, training=True))
    optimizer, profiles = make_optimizer(config, steps), config_lib.profiles_of(config)

    def init(key: jax.Array) -> TrainState:
        return init_state(networks, optimizer, key, profiles)

    abstract = jax.eval_shape(init, jax.random.key(0))
    layout = sharding.state_shardings(abstract, mesh)
    train_step = make_train_step(
        networks=networks, process=config_lib.process_of(config), methods=config_lib.methods_of(config),
        encode=dataset.encode, optimizer=optimizer, learning_rate=learning_rate(config, steps),
        ema_decay=ema_decay(config, steps), seed=config.seed,
        label_dropout=config.label_dropout, accumulation=config_lib.accumulation_of(config), profiles=profiles,
        null=dataset.null,
    )  # fmt: skip
    return Program(
        mesh=mesh,
        networks=networks,
        state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout),
        init=jax.jit(init, out_shardings=layout),
        train_step=jax.jit(
            train_step, donate_argnums=0, in_shardings=(layout, sharding.batch_sharding(mesh)),
            out_shardings=(layout, sharding.replicated(mesh)),
        ),
    )  # fmt: skip


def abstract_batch(dataset: Dataset, batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and sharding of a global batch, as `captions.embedded` gives it to the step."""
    split = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((batch_size, *np.shape(array)), np.asarray(array).dtype, sharding=split)
        for name, array in dataset.source[0].items()
    }
    if dataset.text:
        del batch["ids"]
        shape = (batch_size, *dataset.text.null["context"].shape)
        batch["context"] = jax.ShapeDtypeStruct(shape, np.float32, sharding=split)
    return batch
