"""The page of the batch-size study: HTML, Markdown, plots, a summary, runs as Parquet.

    python -m experiments.main study batch-size-report --folder <folder>

Everything is made from the records of the finished runs; nothing is trained. All
intervals are over seeds, for the hyper-parameters that the searches found: how much
another search would change these is not in them.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from scipy import stats

from experiments import metrics
from experiments.errors import MetricsError
from experiments.studies import pages
from experiments.studies.batch_size.config import OPTIMIZERS, BatchReport, Cell
from experiments.studies.batch_size.run import CHANCE, final, seeds_of, winner_of
from experiments.studies.pages import Plot, Section, Table
from experiments.studies.records import Record, query, without_nulls

LEVEL = 0.95
SGD, KFAC = "sgd", "kfac"
TITLES = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon", "kfac": "K-FAC"}
COLOURS = {"sgd": "#000000", "adamw": "#0072b2", "muon": "#009e73", "kfac": "#d55e00"}
# Accuracy on validation images: full CIFAR-10, 32 x 32 pixels, other tuning.
PAPER = {
    "SGD": {128: 85.38, 512: 85.00, 2048: 83.43},
    "Adam": {128: 81.88, 512: 81.93, 2048: 79.52},
    "K-FAC": {128: 74.19, 512: 71.32, 2048: 64.98},
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
INTERVALS = (
    "Differences are in points of test accuracy, paired by seed, with Student-t "
    "intervals at 95 %, each for itself: none is corrected for the number of "
    "comparisons. They hold for the hyper-parameters that the searches found; what "
    "another search would change is not in them."
)
BySeed = Mapping[int, float]

# --------------------------------------------------------------------- the statistics


class Estimate(NamedTuple):
    """A mean with its interval."""

    mean: float  # over the seeds
    half: float | None  # half the width of the interval; None for a single seed
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is on that side of 0, otherwise 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1

    def percent(self, signed: bool = False) -> str:
        """A share as points of a hundred with its interval, such as 55.12 ± 0.34."""
        mean = f"{100 * self.mean:{'+' if signed else ''}.2f}"
        return mean if self.half is None else f"{mean} ± {100 * self.half:.2f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and ``t_{0.975, n-1} s / √n``, Student's interval at 95 %."""
    if not values:
        raise ValueError("values is empty; wanted at least one number.")
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, 1)
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * stats.sem(values)
    return Estimate(mean, float(half), n)


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
    common = sorted(set.intersection(*(set(leads[b]) for b in sizes)) if sizes else ())
    if len(sizes) < 2 or not common:
        return None
    table = [[leads[b][s] for s in common] for b in sizes]
    return estimate(np.polyfit(np.log2(sizes), table, 1)[0].tolist())


# ------------------------------------------------------------------------ the results


class Result(NamedTuple):
    """A cell's finished runs."""

    cell: Cell  # optimiser and batch size
    trials: list[Record]  # of the search, in order
    winner: Record  # the best of them
    seeds: dict[int, Record]  # the winner's runs on the test images, by seed

    @property
    def title(self) -> str:
        """The optimiser."""
        return TITLES[self.cell.optimizer]

    def accuracies(self) -> dict[int, float]:
        """Test accuracy at the end, by seed."""
        return {seed: final(record) for seed, record in self.seeds.items()}

    @property
    def accuracy(self) -> Estimate:
        """The same with its interval."""
        return estimate(list(self.accuracies().values()))

    def at_end(self, name: str) -> Estimate | None:
        """The last item of a curve of the seeds' runs; None if some have none."""
        ends = [record[name][-1] for record in self.seeds.values()]
        return None if None in ends else estimate(ends)

    def total(self, name: str) -> float:
        """The mean sum of a curve of the seeds' runs, such as their seconds."""
        return float(np.mean([np.sum(r[name]) for r in self.seeds.values()]))

    def curve(self, name: str) -> np.ndarray:
        """The mean of a curve over the seeds, as far as all of them go."""
        curves = [record[name] for record in self.seeds.values()]
        length = min(map(len, curves))
        return np.mean([curve[:length] for curve in curves], 0)


Results = dict[Cell, Result]


def read_results(folder: Path) -> Results:
    """Finished cells, by batch size and optimiser."""
    if not any(path.stat().st_size for path in folder.glob("*.jsonl")):
        raise MetricsError(f"{folder} holds no results of the batch-size study.")
    by_cell: dict[Cell, list[Record]] = {}
    records = query(folder, "FROM runs")
    pages.one_configuration(records, folder)
    for record in records:
        record["values"] = without_nulls(record["values"])
        cell = Cell(record["optimizer"], record["batch_size"])
        by_cell.setdefault(cell, []).append(record)
    found = {}
    for cell in sorted(
        by_cell, key=lambda c: (c.batch_size, OPTIMIZERS.index(c.optimizer))
    ):
        trials = [r for r in by_cell[cell] if r["kind"] == "trial"]
        winner = winner_of(trials)
        seeds = seeds_of(by_cell[cell], winner["number"])
        if seeds:
            found[cell] = Result(cell, trials, winner, seeds)
    if not found:
        raise MetricsError(f"{folder}: no cell has runs on the test images yet.")
    return found


def sizes_of(results: Results) -> list[int]:
    """The batch sizes, ascending."""
    return sorted({cell.batch_size for cell in results})


def optimizers_of(results: Results) -> list[str]:
    """The optimisers, in the order of the tables."""
    return [n for n in OPTIMIZERS if any(cell.optimizer == n for cell in results)]


def leads(results: Results, other: str) -> dict[int, dict[int, float]]:
    """K-FAC's test accuracy less another optimiser's, paired by seed."""
    found = {}
    for size in sizes_of(results):
        ours, theirs = (results.get(Cell(name, size)) for name in (KFAC, other))
        if ours and theirs:
            found[size] = paired(ours.accuracies(), theirs.accuracies())
    return {size: pairs for size, pairs in found.items() if pairs}


def differences(results: Results, other: str) -> dict[int, Estimate]:
    """The same with intervals."""
    by_seed = leads(results, other)
    return {size: estimate(list(pairs.values())) for size, pairs in by_seed.items()}


def best_other(results: Results, size: int) -> tuple[str, Estimate] | None:
    """The best optimiser other than K-FAC by test accuracy, and K-FAC's lead."""
    others = [r for c, r in results.items() if c.batch_size == size]
    others = [r for r in others if r.cell.optimizer != KFAC]
    if not others:
        return None
    name = max(others, key=lambda r: r.accuracy.mean).cell.optimizer
    lead = differences(results, name).get(size)
    return (name, lead) if lead else None


# ------------------------------------------------------------------------- the answer


def verdict(found: dict[int, Estimate], other: str) -> str:
    """One sentence on where K-FAC is better, worse, or neither."""
    said = {
        1: f"beats {other} at",
        -1: f"loses to {other} at",
        0: f"cannot be told apart from {other} at",
    }
    parts = []
    for sign, words in said.items():
        shown = [f"{s} ({e.percent(True)} points)" for s, e in found.items()
                 if e.sign == sign]  # fmt: skip
        parts += [f"{words} batch {', '.join(shown)}"] if shown else []
    return f"K-FAC {'; it '.join(parts)}."


def growth(found: Estimate | None) -> str:
    """One sentence on how the lead over SGD changes with the batch."""
    if found is None:
        return "Whether the difference grows with the batch needs two batch sizes."
    shown = f"{found.percent(True)} points per doubling of the batch"
    if found.sign:
        word = "grows" if found.sign > 0 else "falls"
        return f"Its difference to SGD {word} with the batch, by {shown}."
    doubt = ": whether it grows or shrinks with the batch cannot be told at 95 %."
    end = ", from a single seed." if found.half is None else doubt
    return f"Its difference to SGD changes by {shown}{end}"


def counts(numbers: list[int], noun: str) -> str:
    """One number, or from the least to the greatest, and what is counted."""
    low, high = min(numbers), max(numbers)
    number = str(low) if low == high else f"{low} to {high}"
    return f"{number} {noun}{'s' * (high != 1)}"


def answer(results: Results, config: dict[str, Any]) -> str:
    """Which optimiser is better at which batch size, and what the numbers leave out."""
    over_sgd = differences(results, SGD)
    if not over_sgd:
        return "K-FAC and SGD have no finished runs at a common batch size yet."
    trials = counts([len(r.trials) for r in results.values()], "trial")
    seeds = counts([len(r.seeds) for r in results.values()], "seed")
    sentences = [
        f"With {trials} each, {seeds} for the winners and {config['epochs']} epochs at "
        f"every batch size, {verdict(over_sgd, 'SGD')}",
        growth(slope(leads(results, SGD))),
    ]
    found = {size: best_other(results, size) for size in sizes_of(results)}
    against = {size: pair for size, pair in found.items() if pair}
    if any(name != SGD for name, _ in against.values()):
        names = ", ".join(f"{TITLES[n]} at {size}" for size, (n, _) in against.items())
        best = {size: lead for size, (_, lead) in against.items()}
        said = verdict(best, "the best of the others")
        sentences.append(f"{said} (The best others: {names}.)")
    return " ".join([*sentences, INTERVALS])


# -------------------------------------------------------------------------- the plots

TOP = "outside upper center"


def plot_final(results: Results, path: Path) -> None:
    """Test accuracy at the end, mean over the seeds with 95 %."""
    figure, ((axes,),) = pages.panels(1, 1, figsize=(5, 3.5))
    for name in optimizers_of(results):
        cells = [r for c, r in results.items() if c.optimizer == name]
        axes.errorbar(
            [r.cell.batch_size for r in cells],
            [r.accuracy.mean for r in cells],
            [r.accuracy.half or 0.0 for r in cells],
            **{"fmt": "o-", "capsize": 3, "color": COLOURS[name]},
            label=TITLES[name],
        )
    axes.set(xlabel="batch size", ylabel="test accuracy at the end")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes_of(results), map(str, sizes_of(results)))
    pages.finish(figure, path, TOP)


def plot_iterations(results: Results, path: Path) -> None:
    """Test accuracy against iterations, mean of seeds."""
    names, sizes = optimizers_of(results), sizes_of(results)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(sizes)))
    size = max(5, 3 * len(names)), 3.5
    figure, grid = pages.panels(1, len(names), sharex=True, sharey=True, figsize=size)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set(title=TITLES[name], xlabel="iterations", xscale="log")
        for size, colour in zip(sizes, colours, strict=True):
            result = results.get(Cell(name, size))
            if result:
                curve, record = result.curve("accuracy"), result.winner
                steps = next(iter(result.seeds.values()))["step"] // len(record["wall"])
                at = steps * np.arange(1, len(curve) + 1)
                axes.plot(at, curve, ".-", color=colour, label=f"batch {size}")
    grid[0][0].set_ylabel("test accuracy")
    pages.finish(figure, path, TOP)


def plot_by_size(results: Results, path: Path, search: bool) -> None:
    """A panel per batch size, a line per optimiser."""
    sizes = sizes_of(results)
    size = max(5, 3 * len(sizes)), 3.5
    figure, grid = pages.panels(1, len(sizes), sharex=search, sharey=True, figsize=size)
    for cell, result in results.items():
        axes, name = grid[0][sizes.index(cell.batch_size)], cell.optimizer
        if search:
            ends = [CHANCE if r["pruned"] else final(r) for r in result.trials]
            y = np.maximum.accumulate(ends)
            x = np.arange(1, len(y) + 1)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            y = result.curve("accuracy")
            x = np.cumsum(result.curve("wall"))[: len(y)]
        axes.plot(x, y, ".-", color=COLOURS[name], label=TITLES[name])
        label = "trials" if search else "training seconds"
        axes.set(title=f"batch {cell.batch_size}", xlabel=label)
    label = "best validation accuracy" if search else "test accuracy"
    grid[0][0].set_ylabel(label)
    pages.finish(figure, path, TOP)


PLOTS: dict[str, tuple[Any, str]] = {
    "final": (plot_final, "Test accuracy at the end, mean over the seeds with 95 %"),
    "iterations": (plot_iterations, "Test accuracy against iterations, mean of seeds"),
    "seconds": (
        functools.partial(plot_by_size, search=False),
        "Test accuracy against training seconds, mean of seeds",
    ),
    "search": (
        functools.partial(plot_by_size, search=True),
        "The searches: best validation accuracy so far",
    ),
}

# --------------------------------------------------------------------------- the page


def percent(value: Estimate | None, signed: bool = False) -> str | None:
    """An estimate's text; None for a dash."""
    return value and value.percent(signed)


def accuracy_table(results: Results) -> Table:
    """Our accuracies beside the paper's: a row per batch size."""
    config = next(iter(results.values())).winner["config"]
    papers = PAPER if config["dataset"] == "cifar10" else {}

    def ours(name):
        return lambda size: percent(
            (found := results.get(Cell(name, size))) and found.accuracy
        )

    def paper(found):
        return lambda size: f"{found[size]:.2f}" if size in found else None

    columns: dict[str, Any] = {
        "batch": str,
        "iterations": lambda b: str(config["epochs"] * (config["train_examples"] // b)),
        **{TITLES[name]: ours(name) for name in optimizers_of(results)},
        **{f"paper: {name}": paper(found) for name, found in papers.items()},
    }
    return Table.of(sizes_of(results), columns, "Test accuracy")


def lead_table(results: Results) -> Table:
    """K-FAC less SGD and less the best other optimiser: a row per batch size."""
    over_sgd = differences(results, SGD)
    best = {size: best_other(results, size) for size in sizes_of(results)}
    columns = {
        "batch": str,
        "K-FAC − SGD": lambda size: percent(over_sgd.get(size), True),
        "best other": lambda size: (found := best[size]) and TITLES[found[0]],
        "K-FAC − best other": lambda size: (
            (found := best[size]) and percent(found[1], True)
        ),
    }
    caption = "Differences in points, paired by seed, ± Student's interval at 95 %"
    return Table.of(best, columns, caption)


CELL = {"batch": lambda r: str(r.cell.batch_size), "optimiser": lambda r: r.title}


def fit_table(results: Results) -> Table:
    """Test and training accuracy and loss: a row per cell."""

    def gap(result):
        runs = result.seeds.values()
        pairs = [(r["train_accuracy"][-1], r["accuracy"][-1]) for r in runs]
        return estimate([train - test for train, test in pairs]).percent(True)

    def loss(name):
        return lambda r: (found := r.at_end(name)) and f"{found.mean:.3f}"

    columns = CELL | {
        "test accuracy": lambda r: percent(r.at_end("accuracy")),
        "training accuracy": lambda r: percent(r.at_end("train_accuracy")),
        "training − test": gap,
        "test loss": loss("loss"),
        "training loss": loss("train_loss"),
    }
    return Table.of(results.values(), columns, FITTED)


def search_table(results: Results) -> Table:
    """What the searches found: a row per cell."""

    def value(*names):
        def text(result):
            found = [result.winner["values"].get(name) for name in names]
            return next((f"{x:.3g}" for x in found if x is not None), None)

        return text

    names = ("learning_rate", "lr_decay", "decay_epoch")
    later = ("weight_decay", "factor_decay", "damping")
    columns = CELL | {
        "trials (ended early)": lambda r: (
            f"{len(r.trials)} ({sum(t['pruned'] for t in r.trials)})"
        ),
        "winner": lambda r: str(r.winner["number"]),
        "validation %": lambda r: f"{100 * final(r.winner):.2f}",
        **{name.replace("_", " "): value(name) for name in names},
        "momentum or β1": value("momentum", "beta1"),
        **{name.replace("_", " "): value(name) for name in later},
    }
    caption = (
        "Winners' hyper-parameters; the decay epoch is a share of the run, and trial 0 "
        "has usual values"
    )
    return Table.of(results.values(), columns, caption)


def cost_table(results: Results) -> Table:
    """Seconds of the winners' runs: a row per cell."""

    def steps(result):
        return np.mean([r["step"] for r in result.seeds.values()])

    columns = CELL | {
        "iterations": lambda r: f"{steps(r):.0f}",
        "seconds": lambda r: f"{r.total('wall'):.1f}",
        "processor seconds": lambda r: f"{r.total('processor'):.1f}",
        "milliseconds per iteration": lambda r: (
            f"{1e3 * r.total('wall') / steps(r):.1f}"
        ),
    }
    return Table.of(results.values(), columns, COST)


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


def summary(result: Result) -> dict[str, Any]:
    """Numbers of a cell as JSON values."""
    accuracy = result.accuracy
    return {
        "optimizer": result.cell.optimizer,
        "batch_size": result.cell.batch_size,
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


def save_report(config: BatchReport, console: Console) -> None:
    """Prints the answer and writes page, plots, summary and the runs as Parquet."""
    out = config.out or config.folder
    out.mkdir(parents=True, exist_ok=True)
    results = read_results(config.folder)
    shared = next(iter(results.values())).winner["config"]
    plots = {}
    for name, (draw, text) in PLOTS.items():
        draw(results, out / f"{name}.png")
        plots[name] = Plot(out / f"{name}.png", text)
    over_sgd, change = differences(results, SGD), slope(leads(results, SGD))
    facts = {
        "config": shared,
        "cells": [summary(result) for result in results.values()],
        "lead_over_sgd": {str(size): e._asdict() for size, e in over_sgd.items()},
        "slope_per_doubling": change and change._asdict(),
    }
    (out / "summary.json").write_text(json.dumps(metrics.to_json(facts), indent=1))
    table, said = accuracy_table(results), answer(results, shared)
    shown: dict[str, Any] = {"markup": False, "highlight": False}
    console.print(pages.markdown_part(table), soft_wrap=True, **shown)
    console.print(said, **shown)
    compared = (lead_table(results),) if over_sgd else ()
    sections = (
        Section("Answer", (said,)),
        Section("Setting", (setting(shared),)),
        Section("Result", (MEASURED, table, *compared, plots["final"])),
        Section("During training", (plots["iterations"], plots["seconds"])),
        Section("Over-fitting", (fit_table(results),)),
        Section("The searches", (BEFORE, search_table(results), plots["search"])),
        Section("Cost", (cost_table(results),)),
    )
    pages.publish("Batch-size study", sections, shared, config.folder, out, console)
