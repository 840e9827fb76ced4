"""A study: methods x seeds (x values of any key) of one recipe, each cell a normal run that is measured on its way.

    <output>/runs/<cell>/       a run's folder, as main.py makes it
    <output>/cells/<cell>.json  a finished cell: its config, what was measured and how; all that the tables need
    <output>/extractor.safetensors, reference.npz   the classifier and the reference that all cells are measured with
    <output>/{study.md,study.json,metrics.png,probe.png}   made of all finished cells

A cell is one process's at a time. What is finished is never made again, also where its run's folder is gone.
"""

import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sra_jax import cli, files
from sra_jax import config as config_lib
from sra_jax.benchmarks import study_points, study_report
from sra_jax.benchmarks.study_points import Instruments, Protocol, waited_for
from sra_jax.errors import Busy, UserError
from sra_jax.evaluation.record import changes
from sra_jax.runs import environment, metrics
from sra_jax.training.loop import train

OWN_KEYS = {
    "seed": "--seeds", "method.name": "--methods", "checkpoint_every": "--measure_at", "keep_every": "--measure_at",
    "sample_every": "nothing: a study makes no previews", "evaluation.every": "--measure_at",
    "epochs": "--config.steps", "examples": "--config.steps",
}  # fmt: skip
"""Keys that the study sets itself, and what decides them."""

SHARED = ("data.", "evaluation.", "sampling.", "steps")
"""Keys, or groups of them, that all cells have in common: their numbers would not compare."""

MOST_SAVES = 200
BUSY_SECONDS = 30
REFERENCE_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      method: as the recipe's variants name it.
      seed: the run's.
      values: further keys of the recipe with their values as text.
    """

    method: str
    seed: int
    values: tuple[tuple[str, str], ...] = ()

    @property
    def arm(self) -> str:
        """What the seeds of a row of the table share: the method and the further values."""
        return ", ".join([self.method, *(f"{key}={text}" for key, text in self.values)])

    @property
    def name(self) -> str:
        """Of its files."""
        parts = [self.method, *(f"{key}={text}" for key, text in self.values), f"seed{self.seed}"]
        return re.sub(r"[^\w.,+=-]", "_", "-".join(parts))


def cells_of(methods: Sequence[str], seeds: Sequence[int], varied: Mapping[str, Sequence[str]]) -> list[Cell]:
    """All cells, in the order in which they are made: all methods of a seed before the next seed, so that there are
    pairs as soon as may be.

    Raises:
      UserError: something is named twice.
    """
    for what, given in (("--methods", methods), ("--seeds", seeds), *((f"--vary={k}", v) for k, v in varied.items())):
        if len(set(given)) < len(given):
            raise UserError(f"{what}={','.join(map(str, given))} names one twice: leave it out")
    values = [tuple(zip(varied, combination, strict=True)) for combination in itertools.product(*varied.values())]
    return [Cell(method, seed, chosen) for seed in seeds for chosen in values for method in methods]


def parse_varied(given: Sequence[str]) -> dict[str, list[str]]:
    """The flag --vary, KEY=VALUE each: the values of every key.

    Raises:
      UserError: not of that form, or a key that all cells share or that has a flag of its own.
    """
    varied: dict[str, list[str]] = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise UserError(f"--vary={text} must be KEY=VALUE, such as optimizer.learning_rate=0.001; once a value")
        if key in OWN_KEYS:
            raise UserError(f"--vary={text}: {key} is decided by {OWN_KEYS[key]}")
        if key.startswith(SHARED):
            raise UserError(f"--vary={text}: {key} is the same for all cells, or their numbers would not compare")
        varied.setdefault(key, []).append(value)
    return varied


def parse_shard(text: str) -> tuple[int, int]:
    """The flag --shard, i/n: this process makes every n-th cell, from cell i on, counted from 0.

    Raises:
      UserError: not of that form.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--shard={text} must be i/n with i from 0 to n - 1, such as 0/4 for the first of four")
    return int(found[1]), int(found[2])


def parse_measured(given: Sequence[int], steps: int) -> tuple[int, ...]:
    """The flag --measure_at: ascending steps, the last of them the run's; by default its quarter, half and end.

    Raises:
      UserError: others, or such that a checkpoint would be saved every few steps.
    """
    measured = tuple(given) or tuple(sorted({max(1, steps // 4), max(1, steps // 2), steps}))
    if list(measured) != sorted(set(measured)) or measured[0] < 1 or measured[-1] != steps:
        raise UserError(
            f"--measure_at={','.join(map(str, measured))}: give ascending steps, the last one the run's own end "
            f"(--config.steps={steps})"
        )
    every = math.gcd(*measured)
    if steps // every > MOST_SAVES:
        raise UserError(
            f"--measure_at={','.join(map(str, measured))}: a checkpoint would be saved every {every} steps, their "
            f"greatest common divisor; choose multiples of at least {-(-steps // MOST_SAVES)}"
        )
    return measured


class Recipe:
    """What --config names, and the config of each cell.

    Args:
      given: FILE or FILE:VARIANT.
      changes: keys that the command line changes, with their values.
      measured: steps; None takes the default.

    Attributes:
      given: as it was.
      measured: steps at which cells are measured, the last of them their end.

    Raises:
      UserError: the recipe gives no steps, or a key is changed that the study decides.
    """

    def __init__(self, given: str, changes: Mapping[str, Any], measured: Sequence[int] = ()):
        for key in OWN_KEYS.keys() & changes.keys():
            raise UserError(f"--config.{key} is decided by {OWN_KEYS[key]} in a study: leave it out")
        self.given, self._changes = given, dict(changes)
        steps = self._changed("none").steps
        if not steps:
            raise UserError("a study counts in steps: give --config.steps in place of the recipe's epochs or examples")
        self.measured = parse_measured(measured, steps)

    def _changed(self, method: str) -> ConfigDict:
        name, colon, variant = self.given.partition(":")
        config = config_lib.load(f"{name}:{variant},{method}" if colon and variant else f"{name}:{method}")
        with config.unlocked():
            for key, value in self._changes.items():
                config_lib.change(config, key, value)
        return config

    def config(self, cell: Cell) -> ConfigDict:
        """A cell's config, checked.

        Raises:
          UserError: an unknown method or key, or a config that cannot work.
        """
        config = self._changed(cell.method)
        leaves = dict(config_lib.flatten(config))
        every = math.gcd(*self.measured)
        with config.unlocked():
            for key, text in cell.values:
                if key not in leaves:
                    raise UserError(f"--vary={key}={text}: the recipe has no key {key} (docs/configuration.md)")
                config_lib.change(config, key, config_lib.read_value(key, text, leaves[key]))
            config.seed, config.checkpoint_every, config.keep_every = cell.seed, every, every
            config.sample_every, config.evaluation.every = 0, 0
        config_lib.check(config, jax.device_count())
        return config


class Study:
    """The cells of a matrix and what is known of them.

    Args:
      output: the folder.
      recipe: what is trained.
      cells: the matrix.
      probe: how cells are probed at their last step; None: not at all.
      test_path: `data.path` of a held-out set for probe and denoising loss; None: a fifth of the training set.

    Raises:
      UserError: before any work, where a config, the reference or the extractor cannot work, or the folder holds cells
        that were measured in another way.
    """

    def __init__(
        self, output: Path, recipe: Recipe, cells: Sequence[Cell], probe: study_points.Probe | None = None,
        test_path: str | None = None,
    ):  # fmt: skip
        self._output, self._cells, self._recipe = Path(output), list(cells), recipe
        self._configs = {cell: recipe.config(cell) for cell in self._cells}
        names = [cell.name for cell in self._cells]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"two cells would be called {twice}: give other values")
        if any(config_lib.tells_captions(config) for config in self._configs.values()):
            raise UserError("a study measures runs that are told labels, and this recipe's are told captions")
        if probe is not None:
            probe.check(self._configs.values())
        first = self._configs[self._cells[0]]
        with waited_for(self._output / study_points.REFERENCE, REFERENCE_SECONDS):
            self._instruments = Instruments(first, self._output)
        self.protocol = Protocol.of(first, self._instruments, recipe.measured, probe, test_path)
        self._check_found()

    def _check_found(self) -> None:
        """What is finished was trained and measured as it would be now."""
        for cell in self._cells:
            found = self.result(cell)
            if found is None:
                continue
            path = self._path(cell)
            changed = changes(found["protocol"], self.protocol.data(), missing="absent")
            changed += config_lib.differences(config_lib.from_json(json.dumps(found["config"])), self._configs[cell])
            if changed:
                raise UserError(
                    f"{path} was made in another way; it differs in\n  " + "\n  ".join(changed)
                    + "\nUse another --output, or the same values"
                )  # fmt: skip

    def _path(self, cell: Cell) -> Path:
        return self._output / "cells" / f"{cell.name}.json"

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's record, None for one that is not.

        Raises:
          UserError: the file is none.
        """
        return study_report.read_cell(self._path(cell)) if self._path(cell).exists() else None

    def missing(self) -> list[Cell]:
        """Cells that are not finished."""
        return [cell for cell in self._cells if not self._path(cell).exists()]

    def run(self, shard: tuple[int, int] = (0, 1)) -> list[Cell]:
        """Make what is missing of this shard's cells; those that another process is making are left to it.

        Returns:
          Cells that others are making.

        Raises:
          Preempted, Interrupted: told to end; the same command goes on from there.
          RunError: a run failed.
        """
        busy = []
        for cell in self._cells[shard[0] :: shard[1]]:
            if self._path(cell).exists():
                continue
            try:
                with files.locked_output(self._path(cell), "choose another --output"):
                    if not self._path(cell).exists():  # another process may just have ended
                        self._make(cell)
            except Busy as other:
                print(f"left to others: {other}", file=sys.stderr)
                busy.append(cell)
            self.report(figures=False)
            jax.clear_caches()  # of this cell's programs
        return [cell for cell in busy if not self._path(cell).exists()]

    def _make(self, cell: Cell) -> None:
        """Train a cell, measure it, write its record."""
        print(f"cell {cell.name}: {len(self._cells) - len(self.missing())} of {len(self._cells)} are finished")
        config, workdir = self._configs[cell], self._output / "runs" / cell.name
        train(config, workdir)
        with cli.ends_when_told("the run is saved, and part of its samples"):
            points = [
                study_points.measured_at(workdir, step, self.protocol, self._instruments)
                for step in self._recipe.measured
            ]
        log = [record for record in metrics.read(workdir) if "loss_denoising" in record]
        record = {
            "format": study_report.FORMAT, "method": cell.method, "seed": cell.seed, "values": dict(cell.values),
            "arm": cell.arm, "recipe": self._recipe.given, "config": json.loads(config_lib.to_json(config)),
            "protocol": self.protocol.data(), "environment": environment.current(),
            "flops_per_step": config_lib.step_flops(config).total, "seconds_per_step": seconds_per_step(log),
            "points": points,
            "losses": {"step": [r["step"] for r in log], "loss_denoising": [rounded(r["loss_denoising"]) for r in log]},
        }  # fmt: skip
        path = self._path(cell)
        files.write_results({path: lambda path: files.write_text(path, json.dumps(record, indent=1) + "\n")})
        print(f"wrote {path}")

    def report(self, figures: bool = True) -> Path | None:
        """Write table and figures of all finished cells in the folder; the table's path, None where there is none."""
        if not any((self._output / "cells").glob("*.json")):
            return None
        with waited_for(self._output / study_report.TABLE, BUSY_SECONDS):
            return study_report.write(self._output, figures)


def seconds_per_step(log: Sequence[Mapping[str, float]]) -> float | None:
    """The median over logged stretches; the first is left out, which waits for much that happens once."""
    speeds = sorted(1 / record["steps_per_second"] for record in log[1:] if record.get("steps_per_second"))
    return rounded(speeds[len(speeds) // 2]) if speeds else None


def rounded(value: float) -> float:
    """To six digits: what files hold for people."""
    return float(f"{value:.6g}")
