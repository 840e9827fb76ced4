"""A study's cells as one table, one JSON file and two figures: means over seeds with their standard errors, and
differences to the baseline of the same seed."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sra_jax import config as config_lib
from sra_jax import files
from sra_jax.errors import UserError
from sra_jax.evaluation.evaluate import METRICS
from sra_jax.inspection import plots

FORMAT = "sra_jax study cell 1"
TABLE, SUMMARY, FIGURE, PROBE_FIGURE = "study.md", "study.json", "metrics.png", "probe.png"
BASELINE = "none"
SHOWN = {
    **{name: METRICS[name][0] for name in ("fid", "fid_infinity", "kid", "precision", "recall", "accuracy")},
    "denoising": "denoising loss", "probe": "probe, best block",
}  # fmt: skip
"""What the table has columns of, as far as the cells have it, with their heads."""


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
      mean: of the seeds' values.
      error: its standard error, the standard deviation (n - 1) over the root of n; None for one seed.
      seeds: how many.
    """

    mean: float
    error: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Of at least one value."""
        array = np.asarray(values, np.float64)
        error = float(array.std(ddof=1) / len(array) ** 0.5) if len(array) > 1 else None
        return cls(float(array.mean()), error, len(array))

    def text(self, digits: int, signed: bool = False) -> str:
        """`20.3 ± 0.4`, so many digits after the point."""
        number = f"{self.mean:+.{digits}f}" if signed else f"{self.mean:.{digits}f}"
        return number if self.error is None else f"{number} ± {self.error:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Arm:
    """The cells of one row: a method with further values.

    Attributes:
      name: of the row.
      method: as the recipe's variants name it.
      values: further keys with their values.
      cells: seed -> the cell's record.
    """

    name: str
    method: str
    values: Mapping[str, str]
    cells: Mapping[int, Mapping[str, Any]]

    def by_seed(self, step: int, metric: str) -> dict[int, float]:
        """A metric at a step; seeds without it are left out."""
        found = {}
        for seed, cell in self.cells.items():
            for point in cell["points"]:
                if point["step"] == step and (value := value_of(point, metric)) is not None:
                    found[seed] = value
        return found

    def probes(self) -> dict[int, np.ndarray]:
        """Accuracies (levels, blocks) of each seed that was probed."""
        found = {seed: cell["points"][-1].get("probe") for seed, cell in self.cells.items()}
        return {seed: np.array(accuracy) for seed, accuracy in found.items() if accuracy is not None}

    def flops(self) -> float:
        """Operations of a training step by formula."""
        return float(np.mean([cell["flops_per_step"] for cell in self.cells.values()]))

    def seconds(self) -> float | None:
        """Of a training step, the median over seeds of what was measured."""
        measured = [cell["seconds_per_step"] for cell in self.cells.values() if cell["seconds_per_step"]]
        return float(np.median(measured)) if measured else None


def value_of(point: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a point; `probe` is the accuracy of the best block at the best level."""
    if metric == "probe":
        return float(np.max(point["probe"])) if point.get("probe") is not None else None
    return point.get(metric)


def difference(arm: Arm, baseline: Arm | None, of: Callable[[Arm], Mapping[int, float]]) -> Mean | None:
    """The mean over seeds of an arm's value less the baseline's of the same seed; None where there is no pair."""
    if baseline is None or baseline is arm:
        return None
    ours, theirs = of(arm), of(baseline)
    pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return Mean.of(pairs) if pairs else None


def read_cell(path: Path) -> dict[str, Any]:
    """A finished cell's record.

    Raises:
      UserError: the file is none.
    """
    try:
        record = json.loads(files.read_text(path))
        if record["format"] != FORMAT or not record["points"] or not isinstance(record["protocol"], dict):
            raise ValueError(f"its format is {record['format']!r}")
        config_lib.from_json(json.dumps(record["config"]))
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no cell of a study ({error}): move it away") from error
    return record


def read_arms(output: Path) -> list[Arm]:
    """All finished cells of a folder, as rows: the baseline first.

    Raises:
      UserError: there are none, or cells that were measured in different ways.
    """
    records = [read_cell(path) for path in sorted((output / "cells").glob("*.json"))]
    if not records:
        raise UserError(f"{output}/cells holds no finished cell: run the study first, or check --output")
    for record in records:
        if record["protocol"] != records[0]["protocol"]:
            raise UserError(
                f"the cells in {output}/cells were measured in different ways, {records[0]['arm']} with seed "
                f"{records[0]['seed']} and {record['arm']} with seed {record['seed']} among them: separate them"
            )
    names = sorted({record["arm"] for record in records}, key=lambda name: (not is_baseline(name), name))
    return [
        Arm(
            name, next(r["method"] for r in records if r["arm"] == name),
            next(r["values"] for r in records if r["arm"] == name),
            {record["seed"]: record for record in records if record["arm"] == name},
        )
        for name in names
    ]  # fmt: skip


def is_baseline(arm: str) -> bool:
    """Whether a row is of runs without any method."""
    return arm == BASELINE or arm.startswith(f"{BASELINE}, ")


def baseline_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The runs without any method that have the same further values."""
    return next((one for one in arms if is_baseline(one.name) and one.values == arm.values), None)


def write(output: Path, figures: bool = True) -> Path:
    """Write table, summary and figures of all finished cells of a folder, in place of older ones; the table's path.

    Raises:
      UserError: as `read_arms`.
    """
    arms = read_arms(output)
    files.write_results({
        output / SUMMARY: lambda path: files.write_text(path, json.dumps(summary(arms), indent=1) + "\n"),
        output / TABLE: lambda path: files.write_text(path, "\n".join(tables(arms)) + "\n"),
    })  # fmt: skip
    if not figures:
        return output / TABLE
    files.write_results({output / FIGURE: lambda path: draw_metrics(path, arms)})
    probed = {arm.name: np.stack(list(arm.probes().values())) for arm in arms if arm.probes()}
    if probed:
        levels, blocks = probe_axes(arms)
        best = best_level(arms)
        files.write_results({
            output / PROBE_FIGURE: lambda path: plots.probe_figure(path, probed, blocks, levels, best)
        })  # fmt: skip
    return output / TABLE


def shown_metrics(arms: Sequence[Arm], step: int) -> list[str]:
    """Those that some cell has at a step."""
    return [name for name in SHOWN if any(arm.by_seed(step, name) for arm in arms)]


def steps_of(arms: Sequence[Arm]) -> list[int]:
    """The measured steps, ascending."""
    return list(next(iter(arms[0].cells.values()))["protocol"]["steps"])


def summary(arms: Sequence[Arm]) -> dict[str, Any]:
    """All numbers of the tables, and each seed's own."""
    first = next(iter(arms[0].cells.values()))
    rows = []
    for arm in arms:
        baseline = baseline_of(arm, arms)
        points = []
        for step in steps_of(arms):
            point: dict[str, Any] = {"step": step, "flops": step * arm.flops()}
            for name in shown_metrics([arm], step):
                values = arm.by_seed(step, name)
                entry = {**dataclasses.asdict(Mean.of(list(values.values()))), "by_seed": values}
                paired = difference(arm, baseline, functools.partial(Arm.by_seed, step=step, metric=name))
                point[name] = entry | ({"difference": dataclasses.asdict(paired)} if paired else {})
            points.append(point)
        rows.append({
            "arm": arm.name, "method": arm.method, "values": arm.values, "seeds": sorted(arm.cells),
            "flops_per_step": arm.flops(), "seconds_per_step": arm.seconds(), "points": points,
        })  # fmt: skip
    return {
        "recipe": first["recipe"], "protocol": first["protocol"], "devices": devices(arms), "baseline": BASELINE,
        "arms": rows,
    }  # fmt: skip


def devices(arms: Sequence[Arm]) -> list[str]:
    """On what the cells were made."""
    return sorted({cell["environment"]["device"] for arm in arms for cell in arm.cells.values()})


def digits_of(name: str, arms: Sequence[Arm], step: int) -> int:
    """Digits after the point: enough for two that count in the usual standard error, or for three in the value."""
    means = [Mean.of(list(values.values())) for arm in arms if (values := arm.by_seed(step, name))]
    sizes = [one.error for one in means if one.error] or [abs(one.mean) / 100 for one in means if one.mean]
    return int(np.clip(1 - np.floor(np.log10(np.median(sizes))), 1, 6)) if sizes else 3


def tables(arms: Sequence[Arm]) -> list[str]:
    """The tables as lines of markdown, the last step first."""
    first = next(iter(arms[0].cells.values()))
    protocol = first["protocol"]
    sampling = protocol["sampling"]
    lines = [
        f"`{first['recipe']}`: {protocol['num_samples']} samples of the EMA, sampler "
        f"{sampling['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance_scale']:g}, seed "
        f"{sampling['seed']}, labels {protocol['labels']}; against {protocol['reference']} "
        f"({protocol['reference_count']} images), extractor {protocol['extractor']}. Mean ± standard error over seeds; "
        "in brackets the difference to the baseline of the same seed, mean ± standard error over the pairs.",
    ]
    for name in shown_metrics(arms, steps_of(arms)[-1])[:1]:
        lines += ["", f"{SHOWN[name]} by step:", "", *_by_step(arms, name)]
    for step in reversed(steps_of(arms)):
        lines += ["", f"Step {step}:", "", *_table(arms, step)]
    lines += ["", "Cost of a training step:", "", *_costs(arms)]
    if any(arm.probes() for arm in arms):
        level = probe_axes(arms)[0][best_level(arms)]
        lines += ["", f"Probe accuracy in % by block at noise level {level:g}, last step:", "", *_probes(arms)]
    if health := _health(arms):
        lines += ["", "Health of the alignments at the last step, mean over seeds:", "", *health]
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(arms: Sequence[Arm], step: int) -> list[str]:
    return _columns(arms, [(SHOWN[name], step, name) for name in shown_metrics(arms, step)])


def _by_step(arms: Sequence[Arm], name: str) -> list[str]:
    return _columns(arms, [(str(step), step, name) for step in steps_of(arms)])


def _columns(arms: Sequence[Arm], columns: Sequence[tuple[str, int, str]]) -> list[str]:
    """A row an arm; a column is its head, a step and a metric."""
    digits = [digits_of(name, arms, step) for _, step, name in columns]
    lines = [_row(["method", "seeds", *(head for head, _, _ in columns)]), _row(["---"] * (2 + len(columns)))]
    for arm in arms:
        baseline, cells = baseline_of(arm, arms), []
        for (_, step, name), count in zip(columns, digits, strict=True):
            values = arm.by_seed(step, name)
            text = Mean.of(list(values.values())).text(count) if values else ""
            paired = difference(arm, baseline, functools.partial(Arm.by_seed, step=step, metric=name))
            cells.append(f"{text} ({paired.text(count, signed=True)})" if paired else text)
        lines.append(_row([arm.name, ", ".join(map(str, sorted(arm.cells))), *cells]))
    return lines


def _costs(arms: Sequence[Arm]) -> list[str]:
    lines = [
        _row(["method", "10^9 operations by formula", "to the baseline's", "seconds, measured", "to the baseline's"]),
        _row(["---"] * 5),
    ]
    for arm in arms:
        baseline, seconds = baseline_of(arm, arms), arm.seconds()
        ratio = f"{arm.flops() / baseline.flops():.3f}" if baseline else ""
        base = baseline.seconds() if baseline else None
        measured = [f"{seconds:.3g}" if seconds else "", f"{seconds / base:.2f}" if seconds and base else ""]
        lines.append(_row([arm.name, f"{arm.flops() / 1e9:.2f}", ratio, *measured]))
    return lines


def probe_axes(arms: Sequence[Arm]) -> tuple[list[float], list[int]]:
    """Noise levels and blocks of the probes."""
    levels = next(iter(arms[0].cells.values()))["protocol"]["probe"]["levels"]
    blocks = next(iter(next(arm for arm in arms if arm.probes()).probes().values())).shape[1]
    return list(levels), list(range(1, blocks + 1))


def best_level(arms: Sequence[Arm]) -> int:
    """Index of the noise level of the highest mean accuracy."""
    everything = np.stack([accuracy for arm in arms for accuracy in arm.probes().values()])
    return int(everything.mean(axis=(0, 2)).argmax())


def _probes(arms: Sequence[Arm]) -> list[str]:
    level, (_, blocks) = best_level(arms), probe_axes(arms)
    lines = [_row(["method", *map(str, blocks)]), _row(["---"] * (1 + len(blocks)))]
    for arm in arms:
        if not arm.probes():
            continue
        baseline, cells = baseline_of(arm, arms), []
        for block in range(len(blocks)):
            def accuracy(one: Arm, block: int = block) -> dict[int, float]:
                return {seed: 100 * float(probe[level, block]) for seed, probe in one.probes().items()}

            text = Mean.of(list(accuracy(arm).values())).text(1)
            paired = difference(arm, baseline, accuracy)
            cells.append(f"{text} ({paired.text(1, signed=True)})" if paired else text)
        lines.append(_row([arm.name, *cells]))
    return lines


def _health(arms: Sequence[Arm]) -> list[str]:
    last = {arm.name: [cell["points"][-1]["health"] for cell in arm.cells.values()] for arm in arms}
    rows = []
    for name, records in last.items():
        values = {key: float(np.mean([r[key] for r in records if key in r])) for r in records for key in r}
        if values:
            rows.append(_row([name, ", ".join(f"{key} {value:.3g}" for key, value in sorted(values.items()))]))
    return [_row(["method", "values"]), _row(["---"] * 2), *rows] if rows else []


def draw_metrics(path: Path, arms: Sequence[Arm]) -> None:
    """Each metric against steps and against arithmetic, and its difference to the baseline; bands are one standard
    error over seeds."""
    steps = steps_of(arms)
    names = [name for name in shown_metrics(arms, steps[-1]) if name != "probe"]
    lines: list[list[dict[str, Any]]] = [[], [], []]
    for name in names:
        for row in lines:
            row.append({})
        for arm in arms:
            baseline = baseline_of(arm, arms)
            found = [(step, values) for step in steps if (values := arm.by_seed(step, name))]
            points = [(step, Mean.of(list(values.values()))) for step, values in found]
            lines[0][-1][arm.name] = [(step, one.mean, one.error or 0.0) for step, one in points]
            lines[1][-1][arm.name] = [(step * arm.flops() / 1e12, one.mean, one.error or 0.0) for step, one in points]
            pairs = [
                (step, paired) for step in steps
                if (paired := difference(arm, baseline, functools.partial(Arm.by_seed, step=step, metric=name)))
            ]  # fmt: skip
            lines[2][-1][arm.name] = [(step, one.mean, one.error or 0.0) for step, one in pairs]
    plots.curves_figure(
        path, lines, [SHOWN[name] for name in names],
        ["step", "10^12 operations of training", "step (difference to the baseline, same seed)"],
    )  # fmt: skip
