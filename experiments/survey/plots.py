"""The plots of the survey's page."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.pyplot import get_cmap
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from experiments.survey.config import APPROXIMATIONS, MATRICES, TOP
from experiments.survey.schema import APPROXIMATION_TITLES, MATRIX_TITLES
from kfac_jax_lite.curvature.correlations import Interval

Row = dict[str, Any]
# Told apart by colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
MARKS = ("o", "s", "^", "D")
SHORT = ("H", "F", "MC", "C")
# A quarter of the file, and nobody sees it.
DPI, SHADES = 90, 128


def write(figure: Figure, path: Path) -> None:
    """Writes a figure as a small file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    with Image.open(content) as image:
        image.convert("RGB").quantize(SHADES).save(path, optimize=True)


def save_trajectories(rows: Sequence[Row], path: Path) -> None:
    """Eigenvalues against steps: a row for every matrix, a column for every model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    params = {row["model"]: row["num_params"] for row in rows}
    size = (1.2 + 2.1 * len(models), 7)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        len(MATRICES), len(models), sharex="col", sharey="row", squeeze=False
    )
    norm = BoundaryNorm(np.arange(TOP + 1) + 0.5, 256)
    colours = get_cmap("viridis_r")
    for i, matrix in enumerate(MATRICES):
        for j, model in enumerate(models):
            here = [r for r in rows if (r["matrix"], r["model"]) == (matrix, model)]
            steps = [row["step"] for row in here]
            for rank in range(TOP):
                values = [logarithm(row["eigenvalues"], rank) for row in here]
                colour = colours(norm(rank + 1))
                grid[i, j].plot(steps, values, ".-", ms=3, lw=1, color=colour)
            grid[i, j].grid(alpha=0.3)
            grid[i, j].tick_params(labelsize=7)
        grid[i, 0].set_ylabel(f"{MATRIX_TITLES[matrix]}, log₁₀ λ", fontsize=8)
        grid[i, 0].yaxis.set_major_locator(MaxNLocator(4))
    for j, model in enumerate(models):
        grid[0, j].set_title(f"{model}, P = {params[model]:,}", fontsize=8)
        grid[-1, j].set_xlabel("step", fontsize=8)
    shades = ScalarMappable(norm, colours)
    bar = figure.colorbar(shades, ax=grid, label="rank of the eigenvalue", aspect=40)
    bar.set_ticks(list(range(1, TOP + 1)))
    write(figure, path)


def logarithm(values: Sequence[float | None] | None, rank: int) -> float:
    """``log₁₀ λ`` of an eigenvalue above 0; otherwise NaN."""
    value = values[rank] if values and rank < len(values) else None
    return np.log10(value) if value is not None and value > 0 else np.nan


def save_agreement(panels: Mapping[str, np.ndarray], columns: int, path: Path) -> None:
    """Heat maps of matrices against matrices.

    Args:
        panels: ``[4, 4]`` by title.
        columns: in a row.
        path: the PNG file.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 2.1 * columns, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, square) in zip(grid.flat, panels.items(), strict=False):
        image = axes.imshow(square, vmin=-0.2, vmax=1, cmap="cividis")
        axes.set_title(title, fontsize=8)
        axes.set_xticks(range(len(SHORT)), SHORT, fontsize=8)
        axes.set_yticks(range(len(SHORT)), SHORT, fontsize=8)
        for (i, j), value in np.ndenumerate(square):
            if np.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                place = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(j, i, f"{value:.2f}", color=colour, **place)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.8)
    names = zip(SHORT, MATRIX_TITLES.values(), strict=True)
    figure.supxlabel(", ".join(f"{a}: {b}" for a, b in names), fontsize=8)
    write(figure, path)


def save_errors(rows: Sequence[Row], path: Path) -> None:
    """Errors of the approximations against checkpoints."""
    fields = {
        "error": "relative error, Frobenius",
        "cosine": "cosine",
        "overlap": "top-ten overlap",
    }
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    grid = figure.subplots(len(fields), len(MATRICES), sharex=True, sharey="row")
    for i, (field, label) in enumerate(fields.items()):
        for j, matrix in enumerate(MATRICES):
            for k, name in enumerate(APPROXIMATIONS[1:]):
                here = [
                    row
                    for row in rows
                    if (row["matrix"], row["approximation"]) == (matrix, name)
                    and row[field] is not None
                ]
                if here:
                    draw_band(grid[i, j], here, field, k)
            grid[i, j].grid(alpha=0.3)
        grid[i, 0].set_ylabel(label, fontsize=9)
    grid[0, 0].set_yscale("log")
    grid[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    grid[0, 0].yaxis.set_major_formatter("{x:g}")
    grid[0, 0].yaxis.set_minor_locator(NullLocator())
    for j, matrix in enumerate(MATRICES):
        grid[0, j].set_title(MATRIX_TITLES[matrix], fontsize=9)
    steps = {row["checkpoint"]: f"{row['step']:g}" for row in rows}
    for axes in grid[-1]:
        axes.set_xticks(sorted(steps), [steps[c] for c in sorted(steps)])
        axes.set_xlabel("step of the checkpoint (median)", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    write(figure, path)


def draw_band(axes: Any, rows: Sequence[Row], field: str, number: int) -> None:
    """A line of medians between the quartiles."""
    ordered = sorted(rows, key=lambda row: row["checkpoint"])
    low, middle, high = np.array([row[field] for row in ordered], np.float64).T
    x, colour = [row["checkpoint"] for row in ordered], COLOURS[number]
    label = APPROXIMATION_TITLES[ordered[0]["approximation"]]
    axes.plot(x, middle, MARKS[number] + "-", ms=4, color=colour, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def save_taus(found: Mapping[str, Mapping[str | None, Interval]], path: Path) -> None:
    """Tau and its interval: a line for every measure, a colour for every matrix."""
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(found)), layout="constrained")
    axes = figure.subplots()
    keys: tuple[str | None, ...] = (*MATRICES, None)
    colours: dict[str | None, str] = dict(zip(keys, (*COLOURS, "black"), strict=True))
    marks: dict[str | None, str] = dict(zip(keys, (*MARKS, "x"), strict=True))
    named = set()
    for line, by_matrix in enumerate(found.values()):
        shift = 0.17 * (np.arange(len(by_matrix)) - (len(by_matrix) - 1) / 2)
        for y, matrix in zip(line + shift, by_matrix, strict=True):
            mean, low, high = by_matrix[matrix]
            # Without an interval the ends are NaN.
            ends = np.nan_to_num([[mean - low], [high - mean]])
            title = "no matrix" if matrix is None else MATRIX_TITLES[matrix]
            axes.errorbar(
                [mean],
                [y],
                xerr=np.maximum(ends, 0),
                fmt=marks[matrix],
                ms=5,
                capsize=2,
                color=colours[matrix],
                label=None if title in named else title,
            )
            named.add(title)
    axes.axvline(0, color="0.4", lw=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(-1.05, 1.05)
    axes.set_xlabel("Kendall's tau with the generalisation gap, inside cells")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    write(figure, path)
