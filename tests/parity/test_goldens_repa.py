"""REPA and iREPA as their authors compute them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sra_jax import config as config_lib
from sra_jax.methods import distances
from sra_jax.methods.registry import Methods
from sra_jax.runs.state import Networks
from sra_jax.training.step import look, summed
from tests.parity.goldens import Golden, layers_from, layers_to, nchw, numbered, with_gradients

CODES = {"repa": "repa", "irepa": "repa_conv"}
PROJECTIONS = {"conv": "convolution", "mlp": "layers"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One of the file's runs: its name and settings there, its config, and where its projectors lie."""

    name: str
    settings: dict
    networks: Networks
    methods: Methods
    layers: dict

    @property
    def method(self):
        (method,) = self.methods
        return method


def run_of(file, name, settings):
    tensors = file.below(f"{name}/sd/")
    method, numbers = CODES[settings["code"]], settings["features"]
    keys = {
        "student_block": settings["block"], "weight": settings["weight"],
        "widths": tuple(file.arrays[f"in/features_{number}"].shape[-1] for number in numbers),
    }  # fmt: skip
    if settings["projection"] == "mlp":
        keys["hidden"] = file.meta["projector_dim"]
    if settings["code"] == "irepa":
        keys |= {"alpha": settings["alpha"], "projection": PROJECTIONS[settings["projection"]]}
        if settings["projection"] == "conv":
            keys["kernel"] = settings["kernel"]
    layers = {}
    for place in range(len(numbers)):
        stem = f"projectors.{place}" + (".projection_layer" if settings["code"] == "irepa" else "")
        head = f"{method}_head_{place}"
        if settings["projection"] == "conv":
            layers[stem] = (head, "convolution")
        else:
            layers |= numbered(tensors, stem, (head, "layers"))
    config = file.recipe(method, path=settings["path_type"], **keys)
    return Run(name, settings, Networks(config), config_lib.methods_of(config), layers)


@pytest.fixture(scope="module")
def file(golden):
    return Golden(golden("repa"))


def losses_of(file, path, runs):
    """All runs of a path by one pass of the network; each has projectors of its own."""
    config = file.recipe(path=path)
    networks, process = Networks(config), config_lib.process_of(config)
    methods = Methods(tuple(run.method for run in runs))

    def losses(params, example, features):
        seen = look(params, params, example, networks=networks, process=process, methods=methods)
        x0, e, t = (example[name] for name in ("x0", "e", "t"))
        of_path = {
            "x_t": nchw(process.perturb(x0, e, t)), "target": nchw(process.target(x0, e, t)),
            "v_pred": nchw(seen.prediction), "gen_loss": seen.denoising,
        }  # fmt: skip
        totals, of_runs = {}, {}
        for run in runs:
            method, numbers = run.method, run.settings["features"]
            given = {"x0": x0, "features": jnp.concatenate([features[number] for number in numbers], axis=-1)}
            own = dataclasses.replace(
                seen, example={**example, **method.draw(jax.random.key(0), given, process, networks.shape)},
                head=lambda name, tokens, run=run: run.networks.head(params[run.name], name)(tokens),
            )  # fmt: skip
            weight = method.weight_at(jnp.int32(0))
            total, (metrics, _) = summed(own, {method.name: weight}, run.methods)
            totals[run.name] = total
            tokens = own.student[method.student_block]
            found = {"tap": tokens, "proj_loss": metrics[f"{method.name}/loss"] - 1, "total": total - weight}
            for place, number in enumerate(numbers):
                targets = method.targets(features[number])
                projected = own.head(f"{method.name}_head_{place}", tokens)
                found |= {
                    f"features_{number}_normalized": targets, f"projected_{number}": projected,
                    f"cos_{number}": 1 - distances.cosine(projected, targets, axis=-1),
                }  # fmt: skip
            of_runs[run.name] = found
        return totals, (of_path, of_runs)

    return losses


def test_repa_runs(file):
    runs = [run_of(file, name, settings) for name, settings in file.meta["runs"].items()]
    features = {int(name): jnp.asarray(x) for name, x in file.below("in/features_").items()}
    for path in {run.settings["path_type"] for run in runs}:
        those = [run for run in runs if run.settings["path_type"] == path]
        params = file.tree() | {run.name: layers_from(file.below(f"{run.name}/sd/"), run.layers) for run in those}
        _, (of_path, found), gradients = with_gradients(losses_of(file, path, those))(params, file.example(), features)
        if file.names(f"{path}/"):
            file.compare(f"{path}/", of_path)
        for run in those:
            gradient = gradients[run.name]
            tensors = file.tensors(gradient) | layers_to(gradient[run.name], run.layers)
            own = file.arrays.get(f"{run.name}/proj_names", file.names(f"{run.name}/sd/"))
            names = [*file.parameters(), *map(str, own)]
            file.compare(
                f"{run.name}/", found[run.name], {"": tensors}, given=("proj_names", "sd/"), unit=("proj_loss",),
                names=names,
            )  # fmt: skip


def test_repa_every_array_is_read(file):
    runs = file.meta["runs"]
    file.check_prefixes("in/", *(f"{part}/" for part in (*runs, *(run["path_type"] for run in runs.values()))))
