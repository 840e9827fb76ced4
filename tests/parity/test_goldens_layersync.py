"""LayerSync as its authors compute it, in their time and in ours."""

import dataclasses

import jax.numpy as jnp
import pytest

from sra_jax import config as config_lib
from sra_jax.interop.families import from_original_sit
from sra_jax.methods import distances
from sra_jax.methods.layersync import LayerSync
from sra_jax.methods.registry import Methods
from sra_jax.runs.state import Networks
from sra_jax.training.step import look, summed
from tests.parity.goldens import EitherTime, Golden, nchw, sign, with_gradients

REVERSED = {"flow": False, "native": True}
"""The file's conventions of time."""


@pytest.fixture(scope="module")
def layersync(golden):
    """The file, and everything of it by this project: `run(params, example, reverse)`."""
    file = Golden(golden("layersync"))
    pairs, several = file.meta["pairs"], [LayerSync(*blocks) for blocks in file.meta.get("multi_pairs", [])]
    methods = {name: LayerSync(pair["k"], pair["k2"], pair["weight"]) for name, pair in pairs.items()}
    config = file.recipe("layersync", path=file.meta["path_type"])
    networks, process = Networks(config), config_lib.process_of(config)

    def losses(params, example, reverse):
        seen = look(
            params, params, example, networks=EitherTime(networks, reverse), process=process,
            methods=Methods((*methods.values(), *several)),
        )  # fmt: skip
        x0, e, t = (example[name] for name in ("x0", "e", "t"))
        common = {
            "target": nchw(process.target(x0, e, t)) * sign(reverse), "v_pred": nchw(seen.prediction) * sign(reverse),
            "gen_loss": seen.denoising,
        }  # fmt: skip
        totals, found = {}, {"x_t": nchw(process.perturb(x0, e, t)), "out": nchw(seen.prediction)}
        for name, method in methods.items():
            weight = method.weight_at(jnp.int32(0))
            total, (metrics, _) = summed(seen, {method.name: weight}, Methods((method,)))
            totals[name] = total
            taps = seen.student[method.student_block], seen.student[method.target_block]
            found[name] = common | {
                "tap_k": taps[0], "tap_k2": taps[1], "sync": distances.cosine(*taps, axis=-1) - 1,
                "sync_loss": metrics["layersync/loss"] - 1, "total": total - weight,  # ours is 1 - cos
            }
        found["each"] = [method.loss(seen).loss - 1 for method in several]
        return totals, found

    run = with_gradients(losses)

    def of(params, reverse):
        return run(params, file.example(), jnp.asarray(reverse))

    return file, of


def test_layersync_runs(layersync):
    file, run = layersync
    computed = {name: run(file.tree(), reverse) for name, reverse in REVERSED.items()}
    file.compare("x_t", {"": computed["flow"][1]["x_t"]})
    for pair in file.meta["pairs"]:
        assert file.names(f"{pair}/"), f"nothing to compare of {pair}"
        for convention in file.names(f"{pair}/"):
            _, found, gradients = computed[convention]
            tensors = {"": file.tensors(gradients[pair])}
            file.compare(f"{pair}/{convention}/", found[pair], tensors, unit=("sync_loss",))


def test_layersync_several_pairs(layersync):
    """Theirs keeps the last pair only."""
    file, run = layersync
    each = run(file.tree(), False)[1]["each"]
    if file.names("multi/"):
        file.compare("multi/", {"each": jnp.stack(each), "official": each[-1]}, unit=("each", "official"))


def test_layersync_checkpoints_of_the_original_sit(layersync):
    """With twice the output channels, and their time folded into the weights as in an import of a checkpoint."""
    file, run = layersync
    final = file.below("learn_sigma/")
    if "out" not in final:
        pytest.skip("the file has no such output")
    del final["out"]
    shape = Networks(file.recipe()).shape
    theirs = dataclasses.replace(shape, output_channels=len(final["final_layer.linear.bias"]) // shape.patch**2)
    folded = {name: from_original_sit(name, x, theirs) for name, x in (file.below("sd/") | final).items()}
    file.compare("learn_sigma/", {"out": run(file.tree(changes=folded), True)[1]["out"]}, given=final)


def test_layersync_every_array_is_read(layersync):
    file, _ = layersync
    file.check_prefixes("in/", "x_t", "multi/", "learn_sigma/", *(f"{pair}/" for pair in file.meta["pairs"]))
