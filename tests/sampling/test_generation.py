import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from sra_jax import config as config_lib
from sra_jax.data import registry
from sra_jax.distributed import sharding
from sra_jax.errors import UserError
from sra_jax.runs.state import Networks
from sra_jax.sampling.generation import Generator, labels_for
from sra_jax.sampling.pictures import grid


def test_balanced_labels_take_classes_in_turn():
    np.testing.assert_array_equal(labels_for(np.arange(5, 12), "balanced", 3, seed=0), [2, 0, 1, 2, 0, 1, 2])


def test_uniform_labels_depend_on_seed_and_index():
    many = labels_for(np.arange(5000), "uniform", 4, seed=1)
    np.testing.assert_array_equal(many[100:110], labels_for(np.arange(100, 110), "uniform", 4, seed=1))
    assert np.all(np.abs(np.bincount(many, minlength=4) / 5000 - 0.25) < 0.03)
    assert not np.array_equal(many, labels_for(np.arange(5000), "uniform", 4, seed=2))


def test_listed_labels_are_repeated():
    np.testing.assert_array_equal(labels_for(np.arange(5), [7, 2], 8, seed=0), [7, 2, 7, 2, 7])
    with pytest.raises(UserError, match="classes run from 0 to 7"):
        labels_for(np.arange(5), [8], 8, seed=0)


def test_grid_places_images_row_by_row():
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 60, 60, 3), np.uint8)
    picture = grid(images, columns=2)
    assert picture.shape == (3 * 62 + 2, 2 * 62 + 2, 3)
    assert [picture[2 + 62 * r, 2 + 62 * c, 0] for r in range(3) for c in range(2)] == [0, 1, 2, 3, 4, 5]
    assert picture[0, 0, 0] == 255


def test_samples_of_diverged_parameters_are_refused():
    config = digits.get_config()
    config.update_from_flattened_dict(
        {"model.depth": 2, "model.width": 16, "model.heads": 2, "alignment.teacher_block": 2, "sampling.steps": 2}
    )  # fmt: skip
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
    generator = Generator(config, mesh, registry.decoder(config.data), batch_size=4, seed=0)
    params = Networks(config).init(jax.random.key(0))
    (images, _), *_ = generator.images(params, 3)
    assert images.shape == (3, 8, 8, 1)
    params["model"]["final"]["linear"]["bias"] += jnp.nan
    with pytest.raises(UserError, match=r"samples 0 to 2 hold NaN.*diverged"):
        next(generator.images(params, 3))
