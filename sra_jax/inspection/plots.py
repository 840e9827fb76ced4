"""Figures for papers and READMEs; each appears whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from sra_jax import files

DOTS_PER_INCH = 110


def probe_figure(
    path: Path, groups: Mapping[str, np.ndarray], blocks: Sequence[int], levels: Sequence[float], level: int
) -> None:
    """Probe accuracy by block at one noise level, and by noise level at each group's best block.

    Args:
      path: PNG to write.
      groups: name -> accuracies (runs, levels, blocks); the line is the mean over runs, the band their range.
      blocks: block numbers.
      levels: noise levels.
      level: index of the level of the first panel.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for name, runs in groups.items():
        best = int(runs[:, level].mean(axis=0).argmax())
        _line(left, blocks, runs[:, level], name)
        _line(right, levels, runs[:, :, best], f"{name}, block {blocks[best]}")
    left.set(xlabel="block", ylabel="probe accuracy, %", title=f"by block, noise level {levels[level]:g}")
    left.set_xticks(blocks)
    right.set(xlabel="noise level (0 = data, 1 = noise)", title="by noise level")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


def _line(axes: Any, x: Sequence[float], runs: np.ndarray, label: str) -> None:
    runs = 100 * runs
    (line,) = axes.plot(x, runs.mean(axis=0), marker="o", markersize=3.5, label=label)
    if len(runs) > 1:
        axes.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)


def token_figure(
    path: Path, maps: Mapping[str, np.ndarray], inputs: np.ndarray, blocks: Sequence[int], levels: Sequence[float]
) -> None:
    """Maps of tokens: a row a block under the noisy input, a column a noise level, the models side by side.

    Args:
      path: PNG to write.
      maps: name -> (levels, blocks, G, G, 3) in [0, 1].
      inputs: what the models saw, (levels, H, W, 1 or 3) in [0, 1].
      blocks: block numbers.
      levels: noise levels.
    """
    rows, columns = len(blocks) + 1, len(levels)
    figure = plt.figure(figsize=(0.9 * columns * len(maps) + 0.8, 0.9 * rows + 0.7), layout="constrained")
    parts = figure.subfigures(1, len(maps), squeeze=False)
    for part, (name, pictures) in zip(parts[0], maps.items(), strict=True):
        part.suptitle(name, fontsize=10)
        grid = part.subplots(rows, columns, squeeze=False)
        for (row, column), axes in np.ndenumerate(grid):
            axes.imshow(inputs[column] if row == 0 else pictures[column, row - 1], vmin=0, vmax=1, cmap="gray")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(f"{levels[column]:g}", fontsize=8)
            if column == 0:
                axes.set_ylabel("input" if row == 0 else f"block {blocks[row - 1]}", fontsize=8)
    save(figure, path)


def curves_figure(
    path: Path, lines: Sequence[Sequence[Mapping[str, Sequence[tuple[float, float, float]]]]], titles: Sequence[str],
    rows: Sequence[str],
) -> None:
    """A grid of curves with bands: a column a title, a row an x axis; a name has one colour everywhere.

    Args:
      path: PNG to write.
      lines: for each row and column, name -> points (x, y, half the width of the band).
      titles: of the columns.
      rows: names of the x axes.
    """
    names = list(dict.fromkeys(name for row in lines for panel in row for name in panel))
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    figure, grid = plt.subplots(
        len(rows), len(titles), figsize=(2.7 * len(titles), 2.5 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, panels in enumerate(lines):
        for column, panel in enumerate(panels):
            axes = grid[row, column]
            for name, points in panel.items():
                if points:
                    x, y, half = np.array(points, np.float64).T
                    axes.plot(x, y, marker="o", markersize=3, color=colours[name], label=name)
                    axes.fill_between(x, y - half, y + half, color=colours[name], alpha=0.2, linewidth=0)
            axes.set_xlabel(rows[row], fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(titles[column], fontsize=10)
    grid[0, 0].legend(fontsize=7)
    save(figure, path)


def heat_map(
    path: Path, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], axis: str, title: str
) -> None:
    """A table of colours with its numbers, the lowest in a frame.

    Args:
      path: PNG to write.
      values: (R,C); NaN where there is none.
      rows, columns: their names.
      axis: what the columns are.
      title: what the numbers are.
    """
    figure, axes = plt.subplots(figsize=(2.8 + 0.75 * len(columns), 1.3 + 0.42 * len(rows)), layout="constrained")
    axes.imshow(values, cmap="viridis_r", aspect="auto")
    least = np.unravel_index(np.nanargmin(values), values.shape)
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            frame = {"edgecolor": "red", "facecolor": "white"} if (row, column) == least else {"facecolor": "white"}
            axes.text(
                column, row, f"{value:.4g}", ha="center", va="center", fontsize=8,
                bbox={"boxstyle": "round", "alpha": 0.75, "edgecolor": "none", **frame},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set(xlabel=axis, title=title)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG and close it."""
    with files.whole(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=DOTS_PER_INCH)
    plt.close(figure)
