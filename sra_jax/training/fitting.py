"""The mesh, the recomputation and the accumulation with which a step fits the devices' memory.

A recipe leaves them open with mesh.fsdp=0 (beside mesh.data=-1), model.remat=auto and accumulation=0. What it gives is
never changed. Where the memory is not known, as on CPUs, open settings take their cheapest values.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.errors import UserError
from sra_jax.runs.state import Networks
from sra_jax.training.program import Program

SHARE = 1 / 3
"""Of a device's memory, that the state may take before it is split over more devices: activations want the rest."""

SIZES = (1, 4, 16, 64, 256)
"""Of the axis `fsdp`, beside as many devices as there are: on TPU slices they are sides and faces of the torus."""

REMAT, GPU_REMAT = ("dots", "block"), ("gelu", "dots", "block")
"""Policies from the quickest on, on GPUs and elsewhere, where a GELU is made again as it is read; `full`, the slowest,
is tried where no accumulation helps with these."""

GPU_EXAMPLES = 32
"""As many examples keep a GPU busy: cutting a batch into parts of so many costs less there than `block` does."""

FULL = 0.95
"""Share of a memory from which on a setting, by what its backward pass keeps alone, is not even compiled."""

PARTS = tuple(2**k for k in range(11))
STATE_COPIES = 4
"""Parameters, EMA and two moments."""

KEYS = ("mesh.fsdp", "model.remat", "accumulation")
"""What a recipe may leave open."""

Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the compiler says of one setting.

    Attributes:
      fits: whether the program runs in the memory.
      peak: bytes that it needs on a device; None where the compiler does not say.
      result: the compiled program, or a report on it.
    """

    fits: bool
    peak: int | None
    result: Any


def is_open(config: ConfigDict) -> bool:
    """Whether the config leaves any of the three to the memory."""
    return _mesh_is_open(config) or config.model.remat == config_lib.AUTO or config.accumulation == 0


def _mesh_is_open(config: ConfigDict) -> bool:
    return config.mesh.fsdp == 0 and config.mesh.data == -1


def opened(config: ConfigDict) -> ConfigDict:
    """The config with all three left open."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.mesh.update(data=-1, fsdp=0)
        config.model.remat, config.accumulation = config_lib.AUTO, 0
    return config


def value(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    return dict(config_lib.flatten(config))[key]


def with_settings(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with other values."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict(values))
    return config


def cheapest(config: ConfigDict) -> ConfigDict:
    """The config as it runs where memory is no question: what it leaves open is as it costs least time."""
    return with_settings(config, {
        "mesh.fsdp": 1 if _mesh_is_open(config) else config.mesh.fsdp or -1,
        "model.remat": config_lib.transformer_of(config).remat, "accumulation": config_lib.accumulation_of(config),
    })  # fmt: skip


def whole_state(config: ConfigDict) -> int:
    """Bytes of parameters, moments and EMAs, all together."""
    shapes = jax.eval_shape(Networks(config).init, jax.random.key(0))
    copies = STATE_COPIES + len(config_lib.profiles_of(config))
    return copies * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def candidates(
    config: ConfigDict, devices: int, memory: int, state: int, slices: int = 1, gpu: bool = False
) -> Iterator[Settings]:
    """Settings of what the config leaves open, in the order in which they are tried.

    The state is split over the fewest devices with which it takes a third of the memory, then over more; before the
    batch is cut into parts more is recomputed, on GPUs only where the parts would be small. What the config's checks
    refuse is left out, on GPUs also what cannot fit by `least_bytes`.

    Args:
      config: the recipe.
      devices: of all processes.
      memory: bytes of one device.
      state: as `whole_state` counts it.
      slices: on which the devices lie; the state is split within one.
      gpu: whether the devices are GPUs.
    """
    given = cheapest(config)
    meshes = [config_lib.mesh_shape(given, devices)["fsdp"]]
    if _mesh_is_open(config):
        sizes = splits(config, devices // slices // max(1, config.mesh.model))
        meshes = [size for size in sizes if state / size <= memory * SHARE] or sizes[-1:]
    remats: tuple[str, ...] = (given.model.remat,)
    if config.model.remat == config_lib.AUTO:
        remats = GPU_REMAT if gpu else REMAT
    parts = PARTS if config.accumulation == 0 else (given.accumulation,)
    order = list(itertools.product(parts, remats, meshes))
    if gpu:
        busy = [part for part in parts if config.batch_size // part >= GPU_EXAMPLES * devices]
        order = list(itertools.product(busy, [remat for remat in remats if remat != "block"], meshes)) + order
    if config.model.remat == config_lib.AUTO:
        order += itertools.product(parts, ("full",), meshes)
    for accumulation, remat, fsdp in dict.fromkeys(order):
        settings = {"mesh.fsdp": fsdp, "model.remat": remat, "accumulation": accumulation}
        wanted = with_settings(config, settings)
        if gpu and ((remat == "gelu" and fsdp > 1) or least_bytes(wanted, devices, state) > FULL * memory):
            continue  # the former pays where blocks are no loop, hence where the state is whole
        if possible(wanted, devices):
            yield settings


def least_bytes(config: ConfigDict, devices: int, state: int) -> int:
    """Bytes of a device that a step needs at least: the state, and what the backward pass keeps of every block.

    Args:
      config: the recipe with nothing left open.
      devices: of all processes.
      state: as `whole_state` counts it.
    """
    mesh = config_lib.mesh_shape(config, devices)
    examples = config.batch_size // config.accumulation // (mesh["data"] * mesh["fsdp"])
    return int(state / mesh["fsdp"] + config_lib.kept_by_blocks(config, examples, mesh["model"]))


def splits(config: ConfigDict, devices: int) -> list[int]:
    """Over how many of the devices of a slice the state may be split, in ascending order."""
    return sorted({size for size in (*SIZES, devices) if devices % size == 0 and config.model.width % size == 0})


def possible(config: ConfigDict, devices: int) -> bool:
    """Whether a config passes its checks on so many devices."""
    try:
        config_lib.check(config, devices)
    except UserError:
        return False
    return True


def choose(
    config: ConfigDict, devices: int, memory: int, attempt: Callable[[ConfigDict], Attempt],
    say: Callable[[str], None], below: int | None = None, slices: int = 1, gpu: bool = False,
) -> tuple[ConfigDict, Attempt]:
    """The first setting that the compiler fits into the memory.

    What cannot fit after what was refused is not compiled: a program keeps what it needs beyond the state when the
    state is split further, and at least half of it when the batch is cut in two.

    Args:
      config: the recipe; what it gives is not changed.
      devices: of all processes.
      memory: bytes of one device that a program may use.
      attempt: compiles a config.
      say: takes a line about each setting that does not fit, and about what was chosen and why.
      below: settings that need as many bytes or more do not fit either.
      slices: on which the devices lie.
      gpu: whether they are GPUs.

    Returns:
      The config with nothing left open, and the attempt.

    Raises:
      UserError: none fits; the message names the one that was nearest.
    """
    limit = memory if below is None else min(memory, below - 1)
    state = whole_state(config)
    refused: list[tuple[Settings, int]] = []
    nearest: tuple[float, str] = (math.inf, "")
    for settings in candidates(config, devices, memory, state, slices, gpu):
        if refused and _least(settings, refused, state) > limit:  # the compiler itself refuses the first
            continue
        wanted = with_settings(config, settings)
        found = attempt(wanted)
        if found.fits and (found.peak is None or found.peak <= limit):
            say(_explained(config, wanted, devices, memory, found, state))
            return wanted, found
        needed = gigabytes(found.peak) if found.peak else "more"
        say(f"{shown(settings)} needs {needed} of {gigabytes(limit)} a device: trying the next")
        nearest = min(nearest, (found.peak or math.inf, f"{flags(settings)} needs {needed}"))
        refused.append((settings, max((found.peak or limit) - state // settings["mesh.fsdp"], 0)))
    raise UserError(
        f"no mesh, model.remat and accumulation lets batch_size={config.batch_size} on {devices} device(s) fit into "
        f"{gigabytes(limit)} a device ({nearest[1] or 'all were left out'}); use more devices, a smaller batch_size or "
        "a smaller model"
    )


def _least(settings: Settings, refused: list[tuple[Settings, int]], state: int) -> float:
    """Bytes that a setting needs at least, by what was refused before."""
    split = state / settings["mesh.fsdp"]
    return max((
        split + beyond * other["accumulation"] / settings["accumulation"] for other, beyond in refused
        if other["model.remat"] == settings["model.remat"]
    ), default=split)  # fmt: skip


def _explained(
    config: ConfigDict, chosen: ConfigDict, devices: int, memory: int, attempt: Attempt, state: int
) -> str:
    """One line: what was chosen of what the config left open, and why."""
    shape = config_lib.mesh_shape(chosen, devices)
    ways = shape["fsdp"]
    parts = []
    if _mesh_is_open(config):
        whole = "the whole state" if ways == 1 else f"the state, split over {ways},"
        takes = gigabytes(state // ways)
        parts.append(f"mesh {shape['data']} x {ways} (data x fsdp), where {whole} takes {takes} a device")
    if config.model.remat == config_lib.AUTO:
        parts.append(f"model.remat={chosen.model.remat}")
    if config.accumulation == 0:
        parts.append(f"accumulation={chosen.accumulation}")
    needed = f"; the step needs {gigabytes(attempt.peak)} of {gigabytes(memory)}" if attempt.peak else ""
    return f"chosen for {devices} device(s): {', '.join(parts)}{needed}"


def flags(settings: Mapping[str, Any]) -> str:
    """Settings as one types them."""
    return " ".join(f"--config.{key}={value}" for key, value in settings.items())


def shown(settings: Mapping[str, Any]) -> str:
    """Settings for people."""
    return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in settings.items())


def gigabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def compile_step(program: Program, batch: Mapping[str, jax.ShapeDtypeStruct], memory: int | None) -> Attempt:
    """Compile a run's step; `result` is the compiled program, None where the compiler refused it."""
    try:
        compiled = program.train_step.lower(program.state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        return Attempt(False, refused_bytes(error), None)
    peak = sum(memory_parts(compiled).values())
    return Attempt(memory is None or peak <= memory, peak, compiled)


def memory_parts(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that a program needs on a device, by use."""
    memory: Any = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the compiler, or a device, says that it has not the memory."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or ("exceeded" in text.lower() and "memory" in text.lower())


def refused_bytes(error: BaseException) -> int | None:
    """What the compiler says that a program would need; None where it does not say.

    Raises:
      the error itself, where it is another one.
    """
    if not is_out_of_memory(error):
        raise error
    used = re.search(r"(?:Used |temporaries \()([\d.]+)([GM])\b", str(error))
    return int(float(used[1]) * (2**30 if used[2] == "G" else 2**20)) if used else None
