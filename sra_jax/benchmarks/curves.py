"""Reference curves: how the losses of a recipe fall, from runs with several seeds, and whether another run follows.

A run logs single steps, whose losses scatter with their batches. Both sides are therefore averaged over `WINDOW` logged
steps. Runs that differ in their seeds alone still fall at different times: the band is `WIDTH` times the standard error
of the difference between one more run and the mean of the curve's, by the spread of the curve's runs about their mean.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sra_jax import config as config_lib
from sra_jax import files
from sra_jax.errors import UserError
from sra_jax.inspection import plots
from sra_jax.runs import CONFIG, environment, metrics

FORMAT = "sra_jax reference curve 1"
FOLDER = Path(__file__).resolve().parents[2] / "configs" / "curves"
COMPARED = ("loss_denoising", "loss_alignment")
WINDOW = 5
WIDTH = 5.0
RUNS = 3
"""Of different seeds, that a curve needs."""

NEAR = 2 * WINDOW + 1
"""Averages of which the spread at one step is taken."""

LEAST = 2 * WINDOW
"""Logged steps that a curve needs."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Expected losses of a recipe.

    Attributes:
      name: of the recipe.
      config: of the runs, their seed apart.
      seeds: of the runs.
      steps: (S,) logged steps.
      losses: name -> (seeds, S).
      environment: of the last run.
    """

    name: str
    config: ConfigDict
    seeds: tuple[int, ...]
    steps: np.ndarray
    losses: dict[str, np.ndarray]
    environment: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Followed:
    """A run beside a curve, for one loss.

    Attributes:
      steps: (S,) at which both are known, each the last of its window.
      mean: (S,) of the curve.
      half: (S,) half the width of the band.
      run: (S,) of the run.
    """

    steps: np.ndarray
    mean: np.ndarray
    half: np.ndarray
    run: np.ndarray

    def outside(self) -> list[tuple[int, int, float]]:
        """(first step, last step, furthest distance in half widths) of every stretch out of the band."""
        distance = (self.run - self.mean) / self.half
        stretches: list[list[int]] = []
        for index in np.flatnonzero(~(np.abs(distance) <= 1)):  # NaN is outside, too
            if stretches and stretches[-1][-1] == index - 1:
                stretches[-1].append(int(index))
            else:
                stretches.append([int(index)])
        return [
            (int(self.steps[one[0]]), int(self.steps[one[-1]]), float(max(distance[one], key=abs))) for one in stretches
        ]


def averaged(values: np.ndarray) -> np.ndarray:
    """Means over `WINDOW` neighbours: (..., S) -> (..., S - WINDOW + 1)."""
    return np.lib.stride_tricks.sliding_window_view(values, WINDOW, axis=-1).mean(axis=-1)


def follow(curve: Curve, name: str, steps: np.ndarray, values: np.ndarray) -> Followed:
    """A run's loss `name` at `steps` beside the curve's.

    Raises:
      UserError: the two have too few logged steps in common.
    """
    common, ours, theirs = np.intersect1d(steps, curve.steps, return_indices=True)
    if len(common) < LEAST:
        raise UserError(
            f"the run and the curve have {len(common)} logged steps in common, and {LEAST} are needed: log at "
            f"multiples of {int(curve.steps[0])} steps (--config.log_every), and train longer"
        )
    losses = averaged(curve.losses[name][:, theirs])
    mean = losses.mean(axis=0)
    # Few runs say little of their spread at one step: their spread nearby, and what is usual over all steps.
    spread = losses.var(axis=0, ddof=1)
    near = np.convolve(spread, np.ones(NEAR), "same") / np.convolve(np.ones(len(mean)), np.ones(NEAR), "same")
    half = WIDTH * np.sqrt((near + np.median(spread)) * (1 + 1 / len(losses)))
    return Followed(common[WINDOW - 1 :], mean, half, averaged(np.asarray(values)[ours]))


def losses_of(workdir: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logged steps of a run and its losses."""
    records = [record for record in metrics.read(workdir) if COMPARED[0] in record]
    if not records:
        raise UserError(f"{workdir} has logged no losses: train it, or check --workdir")
    steps = np.array([record["step"] for record in records])
    names = [name for name in COMPARED if all(name in record for record in records)]
    return steps, {name: np.array([record[name] for record in records]) for name in names}


def make(workdirs: Sequence[Path], recipe: str) -> dict[str, Any]:
    """A curve, as JSON data, of runs of one recipe that differ in their seeds.

    Raises:
      UserError: they differ in more, or too few steps are logged.
    """
    configs = [config_lib.read(workdir / CONFIG) for workdir in workdirs]
    for workdir, config in zip(workdirs[1:], configs[1:], strict=True):
        if changed := without_seed(config_lib.differences(configs[0], config)):
            raise UserError(f"{workdir} is no run of the recipe of {workdirs[0]}: {'; '.join(changed)}")
    seeds = [config.seed for config in configs]
    if len(set(seeds)) < max(RUNS, len(seeds)):
        raise UserError(
            f"a curve is of at least {RUNS} runs of different seeds, these are of {', '.join(map(str, seeds))}"
        )
    found = [losses_of(workdir) for workdir in workdirs]
    steps = found[0][0]
    if len(steps) < LEAST or any(not np.array_equal(steps, other) for other, _ in found):
        raise UserError(f"the runs must have logged the same steps, at least {LEAST} of them")
    return {
        "format": FORMAT, "name": recipe, "config": json.loads(config_lib.to_json(configs[0])), "seeds": seeds,
        "environment": environment.current(), "step": steps.tolist(),
        "losses": {
            name: [[float(f"{value:.5g}") for value in losses[name]] for _, losses in found] for name in found[0][1]
        },
    }  # fmt: skip


def without_seed(changed: Sequence[str]) -> list[str]:
    """Differences of two configs but that of their seeds."""
    return [line for line in changed if not line.startswith("seed:")]


def read(path: Path) -> Curve:
    """A curve from its file.

    Raises:
      UserError: there is none, or it is none.
    """
    try:
        data = json.loads(files.read_text(path))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}")
        curve = Curve(
            str(data["name"]), config_lib.from_json(json.dumps(data["config"])), tuple(map(int, data["seeds"])),
            np.array(data["step"], np.int64),
            {name: np.array(values, np.float64) for name, values in data["losses"].items()}, data["environment"],
        )  # fmt: skip
        for values in curve.losses.values():
            if values.shape != (len(curve.seeds), len(curve.steps)):
                raise ValueError(f"losses {values.shape} of {len(curve.seeds)} seeds and {len(curve.steps)} steps")
    except OSError as error:
        raise UserError(f"--curve={path} cannot be read ({error.strerror})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no reference curve: {error}") from error
    return curve


def fitting(config: ConfigDict) -> Curve:
    """The curve in `FOLDER` that is of a run's recipe.

    Raises:
      UserError: there is none; the message has the nearest and what differs.
    """
    curves = [read(path) for path in sorted(FOLDER.glob("*.json"))]
    found = [(without_seed(config_lib.differences(curve.config, config)), curve) for curve in curves]
    if not found:
        raise UserError(f"no reference curves lie in {FOLDER}: name one with --curve")
    changed, curve = min(found, key=lambda one: len(one[0]))
    if changed:
        raise UserError(
            f"no reference curve is of this run's recipe; the nearest, {curve.name}, differs in\n  "
            + "\n  ".join(changed[:12]) + "\n--curve=FILE compares with any"
        )  # fmt: skip
    return curve


def draw(path: Path, curve: Curve, followed: dict[str, Followed]) -> None:
    """The run, the curve and its band, a panel a loss."""
    panel = [
        {
            f"{curve.name}, seeds {', '.join(map(str, curve.seeds))}": list(
                zip(one.steps, one.mean, one.half, strict=True)
            ),
            "this run": [(step, value, 0.0) for step, value in zip(one.steps, one.run, strict=True)],
        }
        for one in followed.values()
    ]  # fmt: skip
    plots.curves_figure(path, [panel], list(followed), ["step"])
