"""What the benchmark makes of its sides: they take turns, and figures become ratios and tables."""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax.benchmarks import tasks
from sra_jax.benchmarks.sides import Remote, compiler_there
from sra_jax.errors import UserError


def alternate(calls: Mapping[str, Callable[[], float]], repeats: int, note: Callable[[str], None]) -> dict[str, list]:
    """Every call in turn, `repeats` times: all figures of each.

    A turn begins with a call that is not counted: a process that has been idle finds its caches cold and, in a virtual
    machine, memory that has gone back to the host.
    """
    figures: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(repeats):
        for name, call in calls.items():
            call()
            figures[name].append(call())
        note(f"round {round_number + 1} of {repeats}: " + ", ".join(f"{n} {f[-1]:.4g}" for n, f in figures.items()))
    return figures


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def spread(values: list[float]) -> list[float]:
    """Smallest and largest."""
    return [min(values), max(values)]


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _ours(config: ConfigDict) -> Remote:
    """Our side, which trains the recipe, started as main.py would be."""
    return Remote("jax", config_lib.to_json(config), held=config_lib.held_by_a_step(config))


def train_step(config: ConfigDict, peer: str, repeats: int, peer_tuned_heap: bool = False) -> dict[str, Any]:
    """Our step with the recipe's method and without, and the peer's with a full, a truncated and no teacher.

    The peer runs as it is, eagerly; with torch.compile, too, where there is a C++ compiler.
    """
    text, held = config_lib.to_json(config), config_lib.held_by_a_step(config)
    flops = config_lib.step_flops(config).total
    memory: dict[str, float] = {}
    for side, variant in (("jax", "method"), ("pytorch", "full"))[: 2 if peer == "pytorch" else 1]:
        alone = Remote(side, text, side == "jax" or peer_tuned_heap, held)  # memory of one side doing one thing
        memory[side] = alone.call("prepare", variant)["peak_memory_bytes"]
        alone.close()
        say(f"peak memory of {side} alone: {memory[side] / 1e9:.2f} GB")
    ours = _ours(config)
    compiled = ours.call("prepare", "method")
    ours.call("prepare", "baseline")
    calls = {
        "rate": lambda: ours.call("rate"),
        "method": lambda: ours.call("step", "method"),
        "baseline": lambda: ours.call("step", "baseline"),
    }
    theirs, theirs_compiled = None, None
    if peer == "pytorch":
        theirs = Remote("pytorch", text, peer_tuned_heap, held)
        for variant in ("full", "truncated", "none"):
            theirs.call("prepare", variant)
            calls[f"peer_{variant}"] = functools.partial(theirs.call, "step", variant)
        if compiler_there():
            theirs_compiled = Remote("pytorch compiled", text, peer_tuned_heap, held)
            try:
                for variant in ("full", "truncated"):
                    theirs_compiled.call("prepare", variant)
                    calls[f"compiled_peer_{variant}"] = functools.partial(theirs_compiled.call, "step", variant)
            except EOFError:
                say("torch.compile is left out: it failed as said above")
                theirs_compiled = None
                calls = {name: call for name, call in calls.items() if not name.startswith("compiled")}
    figures = alternate(calls, repeats, say)
    ours.close()
    result = {
        "config": config.name, "method": config_lib.methods_of(config).name, "batch_size": config.batch_size,
        "dtype": config.dtype, "remat": config_lib.transformer_of(config).remat,
        "step_seconds": statistics.median(figures["method"]), "step_seconds_range": spread(figures["method"]),
        "baseline_step_seconds": statistics.median(figures["baseline"]),
        "over_baseline": ratio(figures["method"], figures["baseline"]),
        "flops": flops, "matmul_flops_per_second": statistics.median(figures["rate"]),
        "matmul_share": statistics.median(
            flops / seconds / rate for seconds, rate in zip(figures["method"], figures["rate"], strict=True)
        ),
        "compile_seconds": compiled["compile_seconds"], "peak_memory_bytes": memory["jax"],
    }  # fmt: skip
    if theirs is not None:
        theirs.close()
        result |= {
            "peer_step_seconds": statistics.median(figures["peer_full"]),
            "peer_step_seconds_range": spread(figures["peer_full"]),
            "peer_truncated_step_seconds": statistics.median(figures["peer_truncated"]),
            "peer_baseline_step_seconds": statistics.median(figures["peer_none"]),
            "speedup_vs_peer": ratio(figures["peer_full"], figures["method"]),
            "speedup_vs_truncated_peer": ratio(figures["peer_truncated"], figures["method"]),
            "baseline_speedup_vs_peer": ratio(figures["peer_none"], figures["baseline"]),
            "peer_peak_memory_bytes": memory["pytorch"],
            "memory_over_peer": memory["jax"] / memory["pytorch"],
        }
    if theirs_compiled is not None:
        theirs_compiled.close()
        result |= {
            "compiled_peer_step_seconds": statistics.median(figures["compiled_peer_full"]),
            "compiled_peer_truncated_step_seconds": statistics.median(figures["compiled_peer_truncated"]),
            "speedup_vs_compiled_peer": ratio(figures["compiled_peer_full"], figures["method"]),
            "speedup_vs_compiled_truncated_peer": ratio(figures["compiled_peer_truncated"], figures["method"]),
        }
    return result


def growth(config: ConfigDict, repeats: int) -> dict[str, Any]:
    """Step time with twice the batch, four times the tokens and twice the depth, against the arithmetic."""
    changes = {
        "as given": {},
        "batch x2": {"batch_size": 2 * config.batch_size},
        "tokens x4": {"data.image_size": 2 * config.data.image_size},
        "depth x2": {"model.depth": 2 * config.model.depth},
    }
    rows = {}
    sides, flops = {}, {}
    for name, change in changes.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(change)
        config_lib.check(changed)
        flops[name] = config_lib.step_flops(changed).total
        sides[name] = _ours(changed)
        rows[name] = {"compile_seconds": sides[name].call("prepare", "method")["compile_seconds"]}
    steps = {name: functools.partial(side.call, "step", "method") for name, side in sides.items()}
    figures = alternate(steps, repeats, say)
    for name, side in sides.items():
        side.close()
        rows[name] |= {
            "step_seconds": statistics.median(figures[name]),
            "time_ratio": ratio(figures[name], figures["as given"]),
            "arithmetic_ratio": flops[name] / flops["as given"],
        }
    return rows


def compile_times(config: ConfigDict, repeats: int) -> dict[str, Any]:
    """Seconds that tracing and compiling the step take, at the recipe's depth and at twice that depth."""
    figures: dict[str, list[float]] = {"as given": [], "depth x2": []}
    for _ in range(repeats):
        for name, factor in (("as given", 1), ("depth x2", 2)):
            changed = config.copy_and_resolve_references()
            changed.model.depth *= factor
            side = _ours(changed)  # a process that has compiled nothing yet
            figures[name].append(side.call("compile", "method"))
            side.close()
    return {
        "config": config.name, "depth": config.model.depth,
        "compile_seconds": statistics.median(figures["as given"]),
        "compile_seconds_depth_x2": statistics.median(figures["depth x2"]),
        "depth_x2_over_depth": ratio(figures["depth x2"], figures["as given"]),
    }  # fmt: skip


def sampler(
    config: ConfigDict, peer: str, repeats: int, count: int, peer_tuned_heap: bool = False
) -> dict[str, Any]:
    """One batch of samples of ours and of the peer's loop."""
    if peer == "pytorch" and config.sampling.sampler != "sde":
        raise UserError("the PyTorch loop is the SDE's: use --config.sampling.sampler=sde")
    text = config_lib.to_json(config)
    sides = {"ours": Remote("jax", text)}
    if peer == "pytorch":
        sides["peer"] = Remote("pytorch", text, peer_tuned_heap)
    prepared = {name: side.call("prepare_sampler", count) for name, side in sides.items()}
    for side in sides.values():
        side.call("sample")
    figures = alternate({name: functools.partial(side.call, "sample") for name, side in sides.items()}, repeats, say)
    for side in sides.values():
        side.close()
    result = {
        "config": config.name, "samples": count, "steps": config.sampling.steps,
        "guidance_scale": config.sampling.guidance_scale, "guidance_interval": list(config.sampling.guidance_interval),
        "seconds": statistics.median(figures["ours"]), "compile_seconds": prepared["ours"]["compile_seconds"],
    }  # fmt: skip
    if "peer" in sides:
        result |= {"peer_seconds": statistics.median(figures["peer"]),
                   "speedup_vs_peer": ratio(figures["peer"], figures["ours"])}  # fmt: skip
    return result


def table(
    config: ConfigDict, peer: str, repeats: int, count: int, peer_tuned_heap: bool = False
) -> dict[str, Any]:
    """Everything about one recipe; "markdown" is the table."""
    half = config.copy_and_resolve_references()
    half.batch_size = max(1, config.batch_size // 2)
    result = {
        "train_step": train_step(config, peer, repeats, peer_tuned_heap),
        "sampler": sampler(config, peer, repeats, count, peer_tuned_heap),
        "growth": growth(half, repeats),
        "compile": compile_times(config, 1),
    }
    step, sampling, compiling = result["train_step"], result["sampler"], result["compile"]
    rows = [(f"step of {step['method']}", f"{step['step_seconds']:.2f} s")]
    if peer == "pytorch":
        rows += [
            ("PyTorch, whole teacher", f"{step['peer_step_seconds']:.2f} s, {step['speedup_vs_peer']:.2f}x ours"),
            ("PyTorch, teacher cut at block n",
             f"{step['peer_truncated_step_seconds']:.2f} s, {step['speedup_vs_truncated_peer']:.2f}x ours"),
            *([("PyTorch with torch.compile, whole teacher and cut",
               f"{step['compiled_peer_step_seconds']:.2f} s, {step['speedup_vs_compiled_peer']:.2f}x ours; "
               f"{step['compiled_peer_truncated_step_seconds']:.2f} s, "
               f"{step['speedup_vs_compiled_truncated_peer']:.2f}x")] if "compiled_peer_step_seconds" in step else []),
            ("sampling, PyTorch's loop over ours", f"{sampling['speedup_vs_peer']:.2f}"),
            ("peak memory", f"{step['peak_memory_bytes'] / 1e9:.2f} GB "
             f"(PyTorch {step['peer_peak_memory_bytes'] / 1e9:.2f} GB)"),
        ]  # fmt: skip
    rows += [
        ("step over the baseline's", f"{step['over_baseline']:.2f}"),
        ("share of the matmul rate", f"{step['matmul_share']:.0%} of "
         f"{step['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s"),
        ("tracing and compiling", f"{compiling['compile_seconds']:.1f} s, at twice the depth "
         f"{compiling['compile_seconds_depth_x2']:.1f} s"),
    ]  # fmt: skip
    rows += [
        (f"step with {name} (arithmetic {row['arithmetic_ratio']:.2f}x)", f"{row['time_ratio']:.2f}x")
        for name, row in result["growth"].items()
        if name != "as given"
    ]
    return result | {"markdown": ["| what | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)]}


def methods(
    config: ConfigDict, names: Sequence[str], repeats: int, chip_memory: Callable[[str], float] | None = None
) -> dict[str, Any]:
    """What each method adds to the baseline's step; "markdown" is the table.

    Args:
      config: the recipe, whose keys of the methods are taken.
      names: the methods, as `method.name` takes them.
      repeats: rounds in which a method's step and the baseline's take turns, in one process.
      chip_memory: gives the bytes of a chip that a method takes elsewhere; None leaves the column out.
    """
    rows: dict[str, Any] = {}
    for name in names:
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.method.name = name
        config_lib.check(changed)
        analytic = config_lib.step_flops(changed).total
        with changed.unlocked():
            changed.method.name = "none"
        plain = config_lib.step_flops(changed).total
        with changed.unlocked():
            changed.method.name = name
        side = _ours(changed)
        compiled = side.call("flops", "method") / side.call("flops", "baseline")
        for variant in ("method", "baseline"):
            side.call("prepare", variant)
        steps = {v: functools.partial(side.call, "step", v) for v in ("method", "baseline")}
        figures = alternate(steps, repeats, say)
        side.close()
        rows[name] = {
            "flops_ratio": analytic / plain, "compiled_flops_ratio": compiled,
            "step_ratio": ratio(figures["method"], figures["baseline"]),
            "step_seconds": statistics.median(figures["method"]),
        }  # fmt: skip
        if chip_memory is not None:
            rows[name]["chip_bytes"] = chip_memory(name)
        say(f"{name}: {rows[name]}")
    head = ["method", "extra FLOPs, formula", "extra FLOPs, compiled", "step over the baseline's"]
    head += ["memory of a chip"] if chip_memory else []
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, row in rows.items():
        cells = [f"`{name}`", f"{row['flops_ratio'] - 1:+.1%}", f"{row['compiled_flops_ratio'] - 1:+.1%}"]
        cells += [f"{row['step_ratio']:.2f}"] + ([f"{row['chip_bytes'] / 1e9:.2f} GB"] if chip_memory else [])
        lines.append("| " + " | ".join(cells) + " |")
    return {"config": config.name, "batch_size": config.batch_size, "methods": rows, "markdown": lines}


def beside(sizes: tasks.Sizes, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """Tasks of `tasks.PEERS`, ours and in PyTorch; "markdown" is the table."""
    text = json.dumps(dataclasses.asdict(sizes))
    sides = {name: Remote(f"{name} tasks", text) for name in ("jax", "pytorch")}
    rows: dict[str, Any] = {}
    for task in names:
        said = sizes.texts[task]
        for side in sides.values():
            side.call("prepare", task)
        calls = {name: functools.partial(side.call, "run", task) for name, side in sides.items()}
        say(said)
        figures = alternate(calls, repeats, say)
        rows[task] = {
            "what": said, "seconds": statistics.median(figures["jax"]),
            "peer_seconds": statistics.median(figures["pytorch"]), "peer": tasks.PEERS[task],
            "peer_over_ours": ratio(figures["pytorch"], figures["jax"]),
        }  # fmt: skip
    for side in sides.values():
        side.close()
    machine = tasks.machine()
    lines = [f"| {machine} | ours | PyTorch | PyTorch's over ours |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['what']} | {row['seconds']:.2f} s | {row['peer_seconds']:.2f} s | {row['peer_over_ours']:.2f} |"
        for row in rows.values()
    ]
    return {"machine": machine, "tasks": rows, "markdown": lines}
