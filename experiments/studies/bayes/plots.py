"""The plots of the Bayesian study."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.studies.bayes.config import DERIVED, TRAINED, Cell
from experiments.studies.bayes.results import TITLES, Record, Results, problems_of

COLOURS = {
    "adam": "#0072b2", "sgd": "#000000", "kfac": "#d55e00", "noisy_kfac": "#e69f00",
    "vogn": "#009e73", "ivon": "#cc79a7", "adam_laplace": "#0072b2",
    "adam_last_layer": "#56b4e9", "kfac_laplace": "#d55e00",
    "kfac_last_layer": "#f0e442", "adam_ensemble": "#888888",
}  # fmt: skip
ACTIVE_TITLES = {
    "active_bald": "noisy K-FAC, mutual information",
    "active_random": "noisy K-FAC, random",
    "active_entropy": "Adam, entropy",
}
REGRESSION_TITLES = {
    "regression_noisy_kfac": "noisy K-FAC",
    "regression_laplace": "Laplace, linearised network",
}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, with one legend for all of its plots, and forgets it."""
    named = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    place: Any = {"loc": "outside lower center", "ncols": max(1, min(4, len(named)))}
    figure.legend(list(named.values()), list(named), fontsize=8, **place)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def style(method: str) -> Any:
    """How a method's line looks: dashed where it is made of others' weights."""
    dashed = "--" if method in DERIVED else "-"
    return {"color": COLOURS[method], "label": TITLES[method], "ls": dashed}


def grid_of(results: Results, rows: int = 1) -> Any:
    """A column for every data set and network."""
    problems = problems_of(results)
    figure, grid = plt.subplots(
        rows,
        len(problems),
        sharex=True,
        squeeze=False,
        figsize=(max(6, 3 * len(problems)), 1.5 + 2.6 * rows),
        layout="constrained",
    )
    for axes, (dataset, network) in zip(grid[0], problems, strict=True):
        axes.set_title(f"{dataset}, {network}", fontsize=9)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    return figure, grid, problems


def mean_bins(runs: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and accuracy of all runs' examples together, by bin that has some."""
    count = np.array([run["bins"]["count"] for run in runs], float)
    total = count.sum(0)
    full = total > 0
    means = [
        (np.array([run["bins"][name] for run in runs]) * count).sum(0)[full]
        / total[full]
        for name in ("confidence", "accuracy")
    ]
    return means[0], means[1]


def plot_reliability(results: Results, path: Path) -> None:
    """Accuracy less confidence by bin: trained methods above, others below."""
    figure, grid, problems = grid_of(results, 2)
    for row, methods in zip(grid, (TRAINED, ("adam", *DERIVED)), strict=True):
        for axes, (dataset, network) in zip(row, problems, strict=True):
            axes.axhline(0, color="k", lw=0.8)
            for method in methods:
                result = results.get(Cell(dataset, network, method))
                if result is not None:
                    confidence, accuracy = mean_bins(result.runs)
                    gap = accuracy - confidence
                    axes.plot(confidence, gap, marker=".", lw=1, **style(method))
        row[0].set_ylabel("accuracy − confidence")
    for axes in grid[-1]:
        axes.set_xlabel("confidence")
    save(figure, path)


def plot_shift(results: Results, path: Path) -> None:
    """Accuracy, NLL and ECE against the strength of the noise on the images."""
    names = ("accuracy", "nll", "ece")
    figure, grid, problems = grid_of(results, len(names))
    for column, problem in zip(grid.T, problems, strict=True):
        for cell, result in results.items():
            if (cell.dataset, cell.network) != problem:
                continue
            at = [0.0, *result.runs[0]["shifted"]["severity"]]
            for axes, name in zip(column, names, strict=True):
                curves = [[r["test"][name], *r["shifted"][name]] for r in result.runs]
                curve = np.mean(np.array(curves, float), 0)
                axes.plot(at, curve, marker=".", lw=1, **style(cell.method))
        column[-1].set_xlabel("noise on the images")
    for axes, name in zip(grid[:, 0], ("accuracy", "NLL", "ECE"), strict=True):
        axes.set_ylabel(name)
    save(figure, path)


def plot_active(records: dict[str, list[Record]], path: Path) -> None:
    """Test accuracy and NLL against the number of labels, with standard errors."""
    figure, grid = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, name in zip(grid, ("accuracy", "nll"), strict=True):
        for number, (cell, runs) in enumerate(records.items()):
            curves = np.array([run[name] for run in runs], float)
            mean = curves.mean(0)
            x, title = runs[0]["labelled"], ACTIVE_TITLES[cell]
            axes.plot(x, mean, ".-", color=f"C{number}", label=title)
            if len(curves) > 1:
                error = curves.std(0, ddof=1) / np.sqrt(len(curves))
                shade: Any = {"color": f"C{number}", "alpha": 0.2}
                axes.fill_between(x, mean - error, mean + error, **shade)
        axes.set_xlabel("labelled images")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("test accuracy")
    grid[1].set_ylabel("test NLL")
    save(figure, path)


def plot_regression(records: dict[str, Record], truth: Any, path: Path) -> None:
    """Mean and two standard deviations of every method, with data and function."""
    figure, grid = plt.subplots(
        1,
        len(records),
        sharey=True,
        squeeze=False,
        figsize=(max(5, 4.5 * len(records)), 4),
        layout="constrained",
    )
    for axes, (name, record) in zip(grid[0], records.items(), strict=True):
        x = np.array(record["x"])
        mean, deviation = np.array(record["mean"]), np.array(record["deviation"])
        shade: Any = {"color": "C0", "alpha": 0.25}
        lower, upper = mean - 2 * deviation, mean + 2 * deviation
        axes.fill_between(x, lower, upper, label="± 2 standard deviations", **shade)
        axes.plot(x, mean, color="C0", label="predicted mean")
        axes.plot(x, truth(x), "k--", lw=1, label="function")
        axes.plot(record["data_x"], record["data_y"], "k.", ms=4, label="data")
        axes.set(title=REGRESSION_TITLES[name], xlabel="x", ylim=(-4, 4))
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("y")
    save(figure, path)
