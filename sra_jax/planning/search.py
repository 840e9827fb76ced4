"""Settings with which a recipe suits a TPU slice: those that main.py would choose there, and the fastest of all."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.distributed.chips import Slice, describe_devices
from sra_jax.errors import UserError
from sra_jax.planning.report import Report, build, state_bytes, without_data
from sra_jax.training import fitting
from sra_jax.training.fitting import cheapest, gigabytes, shown, with_settings


class Search:
    """The fastest setting that fits: meshes, remat policies and accumulations, those left out that cannot fit.

    A mesh whose state alone is more than the memory is left out. For each other mesh and remat policy the accumulation
    doubles until the program fits: more would only cost time. What a refused program needed beyond its state at most
    halves with each doubling, which rules out further ones. `remat="full"`, the slowest, is tried where nothing else
    fits. Of the sampler only meshes are tried.

    Args:
      config: the recipe.
      wanted: the slice.
      compile_one: `compile_for` of a config, perhaps from a store.
      say: takes a line about each setting.
      sample: whether the sampler is compiled.
    """

    def __init__(
        self, config: ConfigDict, wanted: Slice, compile_one: Callable[[ConfigDict], Report],
        say: Callable[[str], None], sample: bool = False,
    ):
        self._config, self._wanted, self._compile, self._say, self._sample = config, wanted, compile_one, say, sample
        self.tried: list[tuple[dict[str, Any], Report]] = []

    def run(self) -> tuple[dict[str, Any], Report]:
        """The values to set and the report of the fastest setting that fits; where none does, of the one that is
        nearest to it.

        Raises:
          UserError: the batch cannot be split over the slice.
        """
        policies = (config_lib.transformer_of(self._config).remat,) if self._sample else ("none", "dots", "block")
        possible_meshes = self._meshes()
        if not possible_meshes:
            raise UserError(
                f"no mesh of {self._wanted.size} devices suits batch_size={self._config.batch_size}; change batch_size"
            )
        # Where no mesh has room, the compiler confirms it for the one that splits the state most.
        meshes = [mesh for mesh in possible_meshes if self._state_fits(mesh)] or possible_meshes[-1:]
        for mesh, remat in itertools.product(meshes, policies):
            self._refine(mesh, remat)
        if not self._sample and not any(report["fits"] for _, report in self.tried):
            for mesh in meshes:
                self._refine(mesh, "full")
        suited = [entry for entry in self.tried if entry[1]["fits"]]
        if suited:
            return min(suited, key=lambda entry: entry[1]["step_seconds"]["in_turn"])
        return min(self.tried, key=lambda entry: entry[1]["peak_bytes"] or math.inf)

    def _meshes(self) -> list[dict[str, int]]:
        """Meshes that the batch and the network's width can be split over, from the least to the most split state."""
        size = self._wanted.size
        sizes = fitting.splits(self._config, size // self._wanted.count)
        meshes = [{"mesh.data": size // fsdp, "mesh.fsdp": fsdp, "mesh.model": 1} for fsdp in sizes]
        return [mesh for mesh in meshes if self._possible(mesh | {"accumulation": 1})]

    def _possible(self, values: Mapping[str, Any]) -> bool:
        return fitting.possible(with_settings(without_data(self._config), values), self._wanted.size)

    def _state_fits(self, mesh: Mapping[str, int]) -> bool:
        if self._sample:
            return True
        needed, limit = self._state_bytes(mesh), self._wanted.usable_bytes
        if needed > limit:
            self._say(f"{shown(mesh)}: left out, the state alone takes {gigabytes(needed)} of {gigabytes(limit)}")
        return needed <= limit

    def _state_bytes(self, mesh: Mapping[str, int]) -> int:
        config = without_data(with_settings(self._config, {**mesh, "accumulation": 1}))
        return sum(state_bytes(build(config, describe_devices(self._wanted))[0]).values())

    def _refine(self, mesh: Mapping[str, int], remat: str) -> None:
        accumulation, least = config_lib.accumulation_of(self._config) if self._sample else 1, 0.0
        while self._possible(values := {**mesh, "model.remat": remat, "accumulation": accumulation}):
            limit = self._wanted.usable_bytes
            if least > limit:
                self._say(f"{shown(values)}: left out, needs {gigabytes(least)} or more of {gigabytes(limit)}")
            else:
                report = self._compile(with_settings(self._config, values))
                self.tried.append((values, report))
                self._say(f"{shown(values)}: {_outcome(report)}")
                if report["fits"] or self._sample:
                    return
                refused_at, state = accumulation, sum(report["state_bytes"].values())
                beyond = max((report["peak_bytes"] or limit) - state, 0)
            accumulation *= 2
            least = state + beyond * refused_at / accumulation


def _outcome(report: Report) -> str:
    if not report["fits"]:
        needed = gigabytes(report["peak_bytes"]) if report["peak_bytes"] else "more"
        return f"does not fit, needs {needed} of {gigabytes(report['hbm_bytes'])}"
    seconds = report["step_seconds"]
    return (
        f"{seconds['overlapped'] * 1e3:.1f} to {seconds['in_turn'] * 1e3:.1f} ms, {gigabytes(report['peak_bytes'])} of "
        f"{gigabytes(report['hbm_bytes'])}"
    )


def begun(config: ConfigDict, wanted: Slice) -> ConfigDict:
    """The recipe with the setting that would be tried first on the slice of what it leaves open."""
    if not fitting.is_open(config):
        return config
    bare = without_data(config)
    state = fitting.whole_state(bare)
    settings = fitting.candidates(bare, wanted.size, wanted.usable_bytes, state, wanted.count)
    return with_settings(config, next(settings, {}))


def chosen(
    config: ConfigDict, wanted: Slice, compile_one: Callable[[ConfigDict], Report], say: Callable[[str], None]
) -> Report:
    """The report on what main.py would choose on the slice of what the recipe leaves open.

    Where nothing fits, it is of the setting that was nearest.

    Raises:
      UserError: the batch cannot be split over the slice.
    """
    config = without_data(config)
    tried: list[Report] = []

    def attempt(config: ConfigDict) -> fitting.Attempt:
        report = compile_one(config)
        tried.append(report)
        return fitting.Attempt(report["fits"], report["peak_bytes"], report)

    if not fitting.is_open(config):
        return compile_one(config)
    try:
        found = fitting.choose(config, wanted.size, wanted.usable_bytes, attempt, say, slices=wanted.count)
        return found[1].result
    except UserError as error:
        if not tried:
            config_lib.check(cheapest(config), wanted.size)  # why no setting could be tried
            raise
        say(str(error))
        return min(tried, key=lambda report: report["peak_bytes"] or math.inf)
