"""Every ImageNet recipe's `:smoke` loses what it always lost: twenty steps on synthetic latents, to 1e-4.

The numbers are the same for every supported version of JAX. Who means to change them writes the file anew:

    python -m tests.training.test_smoke_losses
"""

import functools
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from sra_jax import config as config_lib
from sra_jax.data import pipeline, registry
from sra_jax.distributed import sharding
from sra_jax.training.loop import build

RECIPES = ("dit_b2", "dit_l2", "dit_xl2", "sit_b2", "sit_l2", "sit_xl2", "sit_xl2_512")
FILE = Path(__file__).with_name("smoke_losses.json")


def losses(recipe: str) -> list[float]:
    config = importlib.import_module(f"configs.{recipe}").get_config("smoke")
    with config.unlocked():
        config.name = ""  # the same programs are run once
    return list(_trained(config_lib.to_json(config)))


@functools.cache
def _trained(text: str) -> tuple[float, ...]:
    config = config_lib.from_json(text)
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
    dataset = registry.training_set(config)
    program = build(config, mesh, dataset, config.steps)
    state = program.init(jax.random.key(config.seed))
    rows = sharding.process_rows(mesh, config.batch_size)
    stream = pipeline.batches(dataset.source, batch_size=config.batch_size, seed=config.seed, rows=rows)
    found = []
    for _ in range(config.steps):
        state, metrics = program.train_step(state, sharding.put_batch(next(stream), mesh))
        found.append(float(metrics["loss"]))
    stream.close()
    return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_what_they_were(recipe):
    np.testing.assert_allclose(losses(recipe), json.loads(FILE.read_text())[recipe], rtol=1e-4)


if __name__ == "__main__":
    lines = [f'"{recipe}": {json.dumps([round(x, 7) for x in losses(recipe)])}' for recipe in RECIPES]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
