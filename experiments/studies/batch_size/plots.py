"""The plots of the batch-size study."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.studies.batch_size.config import Cell
from experiments.studies.batch_size.results import (
    TITLES,
    Results,
    optimizers_of,
    sizes_of,
)
from experiments.studies.batch_size.run import CHANCE, final
from experiments.studies.batch_size.statistics import estimate

COLOURS = {"sgd": "#000000", "adamw": "#0072b2", "muon": "#009e73", "kfac": "#d55e00"}


def panels(titles: list[str], xlabel: str, ylabel: str, same_x: bool = True):
    """A row of plots with a common vertical axis."""
    figure, grid = plt.subplots(
        1,
        len(titles),
        sharex=same_x,
        sharey=True,
        squeeze=False,
        figsize=(max(5, 3 * len(titles)), 3.5),
        layout="constrained",
    )
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set(title=title, xlabel=xlabel)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel(ylabel)
    return figure, grid[0]


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, with one legend for all of its plots, and forgets it."""
    named = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    place = {"loc": "outside upper center", "ncols": max(1, len(named))}
    figure.legend(list(named.values()), list(named), fontsize=8, **place)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_final(results: Results, path: Path) -> None:
    """Test accuracy at the end against the batch size, with 95 % intervals."""
    figure, (axes,) = panels([""], "batch size", "test accuracy at the end")
    for name in optimizers_of(results):
        cells = [c for c in results if c.optimizer == name]
        found = [estimate(list(results[c].accuracies().values())) for c in cells]
        axes.errorbar(
            [c.batch_size for c in cells],
            [e.mean for e in found],
            [e.half or 0.0 for e in found],
            fmt="o-",
            capsize=3,
            color=COLOURS[name],
            label=TITLES[name],
        )
    sizes = sizes_of(results)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    save(figure, path)


def plot_iterations(results: Results, path: Path) -> None:
    """Test accuracy against iterations: a panel per optimiser, a line per batch."""
    names, sizes = optimizers_of(results), sizes_of(results)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(sizes)))
    titles = [TITLES[name] for name in names]
    figure, grid = panels(titles, "iterations", "test accuracy")
    for axes, name in zip(grid, names, strict=True):
        for size, colour in zip(sizes, colours, strict=True):
            result = results.get(Cell(name, size))
            if result:
                curve = result.curve("accuracy")
                at = result.steps() * np.arange(1, len(curve) + 1)
                axes.plot(at, curve, ".-", color=colour, label=f"batch {size}")
        axes.set_xscale("log")
    save(figure, path)


def plot_seconds(results: Results, path: Path) -> None:
    """Test accuracy against training seconds: a panel per batch, a line per method."""
    sizes = sizes_of(results)
    figure, grid = panels(
        [f"batch {size}" for size in sizes], "training seconds", "test accuracy", False
    )
    for cell, result in results.items():
        axes = grid[sizes.index(cell.batch_size)]
        curve, name = result.curve("accuracy"), cell.optimizer
        seconds = np.cumsum(result.curve("wall"))[: len(curve)]
        axes.plot(seconds, curve, ".-", color=COLOURS[name], label=TITLES[name])
    save(figure, path)


def plot_search(results: Results, path: Path) -> None:
    """The best validation accuracy so far against the number of trials."""
    sizes = sizes_of(results)
    figure, grid = panels(
        [f"batch {size}" for size in sizes], "trials", "best validation accuracy"
    )
    for cell, result in results.items():
        axes, name = grid[sizes.index(cell.batch_size)], cell.optimizer
        ends = [CHANCE if r["pruned"] else final(r) for r in result.trials]
        best = np.maximum.accumulate(ends)
        numbers = np.arange(1, len(best) + 1)
        axes.plot(numbers, best, ".-", color=COLOURS[name], label=TITLES[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, path)
