"""Contrastive flow matching as its authors compute it."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from sra_jax import config as config_lib
from sra_jax.methods.delta_fm import other_rows
from sra_jax.runs.state import Networks
from sra_jax.training.step import look, summed
from tests.parity.goldens import Golden, nchw, with_gradients


@pytest.fixture(scope="module")
def file(golden):
    return Golden(golden("delta_fm"))


def test_delta_fm_negatives(file):
    """The integers drawn stand for the other rows."""
    stored = file.below("in/")
    if "neg_draw" in stored:
        np.testing.assert_array_equal(other_rows(jnp.asarray(stored["neg_draw"])), stored["neg"])
    for name in {"neg", "neg_classed"} & stored.keys():
        assert (stored[name] != np.arange(len(stored[name]))).all()


def test_delta_fm_runs(file):
    @functools.cache
    def program(path):
        config = file.recipe("delta_fm", path=path)
        networks, process, methods = Networks(config), config_lib.process_of(config), config_lib.methods_of(config)
        (method,) = methods

        def losses(params, example, weight):
            seen = look(params, params, example, networks=networks, process=process, methods=methods)
            total, _ = summed(seen, {method.name: weight}, methods)
            x0, e, t = (example[name] for name in ("x0", "e", "t"))
            flow, contrast = seen.denoising, method.contrast(seen)
            of_path = {
                "x_t": nchw(process.perturb(x0, e, t)), "target": nchw(process.target(x0, e, t)),
                "v_pred": nchw(seen.prediction),
            }  # fmt: skip
            of_run = {"flow": flow, "contrast": contrast, "loss": flow - weight * contrast, "total": total}
            return {"": total}, (of_path, of_run)

        return with_gradients(losses), process, networks.shape

    for name, settings in file.meta["runs"].items():
        run, process, shape = program(settings["path_type"])
        classed = settings["classed"]
        (method,) = config_lib.methods_of(file.recipe(
            "delta_fm", weight=settings["weight"], drop_null=settings["drop_null"],
            negatives="other_label" if classed else "any",
        ))  # fmt: skip
        ending = "_classed" if classed else ""
        example = file.example() | {"y": jnp.asarray(file.arrays[f"in/labels{ending}"])}
        chosen = jnp.asarray(file.arrays[f"in/neg{ending}"])
        example |= method.contrasted(example, chosen, jnp.ones(chosen.shape, bool), process, shape)
        _, (of_path, of_run), gradients = run(file.tree(), example, method.weight_at(jnp.int32(0)))
        file.compare(f"{name}/", of_run, {"": file.tensors(gradients[""])})
        if file.names(f"{settings['path_type']}{ending}/"):
            file.compare(f"{settings['path_type']}{ending}/", of_path)


def test_delta_fm_every_array_is_read(file):
    runs = file.meta["runs"]
    paths = {run["path_type"] + ("_classed" if run["classed"] else "") for run in runs.values()}
    file.check_prefixes("in/", *(f"{part}/" for part in (*runs, *paths)))
