"""Dispersive loss as its authors compute it: on given features, and in the whole loss in their time and in ours."""

import functools

import jax
import jax.numpy as jnp
import pytest

from sra_jax import config as config_lib
from sra_jax.methods.dispersive import Dispersive, dispersion
from sra_jax.methods.registry import Methods
from sra_jax.runs.state import Networks
from sra_jax.training.step import look, summed
from tests.parity.goldens import ONCE, EitherTime, Golden, nchw, sign, with_gradients

REVERSED = {"flow": False, "native": True}
"""The file's conventions of time."""


@pytest.fixture(scope="module")
def file(golden):
    return Golden(golden("dispersive"))


def test_dispersive_runs(file):
    """Every setting with every size of its groups."""
    methods = {
        (setting, group): Dispersive(keys["block"], keys["weight"], keys["tau"], group)
        for setting, keys in file.meta["settings"].items()
        for group in keys["groups"]
    }
    config = file.recipe("dispersive", path=file.meta["path_type"])
    networks, process = Networks(config), config_lib.process_of(config)

    def losses(params, example, reverse):
        seen = look(
            params, params, example, networks=EitherTime(networks, reverse), process=process,
            methods=Methods(tuple(methods.values())),
        )  # fmt: skip
        found = {
            "v_pred": nchw(seen.prediction) * sign(reverse), "gen_loss": seen.denoising,
            "x_t": nchw(process.perturb(example["x0"], example["e"], example["t"])),
        }  # fmt: skip
        totals, by_setting = {}, {setting: {} for setting in file.meta["settings"]}
        for (setting, group), method in methods.items():
            total, _ = summed(seen, {method.name: method.weight_at(jnp.int32(0))}, Methods((method,)))
            totals[f"{setting}/group_{group}/"] = total
            tokens = seen.student[method.block]
            by_setting[setting] |= {
                "tap": tokens, f"group_{group}/total": total,
                f"group_{group}/disp": dispersion(tokens, group, method.temperature),
            }  # fmt: skip
        return totals, (found, by_setting)

    run = with_gradients(losses)
    computed = {name: run(file.tree(), file.example(), jnp.asarray(reverse)) for name, reverse in REVERSED.items()}
    file.compare("x_t", {"": computed["flow"][1][0]["x_t"]})
    for convention, (_, (found, _), _) in computed.items():
        if file.names(f"{convention}/"):
            file.compare(f"{convention}/", found)
    for setting, keys in file.meta["settings"].items():
        groups = {f"group_{group}" for group in keys["groups"]}
        stored = {name for convention in file.names(f"{setting}/") for name in file.names(f"{setting}/{convention}/")}
        assert groups <= stored, f"nothing to compare of {setting}: {groups - stored}"
        for convention in file.names(f"{setting}/"):
            _, (_, found), gradients = computed[convention]
            tensors = {
                f"{group}/": file.tensors(gradients[f"{setting}/{group}/"])
                for group in groups.intersection(file.names(f"{setting}/{convention}/"))
            }
            file.compare(f"{setting}/{convention}/", found[setting], tensors)


def test_dispersive_of_features(file):
    """Groups of one example and equal examples among them."""
    if "func" not in file.meta:
        pytest.skip("the file has no features")
    cases = [(tau, group) for tau in file.meta["func"]["taus"] for group in file.meta["func"]["groups"]]

    @functools.partial(jax.jit, compiler_options=ONCE)
    def values_and_gradients(z):
        def mean(z, tau, group):
            terms = dispersion(z, group, tau)
            return terms.mean(), terms

        return [jax.grad(mean, has_aux=True)(z, *case) for case in cases]

    found = values_and_gradients(jnp.asarray(file.arrays["func/z"]))
    for (tau, group), (gradient, terms) in zip(cases, found, strict=True):
        file.compare(f"func/tau_{tau}/group_{group}/", {"disp": terms, "grad_z": gradient})


def test_dispersive_every_array_is_read(file):
    file.check_prefixes("in/", "x_t", "func/", *(f"{part}/" for part in (*REVERSED, *file.meta["settings"])))
