"""Settings with which a recipe suits a TPU slice: found by compiling, or chosen modestly without."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.distributed.chips import Slice, describe_devices
from sra_jax.errors import UserError
from sra_jax.planning.report import Report, build, megabytes, state_bytes, usable_bytes, without_data
from sra_jax.runs.state import Networks

STATE_COPIES = 4
"""Parameters, EMA and two moments."""


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
        policies = (self._config.model.remat,) if self._sample else ("none", "dots", "block")
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
        fitting = [entry for entry in self.tried if entry[1]["fits"]]
        if fitting:
            return min(fitting, key=lambda entry: entry[1]["step_seconds"]["in_turn"])
        return min(self.tried, key=lambda entry: entry[1]["peak_bytes"] or math.inf)

    def _meshes(self) -> list[dict[str, int]]:
        """Meshes that the batch and the network's width can be split over, from the least to the most split state."""
        size, width = self._wanted.size, self._config.model.width
        sizes = sorted({fsdp for fsdp in (1, 4, 16, 64, 256, size) if size % fsdp == 0 and width % fsdp == 0})
        meshes = [{"mesh.data": size // fsdp, "mesh.fsdp": fsdp, "mesh.model": 1} for fsdp in sizes]
        return [mesh for mesh in meshes if possible(self._config, mesh | {"accumulation": 1}, size)]

    def _state_fits(self, mesh: Mapping[str, int]) -> bool:
        if self._sample:
            return True
        needed, limit = self._state_bytes(mesh), usable_bytes(self._wanted)
        if needed > limit:
            self._say(f"{_shown(mesh)}: left out, the state alone takes {megabytes(needed)} of {megabytes(limit)}")
        return needed <= limit

    def _state_bytes(self, mesh: Mapping[str, int]) -> int:
        config = without_data(with_settings(self._config, {**mesh, "accumulation": 1}))
        return sum(state_bytes(build(config, describe_devices(self._wanted))[0]).values())

    def _refine(self, mesh: Mapping[str, int], remat: str) -> None:
        accumulation, least = self._config.accumulation if self._sample else 1, 0.0
        while possible(self._config, values := {**mesh, "model.remat": remat, "accumulation": accumulation},
                       self._wanted.size):  # fmt: skip
            limit = usable_bytes(self._wanted)
            if least > limit:
                self._say(f"{_shown(values)}: left out, needs {megabytes(least)} or more of {megabytes(limit)}")
            else:
                report = self._compile(with_settings(self._config, values))
                self.tried.append((values, report))
                self._say(f"{_shown(values)}: {_outcome(report)}")
                if report["fits"] or self._sample:
                    return
                refused_at, state = accumulation, sum(report["state_bytes"].values())
                beyond = max((report["peak_bytes"] or limit) - state, 0)
            accumulation *= 2
            least = state + beyond * refused_at / accumulation


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in values.items())


def _outcome(report: Report) -> str:
    if not report["fits"]:
        needed = megabytes(report["peak_bytes"]) if report["peak_bytes"] else "more"
        return f"does not fit, needs {needed} of {megabytes(report['hbm_bytes'])}"
    seconds = report["step_seconds"]
    return (
        f"{seconds['overlapped'] * 1e3:.1f} to {seconds['in_turn'] * 1e3:.1f} ms, {megabytes(report['peak_bytes'])} of "
        f"{megabytes(report['hbm_bytes'])}"
    )


def modest_settings(config: ConfigDict, wanted: Slice) -> Iterator[dict[str, Any]]:
    """The recipe as it is but for the mesh and accumulation: the smallest fsdp at which the state takes at most a third
    of a chip's memory, then accumulation 1, 2, 4."""
    shape = config_lib.transformer_of(config)
    graph = jax.eval_shape(Networks(config).init, jax.random.key(0))
    whole = STATE_COPIES * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(graph))
    for fsdp in (1, 4, 16, 64):
        if shape.width % fsdp == 0 and whole / fsdp <= wanted.chip.memory_bytes / 3:
            break
    fsdp = min(fsdp, wanted.size)
    for accumulation in (1, 2, 4):
        values = {"mesh.data": wanted.size // fsdp, "mesh.fsdp": fsdp, "accumulation": accumulation}
        if possible(config, values, wanted.size):
            yield values


def with_settings(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with other values."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(values))
    return config


def possible(config: ConfigDict, values: Mapping[str, Any], devices: int) -> bool:
    """Whether a config with these values passes its checks."""
    try:
        config_lib.check(with_settings(without_data(config), values), devices)
    except UserError:
        return False
    return True
