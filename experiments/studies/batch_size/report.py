"""The page of the batch-size study: HTML, Markdown, plots, a summary, runs as Parquet.

    python -m experiments.main study batch-size-report --folder <folder>

Everything is made from the records of the finished runs; nothing is trained.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from scipy import stats

from experiments import metrics
from experiments.errors import MetricsError
from experiments.studies.batch_size.config import OPTIMIZERS, BatchReport, Cell
from experiments.studies.batch_size.run import CHANCE, final, seeds_of, winner_of
from experiments.studies.pages import (
    NOTHING,
    Plot,
    Section,
    Table,
    markdown_part,
    publish,
)
from experiments.studies.records import Record, query, without_nulls

LEVEL = 0.95
BySeed = Mapping[int, float]


class Estimate(NamedTuple):
    """A mean with its interval."""

    mean: float  # over the seeds
    half: float | None  # half the width of the interval; None for a single seed
    seeds: int  # how many there are

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is on that side of 0, otherwise 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and ``t_{0.975, n-1} s / √n``, Student's interval at 95 %."""
    if not values:
        raise ValueError("values is empty; wanted at least one number.")
    x, n = np.asarray(values, np.float64), len(values)
    if n < 2:
        return Estimate(float(x[0]), None, 1)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * x.std(ddof=1) / np.sqrt(n)
    return Estimate(float(x.mean()), float(half), n)


def paired(ours: BySeed, theirs: BySeed) -> dict[int, float]:
    """Differences of the seeds that both have."""
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def slope(leads: Mapping[int, BySeed]) -> Estimate | None:
    """How a lead changes with every doubling of the batch.

    A line through the leads against ``log2 B`` is fitted to each seed, by least
    squares; the estimate is that of the seeds' slopes. A seed's runs share their
    initial parameters at all batch sizes and need not be independent.
    """
    sizes = sorted(leads)
    common = [s for s in leads[sizes[0]] if all(s in leads[b] for b in sizes)]
    if len(sizes) < 2 or not common:
        return None
    x = np.log2(sizes)
    x = x - x.mean()
    lines = [x @ [leads[b][s] for b in sizes] / (x @ x) for s in sorted(common)]
    return estimate([float(line) for line in lines])


SGD, KFAC = "sgd", "kfac"
TITLES = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon", "kfac": "K-FAC"}


class Result(NamedTuple):
    """A cell's finished runs."""

    cell: Cell  # optimiser and batch size
    trials: list[Record]  # of the search, in order
    winner: Record  # the best of them
    seeds: dict[int, Record]  # the winner's runs on the test images, by seed

    def accuracies(self) -> dict[int, float]:
        """Test accuracy at the end, by seed."""
        return {seed: final(record) for seed, record in self.seeds.items()}

    def at_end(self, name: str) -> Estimate | None:
        """The last item of a curve of the seeds' runs; None if some have none."""
        ends = [record[name][-1] for record in self.seeds.values()]
        return None if None in ends else estimate(ends)

    def total(self, name: str) -> Estimate:
        """The sum of a curve of the seeds' runs, such as their seconds."""
        return estimate([float(np.sum(r[name])) for r in self.seeds.values()])

    def curve(self, name: str) -> np.ndarray:
        """The mean of a curve over the seeds, as far as all of them go."""
        curves = [record[name] for record in self.seeds.values()]
        length = min(map(len, curves))
        return np.mean([curve[:length] for curve in curves], 0)

    def steps(self) -> int:
        record = next(iter(self.seeds.values()))
        return record["step"] // len(record["wall"])


Results = dict[Cell, Result]


def read_results(folder: Path) -> Results:
    """Finished cells, by batch size and optimiser."""
    if not any(path.stat().st_size for path in folder.glob("*.jsonl")):
        raise MetricsError(f"{folder} holds no results of the batch-size study.")
    by_cell: dict[Cell, list[Record]] = {}
    marks = set()
    for record in query(folder, "FROM runs"):
        record["values"] = without_nulls(record["values"])
        cell = Cell(record["optimizer"], record["batch_size"])
        by_cell.setdefault(cell, []).append(record)
        marks.add(record["fingerprint"])
    if len(marks) > 1:
        raise MetricsError(
            f"{folder} holds runs of {len(marks)} configurations; wanted one."
        )
    found = {}
    ordered = sorted(
        by_cell, key=lambda c: (c.batch_size, OPTIMIZERS.index(c.optimizer))
    )
    for cell in ordered:
        trials = [r for r in by_cell[cell] if r["kind"] == "trial"]
        winner = winner_of(trials)
        seeds = seeds_of(by_cell[cell], winner["number"])
        if seeds:
            found[cell] = Result(cell, trials, winner, seeds)
    if not found:
        raise MetricsError(f"{folder}: no cell has runs on the test images yet.")
    return found


def sizes_of(results: Results) -> list[int]:
    return sorted({cell.batch_size for cell in results})


def optimizers_of(results: Results) -> list[str]:
    """The optimisers, in the order of the tables."""
    there = {cell.optimizer for cell in results}
    return [name for name in OPTIMIZERS if name in there]


def leads(results: Results, other: str) -> dict[int, dict[int, float]]:
    """K-FAC's test accuracy less another optimiser's, paired by seed."""
    found = {}
    for size in sizes_of(results):
        ours, theirs = Cell(KFAC, size), Cell(other, size)
        if ours in results and theirs in results:
            pairs = paired(results[ours].accuracies(), results[theirs].accuracies())
            found |= {size: pairs} if pairs else {}
    return found


def best_other(results: Results, size: int) -> str | None:
    """The optimiser other than K-FAC with the highest mean test accuracy."""
    means = {
        cell.optimizer: estimate(list(result.accuracies().values())).mean
        for cell, result in results.items()
        if cell.batch_size == size and cell.optimizer != KFAC
    }
    return max(means, key=lambda name: means[name]) if means else None


def summary(results: Results) -> list[dict[str, Any]]:
    """Numbers of every cell as JSON values."""
    rows = []
    for cell, result in results.items():
        accuracy = estimate(list(result.accuracies().values()))
        rows.append(
            {
                "optimizer": cell.optimizer,
                "batch_size": cell.batch_size,
                "trials": len(result.trials),
                "pruned": sum(r["pruned"] for r in result.trials),
                "diverged": sum(r["diverged"] for r in result.trials),
                "winner": result.winner["number"],
                "validation_accuracy": final(result.winner),
                "values": result.winner["values"],
                "seeds": accuracy.seeds,
                "test_accuracy": accuracy.mean,
                "half_interval": accuracy.half,
            }
        )
    return rows


def percent(value: Estimate, signed: bool = False) -> str:
    """A share as points of a hundred with its interval."""
    mean = f"{100 * value.mean:{'+' if signed else ''}.2f}"
    return mean if value.half is None else f"{mean} ± {100 * value.half:.2f}"


def differences(results: Results, other: str) -> dict[int, Estimate]:
    """K-FAC less another optimiser, by batch size."""
    by_seed = leads(results, other)
    return {size: estimate(list(pairs.values())) for size, pairs in by_seed.items()}


def verdict(found: dict[int, Estimate], other: str) -> str:
    """One sentence on where K-FAC is better, worse, or neither."""
    said = {
        1: f"beats {other} at",
        -1: f"loses to {other} at",
        0: f"cannot be told apart from {other} at",
    }
    parts = []
    for sign, words in said.items():
        sizes = [size for size, e in found.items() if e.sign == sign]
        if sizes:
            shown = ", ".join(f"{s} ({percent(found[s], True)} points)" for s in sizes)
            parts.append(f"{words} batch {shown}")
    return f"K-FAC {'; it '.join(parts)}."


def growth(found: Estimate | None) -> str:
    """One sentence on how the lead over SGD changes with the batch."""
    if found is None:
        return "Whether the difference grows with the batch needs two batch sizes."
    shown = f"{percent(found, True)} points per doubling of the batch"
    if found.half is None:
        return f"Its difference to SGD changes by {shown}, from a single seed."
    if not found.sign:
        return (
            f"Its difference to SGD changes by {shown}: whether it grows or shrinks "
            "with the batch cannot be told at 95 %."
        )
    word = "grows" if found.sign > 0 else "falls"
    return f"Its difference to SGD {word} with the batch, by {shown}."


def answer(results: Results, config: dict[str, Any]) -> str:
    over_sgd = differences(results, SGD)
    if not over_sgd:
        return "K-FAC and SGD have no finished runs at a common batch size yet."
    trials = sorted({len(r.trials) for r in results.values()})
    seeds = sorted({len(r.seeds) for r in results.values()})
    sentences = [
        f"With {counts(trials, 'trial')} each, {counts(seeds, 'seed')} for the winners "
        f"and {config['epochs']} epochs at every batch size, "
        f"{verdict(over_sgd, 'SGD')}",
        growth(slope(leads(results, SGD))),
    ]
    against = {}
    for size in sizes_of(results):
        name = best_other(results, size)
        found = differences(results, name).get(size) if name else None
        if name and found:
            against[size] = found, name
    if any(name != SGD for _, name in against.values()):
        names = ", ".join(f"{TITLES[n]} at {size}" for size, (_, n) in against.items())
        best = {size: found for size, (found, _) in against.items()}
        words = "the best of the others"
        sentences.append(f"{verdict(best, words)} (The best others: {names}.)")
    sentences.append(
        "Differences are in points of test accuracy, paired by seed, with Student-t "
        "intervals at 95 %, each for itself: none is corrected for the number of "
        "comparisons. They hold for the hyper-parameters that the searches found; what "
        "another search would change is not in them."
    )
    return " ".join(sentences)


def counts(numbers: list[int], noun: str) -> str:
    """One number, or from the least to the greatest, and what is counted."""
    low, high = min(numbers), max(numbers)
    number = str(low) if low == high else f"{low} to {high}"
    return f"{number} {noun}{'s' * (high != 1)}"


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


# Accuracy on validation images: full CIFAR-10, 32 x 32 pixels, other tuning.
PAPER = {
    "SGD": {128: 85.38, 512: 85.00, 2048: 83.43},
    "Adam": {128: 81.88, 512: 81.93, 2048: 79.52},
    "K-FAC": {128: 74.19, 512: 71.32, 2048: 64.98},
}
PLOTS: dict[str, tuple[Callable[[Results, Path], None], str]] = {
    "final": (plot_final, "Test accuracy at the end, mean over the seeds with 95 %"),
    "iterations": (plot_iterations, "Test accuracy against iterations, mean of seeds"),
    "seconds": (plot_seconds, "Test accuracy against training seconds, mean of seeds"),
    "search": (plot_search, "The searches: best validation accuracy so far"),
}
MEASURED = (
    "Test accuracy in % after the last epoch (not the best on the way), mean over the "
    "winner's seeds ± Student's interval at 95 %, beside the paper's figures for all "
    "of CIFAR-10 at 32 x 32 pixels; those of Adam are without weight decay, ours are "
    "AdamW's. Optax has neither SOAP nor Shampoo; Muon is the peer that works with "
    "matrices."
)
FITTED = (
    "Accuracy in % and loss at the end on test images and on training images as they "
    "are (not augmented); mean over the seeds."
)
BEFORE = (
    "The default ranges and the first trial's usual values were set by hand after "
    "short runs at batch 128, 512 and 2048, judged on validation images: 20 of K-FAC, "
    "8 of SGD, 3 of AdamW and 2 of Muon. K-FAC had the most of them, which may favour "
    "its first trial."
)
COST = (
    "Seconds are those of all training steps of a run; compilation and evaluation are "
    "not in them. They depend on what else the machine did."
)


def accuracy_table(results: Results) -> Table:
    """Our accuracies beside the paper's: a row per batch size."""
    names, rows = optimizers_of(results), []
    config = next(iter(results.values())).winner["config"]
    papers = PAPER if config["dataset"] == "cifar10" else {}
    for size in sizes_of(results):
        ours = [shown(results.get(Cell(name, size)), "test") for name in names]
        steps = config["epochs"] * (config["train_examples"] // size)
        paper = [
            f"{found[size]:.2f}" if size in found else NOTHING
            for found in papers.values()
        ]
        rows.append((str(size), str(steps), *ours, *paper))
    titles = [TITLES[name] for name in names]
    header = ("batch", "iterations", *titles, *(f"paper: {name}" for name in papers))
    return Table(header, tuple(rows), "Test accuracy")


def shown(result: Result | None, which: str) -> str:
    if result is None:
        return NOTHING
    if which == "test":
        return percent(estimate(list(result.accuracies().values())))
    found = result.at_end(which)
    return NOTHING if found is None else percent(found)


def lead_table(results: Results) -> Table:
    """K-FAC less SGD and less the best other optimiser: a row per batch size."""
    over_sgd, rows = differences(results, SGD), []
    for size in sizes_of(results):
        name = best_other(results, size)
        best = differences(results, name).get(size) if name else None
        first = percent(over_sgd[size], True) if size in over_sgd else NOTHING
        second = percent(best, True) if best else NOTHING
        rows.append((str(size), first, TITLES[name] if name else NOTHING, second))
    header = ("batch", "K-FAC − SGD", "best other", "K-FAC − best other")
    caption = "Differences in points, paired by seed, ± Student's interval at 95 %"
    return Table(header, tuple(rows), caption)


def fit_table(results: Results) -> Table:
    """Test and training accuracy and loss: a row per cell."""
    rows = []
    for cell, result in results.items():
        losses = [result.at_end(name) for name in ("loss", "train_loss")]
        gap = [
            record["train_accuracy"][-1] - record["accuracy"][-1]
            for record in result.seeds.values()
        ]
        rows.append(
            (
                str(cell.batch_size),
                TITLES[cell.optimizer],
                shown(result, "accuracy"),
                shown(result, "train_accuracy"),
                percent(estimate(gap), True),
                *(f"{e.mean:.3f}" if e else NOTHING for e in losses),
            )
        )
    header = (
        "batch", "optimiser", "test accuracy", "training accuracy", "training − test",
        "test loss", "training loss",
    )  # fmt: skip
    return Table(header, tuple(rows), FITTED)


def search_table(results: Results) -> Table:
    """What the searches found: a row per cell."""
    columns = (
        "learning_rate", "lr_decay", "decay_epoch", "momentum", "weight_decay",
        "factor_decay", "damping",
    )  # fmt: skip
    rows = []
    for cell, result in results.items():
        values = result.winner["values"]
        values = values | {"momentum": values.get("momentum", values.get("beta1"))}
        found = [values.get(name) for name in columns]
        ended = sum(r["pruned"] for r in result.trials)
        rows.append(
            (
                str(cell.batch_size),
                TITLES[cell.optimizer],
                f"{len(result.trials)} ({ended})",
                str(result.winner["number"]),
                f"{100 * final(result.winner):.2f}",
                *(NOTHING if x is None else f"{x:.3g}" for x in found),
            )
        )
    header = ("batch", "optimiser", "trials (ended early)", "winner", "validation %")
    names = [name.replace("_", " ") for name in columns]
    names[3] += " or β1"
    caption = (
        "Winners' hyper-parameters; the decay epoch is a share of the run, and trial 0 "
        "has usual values"
    )
    return Table((*header, *names), tuple(rows), caption)


def cost_table(results: Results) -> Table:
    """Seconds of the winners' runs: a row per cell."""
    rows = []
    for cell, result in results.items():
        wall, processor = result.total("wall"), result.total("processor")
        steps = estimate([r["step"] for r in result.seeds.values()]).mean
        rows.append(
            (
                str(cell.batch_size),
                TITLES[cell.optimizer],
                f"{steps:.0f}",
                f"{wall.mean:.1f}",
                f"{processor.mean:.1f}",
                f"{1e3 * wall.mean / steps:.1f}",
            )
        )
    header = (
        "batch", "optimiser", "iterations", "seconds", "processor seconds",
        "milliseconds per iteration",
    )  # fmt: skip
    return Table(header, tuple(rows), COST)


def setting(config: dict[str, Any]) -> str:
    """One paragraph on what was trained."""
    pool = config["pool"]
    images = f" averaged over squares of {pool} x {pool} pixels" if pool > 1 else ""
    steps = "an incomplete last batch is left out"
    return (
        f"{config['model']} on {config['dataset']}{images}: {config['train_examples']} "
        f"training images, {config['validation_examples']} others for the searches, "
        f"augmentation {config['augmentation']}; {config['epochs']} epochs at every "
        f"batch size ({steps}), so that iterations fall as the batch grows. All "
        "optimisers have weight decay that no preconditioner changes (SGD's and "
        "K-FAC's passes through their momentum), the same augmentation and one drop of "
        f"the learning rate. K-FAC ({config['fisher']} Fisher, trust region "
        f"{config['kl_clip']}) refreshes and inverts its factors every "
        f"{config['refresh_examples']} examples, at most once per step."
    )


def make_sections(
    results: Results, config: dict[str, Any], out: Path
) -> tuple[Section, ...]:
    plots = {name: Plot(out / f"{name}.png", text) for name, (_, text) in PLOTS.items()}
    compared = (lead_table(results),) if leads(results, SGD) else ()
    return (
        Section("Answer", (answer(results, config),)),
        Section("Setting", (setting(config),)),
        Section(
            "Result",
            (MEASURED, accuracy_table(results), *compared, plots["final"]),
        ),
        Section("During training", (plots["iterations"], plots["seconds"])),
        Section("Over-fitting", (fit_table(results),)),
        Section("The searches", (BEFORE, search_table(results), plots["search"])),
        Section("Cost", (cost_table(results),)),
    )


def save_report(config: BatchReport, console: Console) -> None:
    """Prints the answer and writes page, plots, summary and the runs as Parquet."""
    out = config.out or config.folder
    out.mkdir(parents=True, exist_ok=True)
    results = read_results(config.folder)
    shared = next(iter(results.values())).winner["config"]
    for name, (draw, _) in PLOTS.items():
        draw(results, out / f"{name}.png")
    growth = slope(leads(results, SGD)) if leads(results, SGD) else None
    facts = {
        "config": shared,
        "cells": summary(results),
        "lead_over_sgd": {
            str(size): found._asdict()
            for size, found in differences(results, SGD).items()
        },
        "slope_per_doubling": growth._asdict() if growth else None,
    }
    (out / "summary.json").write_text(json.dumps(metrics.to_json(facts), indent=1))
    table = markdown_part(accuracy_table(results))
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(answer(results, shared), markup=False, highlight=False)
    sections = make_sections(results, shared, out)
    publish("Batch-size study", sections, shared, config.folder, out, console)
