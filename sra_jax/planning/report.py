"""Compiling a recipe for devices that are not there, and saying what it would need and take."""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax import files
from sra_jax.data import registry as datasets
from sra_jax.distributed import sharding
from sra_jax.distributed.chips import Slice, describe_devices
from sra_jax.planning import compiled
from sra_jax.runs import PROFILES, TREES
from sra_jax.sampling.generation import Generator
from sra_jax.training import fitting
from sra_jax.training.fitting import gigabytes
from sra_jax.training.program import Program, abstract_batch
from sra_jax.training.program import build as build_program

Report = dict[str, Any]


def without_data(config: ConfigDict) -> ConfigDict:
    """The recipe on random latents of its shape where it names a set on disk but no path: no data is needed here."""
    config = config.copy_and_resolve_references()
    if not config.data.path and config.data.name != "digits":
        config.data.name = "synthetic"
        if config_lib.tells_captions(config):
            config.data.captions = "embeddings"  # as the step gets them in either form
    config.data.workers = 0
    return config


def state_bytes(program: Program) -> dict[str, int]:
    """Bytes that one device holds of parameters, EMA, optimizer state and, where there are some, further EMAs."""

    def held(tree: Any) -> int:
        return sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    state = program.state
    sizes = {name: held(getattr(state, name)) for name in TREES}
    return sizes | ({PROFILES: held(state.profiles)} if state.profiles else {})


def build(config: ConfigDict, devices: list[Any]) -> tuple[Program, Any]:
    """The run's program on these devices and its abstract batch, as main.py makes them."""
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, len(devices)), devices)
    dataset = datasets.training_set(config)
    program = build_program(config, mesh, dataset, config_lib.total_steps(config, len(dataset.source)))
    return program, abstract_batch(dataset, config.batch_size, mesh)


def lower(config: ConfigDict, devices: list[Any], sample: bool = False) -> tuple[Program, Any]:
    """The run's program on these devices and its lowered train step, or sampler."""
    program, batch = build(config, devices)
    if sample:
        generator = Generator(config, program.mesh, datasets.decoder(config.data), config.batch_size, seed=0)
        return program, generator.lower({"model": program.state.ema["model"]})
    return program, program.train_step.lower(program.state, batch)


def lower_for_platform(config: ConfigDict, devices: list[Any], platform: str) -> tuple[Program, str]:
    """The run's program on stand-in devices, and the StableHLO of its train step lowered for another platform."""
    program, batch = build(config, devices)
    lowered = program.train_step.trace(program.state, batch).lower(lowering_platforms=(platform,))
    return program, lowered.as_text()


def compile_for(config: ConfigDict, wanted: Slice, sample: bool = False, results: Path | None = None) -> Report:
    """Compile the recipe's train step, or its sampler, for a TPU slice and report on it.

    Args:
      config: the recipe.
      wanted: the slice.
      sample: compile the sampler for `batch_size` images instead of the train step.
      results: folder that keeps the report of each program, and gives it where it has it.

    Returns:
      JSON data. `fits` is False where the compiler or the chip's memory refuses the program; what the compiler did not
      get to is left out then. `step_seconds` gives the kernels' roofline time, the links' time, and both ways to add
      them: fully overlapped (the longer one) and one after the other. They are estimates from published rates.

    Raises:
      UserError: a config that cannot work on so many devices, libtpu is missing, an unknown slice.
    """
    config = without_data(config)
    devices = describe_devices(wanted)
    config_lib.check(config, len(devices), sharding.platform(devices[0]))
    program, lowered = lower(config, devices, sample)
    model, shape = config_lib.step_flops(config), config_lib.transformer_of(config)
    report: Report = {
        "recipe": config.name,
        "topology": wanted.name,
        "devices": len(devices),
        "program": "sampler" if sample else "train_step",
        "data": config.data.name,
        "mesh": dict(program.mesh.shape),
        "batch_size": config.batch_size,
        "accumulation": config_lib.accumulation_of(config),
        "remat": config_lib.transformer_of(config).remat,
        "attention": sharding.implementation_on(program.mesh, config.model.attention, shape),
        "tokens": shape.attended,
        "dtype": config.dtype,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(program.state.params["model"])),
        "state_bytes": state_bytes(program),
        "hbm_bytes": wanted.usable_bytes,
    }
    report |= _kept(lowered, wanted, results) if results else _measure(lowered, wanted)
    if "step_seconds" in report and not sample:
        report["model_flops"] = {
            name: value / len(devices) for name, value in
            (("student", model.student), ("head", model.head), ("teacher", model.teacher), ("total", model.total))
        }  # fmt: skip
        ideal = report["model_flops"]["total"] / wanted.chip.peak_flops
        report["mfu"] = {key: ideal / report["step_seconds"][key] for key in ("overlapped", "in_turn")}
    return report


def _kept(lowered: jax.stages.Lowered, wanted: Slice, results: Path) -> Report:
    """`_measure` of a program, kept in a file that is named after all that the answer depends on."""
    compiler = [importlib.metadata.version(name) for name in ("jaxlib", "libtpu")]
    reader = [inspect.getsource(module) for module in (sys.modules[__name__], compiled)]
    key = hashlib.sha256("\n".join([lowered.as_text(), repr(wanted), repr(wanted.chip), *compiler, *reader]).encode())
    path = results / f"{wanted.name.replace(':', '_')}_{key.hexdigest()[:20]}.json"
    if not path.exists():
        measured = _measure(lowered, wanted)
        results.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(measured, indent=2))
    return json.loads(path.read_text())


def _measure(lowered: jax.stages.Lowered, wanted: Slice) -> Report:
    """What the compiler makes of a lowered program."""
    chip = wanted.chip
    try:
        program = lowered.compile()
    except Exception as error:
        peak = fitting.refused_bytes(error)  # raises any other
        return {"fits": False, "peak_bytes": peak, "refused": str(error).strip().splitlines()[0][:300]}
    parts = fitting.memory_parts(program)
    cost = compiled.Program(program.as_text() or "").cost(wanted.count)
    kernels = cost.kernel_seconds(chip.peak_flops, chip.memory_bandwidth)
    links = (sum(cost.sent.values()) - sum(cost.crossing.values())) / chip.link_bandwidth
    return {
        "memory_bytes": parts,
        "peak_bytes": sum(parts.values()),
        "fits": sum(parts.values()) <= wanted.usable_bytes,
        "flops": cost.flops,
        "memory_traffic_bytes": cost.memory_bytes,
        "sent_bytes": dict(cost.sent),
        **({"sent_to_other_slices_bytes": dict(cost.crossing)} if wanted.count > 1 else {}),
        "unknown_loops": cost.unknown_loops,
        "step_seconds": {
            "arithmetic": cost.flops / chip.peak_flops, "kernels": kernels, "links": links,
            "overlapped": max(kernels, links), "in_turn": kernels + links,
        },
        "communication_share": links / (kernels + links),
    }  # fmt: skip


def describe(report: Report) -> str:
    """A report in lines for people; the last one says whether the program fits."""
    state = report["state_bytes"]
    data = " (no data.path: random latents of the recipe's shape)" if report["data"] == "synthetic" else ""
    lines = [
        f"{report['recipe']}, {report['program']}, for {report['topology']}, data {report['data']}{data}",
        f"devices           {report['devices']}, mesh "
        + ", ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
        + f"; batch {report['batch_size']} in {report['accumulation']} part(s), remat {report['remat']}, "
        f"attention {report['attention']}, {report['dtype']}",
        f"parameters        {report['parameters'] / 1e6:.2f}M; state on a device: "
        + ", ".join(f"{name} {gigabytes(size)}" for name, size in state.items()),
    ]
    if "memory_bytes" in report:
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in report["memory_bytes"].items())
        lines += [f"HBM a device      {gigabytes(report['peak_bytes'])} of {gigabytes(report['hbm_bytes'])}: {parts}"]
        lines += _describe_cost(report)
    else:
        needed = gigabytes(report["peak_bytes"]) if report["peak_bytes"] else "more"
        lines += [f"HBM a device      {needed} needed of {gigabytes(report['hbm_bytes'])}: the compiler refuses"]
    return "\n".join([*lines, f"fits: {'yes' if report['fits'] else 'no'}"])


def _describe_cost(report: Report) -> list[str]:
    seconds = report["step_seconds"]
    lines = [f"FLOPs a device    {report['flops']:.4e} compiled"]
    if "model_flops" in report:
        model = report["model_flops"]
        lines[0] += (
            f", {model['total']:.4e} analytic (student {model['student']:.3e}, head {model['head']:.3e}, teacher "
            f"{model['teacher']:.3e}): ratio {report['flops'] / model['total']:.3f}"
        )
    if report["unknown_loops"]:
        lines.append(f"                  {report['unknown_loops']} loop(s) of unknown length are counted once")
    sent = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in sorted(report["sent_bytes"].items()))
    lines += [
        f"sent by a device  {sent or 'nothing'}",
        *_describe_crossing(report),
        f"estimate          kernels {seconds['kernels'] * 1e3:.1f} ms (arithmetic alone "
        f"{seconds['arithmetic'] * 1e3:.1f} ms), links {seconds['links'] * 1e3:.1f} ms; together "
        f"{seconds['overlapped'] * 1e3:.1f} ms overlapped to {seconds['in_turn'] * 1e3:.1f} ms in turn",
    ]
    if "mfu" in report:
        lines.append(f"MFU, estimated    {report['mfu']['in_turn']:.1%} to {report['mfu']['overlapped']:.1%}")
    return lines


def _describe_crossing(report: Report) -> list[str]:
    if "sent_to_other_slices_bytes" not in report:
        return []
    kinds = {kind: size for kind, size in sorted(report["sent_to_other_slices_bytes"].items()) if size}
    shown = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in kinds.items())
    return [f"of it, to slices  {shown or 'nothing'} over the network between them, which the times leave out"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A column's heading and what it shows of a report."""

    heading: str
    value: Any


COLUMNS = (
    Row("recipe", lambda r: r["recipe"]),
    Row("slice", lambda r: r["slice"]),
    Row("mesh data x fsdp", lambda r: f"{r['mesh']['data']} x {r['mesh']['fsdp']}"),
    Row("parts", lambda r: r["accumulation"]),
    Row("remat", lambda r: r["remat"]),
    Row("fits", lambda r: "yes" if r["fits"] else "no"),
    Row("HBM", lambda r: f"{(r['peak_bytes'] or 0) / 1e9:.1f} of {r['hbm_bytes'] / 1e9:.1f} GB"),
    Row("step, estimated", lambda r: "{:.0f}-{:.0f} ms".format(
        *(1e3 * r["step_seconds"][k] for k in ("overlapped", "in_turn"))) if "step_seconds" in r else "-"),
    Row("MFU", lambda r: f"{r['mfu']['in_turn']:.0%}-{r['mfu']['overlapped']:.0%}" if "mfu" in r else "-"),
    Row("communication", lambda r: f"{r['communication_share']:.0%}" if "communication_share" in r else "-"),
)  # fmt: skip


ATTENTION_COLUMNS = (
    Row("recipe", lambda r: r["recipe"]),
    Row("tokens", lambda r: r["tokens"]),
    Row("attention", lambda r: r["attention"]),
    *(column for column in COLUMNS if column.heading in ("remat", "fits", "HBM")),
    Row("memory traffic", lambda r: gigabytes(r["memory_traffic_bytes"]) if "memory_traffic_bytes" in r else "-"),
    *(column for column in COLUMNS if column.heading in ("step, estimated", "MFU")),
)  # fmt: skip
"""What implementations of attention are compared by."""


def table(reports: list[Report], columns: Sequence[Row] = COLUMNS) -> str:
    """Reports as a Markdown table."""
    lines = ["| " + " | ".join(column.heading for column in columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(column.value(report)) for column in columns) + " |" for report in reports]
    return "\n".join(lines)
