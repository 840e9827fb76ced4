"""SRA 2 by the paper's formula on the official backbone."""

import jax.numpy as jnp
import pytest

from sra_jax import config as config_lib
from sra_jax.methods import distances
from sra_jax.methods.registry import Methods
from sra_jax.methods.sra2 import HEAD, SRA2, standardised
from sra_jax.models.transformer import unpatchify
from sra_jax.runs.state import Networks
from sra_jax.training.step import look, summed
from tests.parity.goldens import Golden, close, nchw, nhwc, numbered, with_gradients

STANDARDISE = {"plain": "none", "standard_target": "target", "standard_both": "both"}
"""The file's runs: what is standardised."""


@pytest.fixture(scope="module")
def file(golden):
    arrays = golden("sra2")
    tensors = [name.removeprefix("sd/") for name in arrays if name.startswith("sd/")]
    return Golden(arrays, numbered(tensors, "latent_head", (HEAD, "layers")))


def runs_of(file):
    own = {"meta", "sd", "in", "param_names", "x_t", "v_pred", "gen_loss", "tap", "latent"}
    return [name for name in file.names("") if name not in own]


def test_sra2_runs(file):
    meta = file.meta
    keys = {"student_block": meta["block"], "weight": meta["weight"], "beta": meta["beta"],
            "hidden": meta["head_hidden"]}  # fmt: skip
    config = file.recipe("sra2", path=meta.get("path_type", "linear"), **keys)
    networks, process = Networks(config), config_lib.process_of(config)
    runs = runs_of(file)
    assert runs, "no run"
    methods = {name: SRA2(**keys, standardise=STANDARDISE[name]) for name in runs}

    def losses(params, example):
        seen = look(params, params, example, networks=networks, process=process, methods=config_lib.methods_of(config))
        tokens = seen.student[meta["block"]]
        found = {
            "x_t": nchw(process.perturb(example["x0"], example["e"], example["t"])), "v_pred": nchw(seen.prediction),
            "gen_loss": seen.denoising, "tap": tokens,
            "latent": nchw(unpatchify(seen.head(HEAD, tokens), networks.shape.patch)),
        }  # fmt: skip
        totals, of_runs = {}, {}
        for name, method in methods.items():
            total, (metrics, _) = summed(seen, {method.name: method.weight_at(jnp.int32(0))}, Methods((method,)))
            term = method.loss(seen)
            entries = distances.smooth_l1(term.compared, term.target, method.beta)
            totals[name] = total
            of_runs[name] = {
                "align": metrics["sra2/loss"], "align_per_sample": entries.mean(axis=(1, 2)), "total": total
            }
        return totals, (found, of_runs)

    _, (found, of_runs), gradients = with_gradients(losses)(file.tree(), file.example())
    for name in found.keys() & file.arrays.keys():
        close(found[name], file.arrays[name], what=name)
    for name in runs:
        file.compare(f"{name}/", of_runs[name], {"": file.tensors(gradients[name])})


def test_sra2_standardised_latents(file):
    if "in/x0_standard" not in file.arrays:
        pytest.skip("the file has none")
    close(standardised(nhwc(file.arrays["in/x0"])), file.arrays["in/x0_standard"].transpose(0, 2, 3, 1))


def test_sra2_every_array_is_read(file):
    assert set(runs_of(file)) <= STANDARDISE.keys()
