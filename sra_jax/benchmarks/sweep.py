"""Which guidance, interval, EMA and number of steps are best for a checkpoint: every combination, measured.

    <output>/settings/<setting>.json   a finished setting: its metrics, and its FID without each tenth of the samples
    <output>/{sweep.md,sweep.json,sweep.png}   table, all numbers, heat map

All settings start from the same noise and labels, so that differences between them have less error than they
themselves: errors are those of a jackknife, of the FID and of its difference to the best setting's.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sra_jax import config as config_lib
from sra_jax import files
from sra_jax.errors import UserError
from sra_jax.evaluation import evaluate, record
from sra_jax.evaluation.features import Extractor, Features
from sra_jax.evaluation.frechet import covariance_factor, frechet_distance
from sra_jax.evaluation.reference import Reference
from sra_jax.evaluation.samples import Samples, unfinished_folder
from sra_jax.evaluation.statistics import Moments
from sra_jax.inspection import plots
from sra_jax.runs.trained import TrainedModel
from sra_jax.sampling.generation import Generator, generator_of

FORMAT = "sra_jax sweep setting 1"
TABLE, SUMMARY, FIGURE = "sweep.md", "sweep.json", "sweep.png"
MOST_SETTINGS = 10_000


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way of sampling.

    Attributes:
      scale: of guidance.
      interval: in which samples are guided, fractions of the time range.
      ema: which EMA.
      steps: of the sampler.
    """

    scale: float
    interval: tuple[float, float]
    ema: str
    steps: int | str

    @property
    def name(self) -> str:
        """Of its file."""
        low, high = self.interval
        text = f"scale={self.scale:g},interval={low:g}-{high:g},ema={self.ema},steps={self.steps}"
        return re.sub(r"[^\w.=,-]", "_", text)

    @property
    def row(self) -> str:
        """What it has in common with the other scales of its row in the heat map."""
        low, high = self.interval
        return f"{self.ema}, [{low:g}, {high:g}], {self.steps} steps"


def settings_of(
    scales: Sequence[float], intervals: Sequence[tuple[float, float]], emas: Sequence[str], steps: Sequence[int | str]
) -> list[Setting]:
    """Every combination; without guidance the interval makes no difference, and only the first is taken.

    Raises:
      UserError: none, very many, or one twice.
    """
    for what, given in (
        ("--guidance_scales", scales), ("--guidance_intervals", intervals), ("--emas", emas), ("--steps", steps)
    ):  # fmt: skip
        if not given or len(set(given)) < len(given):
            raise UserError(f"{what}={','.join(map(str, given))} must name at least one, and none twice")
    found = [
        Setting(scale, interval, ema, count)
        for ema, count, interval, scale in itertools.product(emas, steps, intervals, scales)
        if scale > 1 or interval == intervals[0]
    ]
    if len(found) > MOST_SETTINGS:
        raise UserError(f"{len(found)} settings are more than the {MOST_SETTINGS} that one sweep measures: give fewer")
    return found


class Weights:
    """A checkpoint's EMAs, the last one that was asked for in memory: settings with the same EMA follow each other.

    Args:
      model: the checkpoint with its own EMA and `sampling` values.
      sampling: values that all settings share.
    """

    def __init__(self, model: TrainedModel, sampling: Mapping[str, Any]):
        self.workdir, self.step = model.workdir, model.step
        self._sampling, self._ema, self._model = sampling, model.config.ema.sampled, model
        self._checksums: dict[str, str] = {}

    def model(self, setting: Setting) -> TrainedModel:
        """The checkpoint with a setting's EMA and sampler.

        Raises:
          UserError: there is no such EMA, or the run's sampler knows no such value.
        """
        if setting.ema != self._ema:
            self._model = TrainedModel(self.workdir, self.step, sampling=self._sampling, ema=setting.ema)
            self._ema = setting.ema
        return self._model.resampled({
            **self._sampling, "guidance_scale": setting.scale, "guidance_interval": setting.interval,
            "steps": setting.steps,
        })  # fmt: skip

    def checksum(self, setting: Setting) -> str:
        """Of a setting's parameters."""
        if setting.ema not in self._checksums:
            self._checksums[setting.ema] = record.params_checksum(self.model(setting).params)
        return self._checksums[setting.ema]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How each setting is measured.

    Attributes:
      weights: of the checkpoint.
      num_samples: samples of each setting.
      labels: their classes, as `generation.labels_for` takes them.
      batch_size: samples at a time.
      seed: of their noise.
      metrics: beside FID.
      folds: parts of the jackknife.
    """

    weights: Weights
    num_samples: int
    labels: str | Sequence[int]
    batch_size: int
    seed: int
    metrics: tuple[str, ...]
    folds: int


def run(
    output: Path, plan: Plan, settings: Sequence[Setting], extractor: Extractor, reference: Reference,
    translation: np.ndarray | None,
) -> Path:
    """Measure what is missing, and write table, numbers and heat map; the table's path.

    Raises:
      UserError: the folder holds settings that were measured otherwise.
    """
    for setting in settings:
        path = output / "settings" / f"{setting.name}.json"
        if path.exists():
            read(path)
            continue
        measured = json.dumps(measure(plan, setting, extractor, reference, translation), indent=1)
        files.write_results({path: functools.partial(files.write_text, text=measured + "\n")})
        jax.clear_caches()
    return write(output)


def measure(
    plan: Plan, setting: Setting, extractor: Extractor, reference: Reference, translation: np.ndarray | None
) -> dict[str, Any]:
    """A setting's result: metrics, `record`, and `without`, the FID without each part of the samples."""
    model = plan.weights.model(setting)
    generator = generator_of(model, plan.batch_size, plan.seed)
    made = made_by(plan, setting, generator, extractor, reference)
    samples = Samples(
        generator, model.params, plan.num_samples, plan.labels, extractor,
        folder=unfinished_folder(plan.weights.workdir, {"sweep": record.plain(made)}),
    )  # fmt: skip
    folds = Folds(plan.num_samples, plan.folds)
    with samples.locked():
        stream = samples.features(setting.name)
        result = evaluate.measure_features(
            folds.watched(stream), reference, extractor, metrics=("fid", *plan.metrics),
            image_size=generator.image_size(), seed=plan.seed, translation=translation,
        )  # fmt: skip
        without = folds.without(reference)
        samples.forget()
    return {
        "format": FORMAT, "setting": dataclasses.asdict(setting), **result, "without": without, record.NAME: made,
    }  # fmt: skip


def made_by(
    plan: Plan, setting: Setting, generator: Generator, extractor: Extractor, reference: Reference
) -> dict[str, Any]:
    """What shapes a setting's result, whose images the generator makes."""
    model = plan.weights.model(setting)
    return {
        **record.of_model(model.config, model.step, model.weights, plan.weights.checksum(setting), generator),
        "labels": plan.labels,
        **record.of_measurement(extractor, reference),
    }  # fmt: skip


class Folds:
    """Statistics of parts of a stream of features: sample i belongs to part i mod `count`.

    Args:
      total: samples.
      count: parts.
    """

    def __init__(self, total: int, count: int):
        self._parts = [Moments() for _ in range(min(count, total // 2))]
        self._seen = 0

    def watched(self, stream: Any) -> Any:
        """The same stream, whose pool features are counted as they pass."""
        for features, labels in stream:
            self._add(features)
            yield features, labels

    def _add(self, features: Features) -> None:
        pool = features["pool"]
        parts = (self._seen + np.arange(len(pool))) % max(1, len(self._parts))
        for number, part in enumerate(self._parts):
            part.update(pool[parts == number])
        self._seen += len(pool)

    def without(self, reference: Reference) -> list[float]:
        """The FID of all parts but one, for each; empty with fewer than two parts."""
        if len(self._parts) < 2:
            return []
        factor = covariance_factor(reference.pool.covariance)
        found = []
        for left_out in range(len(self._parts)):
            rest = Moments()
            for number, part in enumerate(self._parts):
                if number != left_out:
                    rest.merge(part)
            found.append(frechet_distance(rest.statistics(), reference.pool, second_factor=factor))
        return found


def jackknife(values: Sequence[float]) -> float | None:
    """The standard error of a statistic from its values without each of k parts: sqrt((k - 1) / k sum (v - mean)^2)."""
    if len(values) < 2:
        return None
    array = np.asarray(values, np.float64)
    return float(np.sqrt((len(array) - 1) / len(array) * np.square(array - array.mean()).sum()))


def read(path: Path) -> dict[str, Any]:
    """A finished setting.

    Raises:
      UserError: the file is none.
    """
    try:
        result = json.loads(files.read_text(path))
        if result["format"] != FORMAT or not isinstance(result["fid"], float):
            raise ValueError(f"its format is {result['format']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no setting of a sweep ({error}): move it away") from error
    return result


def check_found(output: Path, plan: Plan, setting: Setting, extractor: Extractor, reference: Reference) -> None:
    """Raises `UserError` where a finished setting, if there is one, was measured otherwise than it would be now."""
    path = output / "settings" / f"{setting.name}.json"
    if not path.exists():
        return
    found = read(path)
    generator = generator_of(plan.weights.model(setting), plan.batch_size, plan.seed)
    made = made_by(plan, setting, generator, extractor, reference)
    wanted = {**found, record.NAME: made, "num_samples": plan.num_samples}
    changed = [line for line in changes(found, wanted) if not line.startswith("environment.")]
    if changed:
        raise UserError(
            f"{path} was measured otherwise; it differs in\n  " + "\n  ".join(changed)
            + "\nUse another --output, or the same values"
        )  # fmt: skip


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What two settings' records and numbers of samples differ in, `key: old -> new`."""
    one, other = (
        {**record.plain(result[record.NAME]), "num_samples": result["num_samples"]} for result in (old, new)
    )
    return record.changes(one, other)


def write(output: Path) -> Path:
    """Table, numbers and heat map of all finished settings of a folder, in place of older ones; the table's path.

    Raises:
      UserError: there are none.
    """
    results = [read(path) for path in sorted((output / "settings").glob("*.json"))]
    if not results:
        raise UserError(f"{output}/settings holds no finished setting: run the sweep first, or check --output")
    results.sort(key=lambda result: result["fid"])
    best, rows = results[0], []
    for result in results:
        setting = Setting(**{**result["setting"], "interval": tuple(result["setting"]["interval"])})
        apart = None
        if result is not best and result["without"] and len(result["without"]) == len(best["without"]):
            apart = jackknife(np.subtract(result["without"], best["without"]).tolist())
        rows.append({
            "setting": dataclasses.asdict(setting), "row": setting.row, "fid": result["fid"],
            "error": jackknife(result["without"]), "behind": result["fid"] - best["fid"], "behind_error": apart,
            **{name: result[name] for name in evaluate.METRICS if name in result},
        })  # fmt: skip
    files.write_results({
        output / SUMMARY: lambda path: files.write_text(
            path, json.dumps({"best": rows[0], "settings": rows, record.NAME: best[record.NAME]}, indent=1) + "\n"
        ),
        output / TABLE: lambda path: files.write_text(path, "\n".join(table(rows, results[0])) + "\n"),
        output / FIGURE: lambda path: draw(path, rows),
    })  # fmt: skip
    return output / TABLE


def table(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> list[str]:
    """Lines of markdown, the best setting first."""
    others = [name for name in evaluate.METRICS if name in rows[0] and name != "fid"]
    head = ["guidance", "interval", "EMA", "steps", "FID", "behind the best", *(evaluate.METRICS[n][0] for n in others)]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def with_error(value: float, error: float | None) -> str:
        return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")

    lines = [
        f"{best['num_samples']} samples of step {best[record.NAME]['checkpoint']['step']} each, the same noise for "
        f"all, against {best['reference']}, extractor {best['extractor']}; ± one standard error (jackknife).",
        "", line(head), line(["---"] * len(head)),
    ]  # fmt: skip
    for row in rows:
        setting = row["setting"]
        low, high = setting["interval"]
        behind = with_error(row["behind"], row["behind_error"]) if row is not rows[0] else ""
        lines.append(line([
            f"{setting['scale']:g}", f"[{low:g}, {high:g}]", setting["ema"], str(setting["steps"]),
            with_error(row["fid"], row["error"]), behind, *(f"{row[name]:.4f}" for name in others),
        ]))  # fmt: skip
    return lines


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """FID by guidance scale (columns) and everything else (rows)."""
    scales = sorted({row["setting"]["scale"] for row in rows})
    names = sorted({row["row"] for row in rows})
    values = np.full((len(names), len(scales)), np.nan)
    for row in rows:
        values[names.index(row["row"]), scales.index(row["setting"]["scale"])] = row["fid"]
    plots.heat_map(path, values, names, [f"{scale:g}" for scale in scales], "guidance scale", "FID")


def sampling_of(config: Any) -> tuple[tuple[float, float], int | str]:
    """The run's own interval of guidance and number of steps: what a sweep takes where none are given."""
    interval = config_lib.guidance_interval("sampling.guidance_interval", config.sampling.guidance_interval)
    return interval, config.sampling.steps
