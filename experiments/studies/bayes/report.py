"""The page of the Bayesian study: HTML, Markdown, plots, a summary, runs as Parquet.

    python -m experiments.main study bayes-report --folder <folder>

Everything is made from the records of the finished runs; nothing is trained.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from scipy import stats

from experiments import metrics
from experiments.errors import MetricsError
from experiments.studies import pages
from experiments.studies.bayes.config import (
    ACTIVE,
    ADAM,
    DERIVED,
    METHODS,
    REGRESSION,
    TRAINED,
    BayesReport,
    Cell,
)
from experiments.studies.bayes.regression import truth
from experiments.studies.pages import Plot, Section, Table
from experiments.studies.records import query, without_nulls

Record = dict[str, Any]
LEVEL = 0.05
# Largest difference of accuracies that still is called equal.
MARGIN = 0.01
TITLES = {
    "adam": "Adam",
    "sgd": "SGD",
    "kfac": "K-FAC",
    "noisy_kfac": "noisy K-FAC",
    "vogn": "VOGN",
    "ivon": "IVON",
    "adam_laplace": "Laplace (Kronecker) on Adam",
    "adam_last_layer": "Laplace (last layer) on Adam",
    "kfac_laplace": "Laplace (Kronecker) on K-FAC",
    "kfac_last_layer": "Laplace (last layer) on K-FAC",
    "adam_ensemble": "ensemble of Adam's seeds",
}
# The methods that the question is about.
NATURAL = ("kfac", "noisy_kfac", "vogn", "ivon", "adam_laplace", "adam_last_layer")
NATURAL += ("kfac_laplace", "kfac_last_layer")

NAMES = ("accuracy", "nll", "ece")
COLOURS = {
    "adam": "#0072b2", "sgd": "#000000", "kfac": "#d55e00", "noisy_kfac": "#e69f00",
    "vogn": "#009e73", "ivon": "#cc79a7", "adam_laplace": "#0072b2",
    "adam_last_layer": "#56b4e9", "kfac_laplace": "#d55e00",
    "kfac_last_layer": "#f0e442", "adam_ensemble": "#888888",
}  # fmt: skip  # fmt: skip
ACTIVE_TITLES = {
    "active_bald": "noisy K-FAC, mutual information",
    "active_random": "noisy K-FAC, random",
    "active_entropy": "Adam, entropy",
}
REGRESSION_TITLES = {
    "regression_noisy_kfac": "noisy K-FAC",
    "regression_laplace": "Laplace, linearised network",
}
MEASURED = (
    "Test images; mean over the winner's runs ± standard error. Accuracy in %; NLL in "
    "nats; ECE with bins of equal width, adaptive ECE with bins of equal counts. "
    "Methods with draws predict by the mean probability of all draws; Laplace's by the "
    "linearised network with the probit approximation; the ensemble by the mean of all "
    "of Adam's runs, so that it is a single one. Milliseconds are those of a training "
    "step, the median over epochs; they depend on what else the machine did."
)
COMPARED = (
    "Each method less the tuned Adam, with p-values of Welch's two-sided test over the "
    "runs; not corrected for the number of comparisons."
)
MEANS = (
    "The same runs' mean weights without draws: what the draws add to a prediction, "
    "apart from what training with noise does to the mean."
)
STRANGE = (
    "Images that belong to no class against test images: area under the receiver "
    "operating characteristic (AUROC; 1 is perfect, 0.5 knows nothing) and false "
    "positives at 95 % true positives (FPR95), by the largest probability; AUROC by "
    "the entropy beside it. Shifted: test images under the strongest noise."
)
BEFORE = (
    "The small size's grids were set by hand after short runs, mostly of LeNet on "
    "CIFAR-10, judged on validation images: 22 of noisy K-FAC, 13 of Adam, 7 of IVON, "
    "6 of VOGN, 3 of K-FAC, none of SGD. Noisy K-FAC had the most of them, which may "
    "favour its grid. The damping and the trust region were not searched."
)
SEARCHED = (
    "Every combination of a grid, seed 0, judged by the NLL of the method's own "
    "predictions on validation images."
)
LEARNED = (
    "The network is trained anew on all labelled images after every round; the first "
    "ones of a seed are the same for all. Hyper-parameters were set by hand, not "
    "searched. Area: mean test accuracy over all rounds. Differences are to noisy "
    "K-FAC with a random order, with Welch's two-sided test."
)
SYNTHETIC = (
    "Synthetic data of a fixed seed: noisy values of a cubic with a gap. The "
    "observations' noise is known. Mean standard deviations of the function, the noise "
    "taken off, where there are data, in the gap and outside. A single run each."
)


class Comparison(NamedTuple):
    """A method less Adam."""

    difference: float  # of the means
    # Of Welch's test; None where a method has a single run, or all are equal.
    p: float | None

    @property
    def sign(self) -> int:
        """1 or -1 for a significant difference, otherwise 0."""
        if self.p is None or not self.p < LEVEL:
            return 0
        return 1 if self.difference > 0 else -1


class Result(NamedTuple):
    """A cell's finished runs."""

    cell: Cell  # which
    trials: list[Record]  # of the search
    runs: list[Record]  # on the test images, in the order of the seeds

    def figures(self, name: str) -> np.ndarray:
        """A score on the test images, by run; NaN where it was not finite."""
        values = [run["test"].get(name) for run in self.runs]
        return np.array([np.nan if v is None else v for v in values], float)

    def seconds(self) -> float | None:
        """Median seconds of a step of the winner's runs; None if nothing is trained."""
        found = [r["seconds"] for r in self.runs if r.get("seconds") is not None]
        return float(np.median(found)) if found else None


Results = dict[Cell, Result]


def read_results(folder: Path) -> Results:
    """Finished cells in the order of the tables."""
    records = read_all(folder)
    by_cell: dict[Cell, list[Record]] = {}
    for record in records:
        if record["kind"] in ("trial", "seed"):
            cell = Cell(record["dataset"], record["network"], record["method"])
            by_cell.setdefault(cell, []).append(record)
    found = {}
    for dataset, network in sorted({(c.dataset, c.network) for c in by_cell}):
        for method in METHODS:
            result = result_of(Cell(dataset, network, method), by_cell)
            if result is not None:
                found[result.cell] = result
    if not found:
        raise MetricsError(f"{folder}: no cell has runs on the test images yet.")
    return found


def read_all(folder: Path) -> list[Record]:
    """All records of one configuration."""
    if not any(path.stat().st_size for path in folder.glob("*.jsonl")):
        raise MetricsError(f"{folder} holds no results of the Bayesian study.")
    records = [without_nulls(r) for r in query(folder, "FROM runs")]
    pages.one_configuration(records, folder)
    return records


def result_of(cell: Cell, by_cell: dict[Cell, list[Record]]) -> Result | None:
    """A cell's runs of one setting: the last one that was run on test images."""
    records = by_cell.get(cell, [])
    trials = [r for r in records if r["kind"] == "trial"]
    runs = [r for r in records if r["kind"] == "seed"]
    if not runs:
        return None
    runs = [r for r in runs if r.get("values") == runs[-1].get("values")]
    return Result(cell, trials, sorted(runs, key=lambda r: r["seed"]))


def problems_of(results: Results) -> list[tuple[str, str]]:
    """Data sets and networks, in order."""
    return list(dict.fromkeys((c.dataset, c.network) for c in results))


def standard_error(values: np.ndarray) -> float | None:
    """``s / √n``; None for a single run."""
    return float(stats.sem(values)) if len(values) > 1 else None


def compare(ours: np.ndarray, theirs: np.ndarray) -> Comparison:
    """Welch's test of two methods' figures."""
    difference = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2:
        return Comparison(difference, None)
    spread = ours.std(ddof=1), theirs.std(ddof=1)
    if max(spread) == 0:  # there is no test, as of fewer runs
        return Comparison(difference, None)
    found: Any = stats.ttest_ind_from_stats(
        ours.mean(), spread[0], len(ours), theirs.mean(), spread[1], len(theirs), False
    )
    return Comparison(difference, float(found.pvalue))


def comparisons(results: Results, cell: Cell, names: tuple[str, ...]) -> Any:
    """A method against Adam on the same problem, by name; None without Adam."""
    adam = cell.of(ADAM)
    if cell == adam or cell not in results or adam not in results:
        return None
    return {
        name: compare(results[cell].figures(name), results[adam].figures(name))
        for name in names
    }


# ------------------------------------------------------------------------- the answer


def p_text(p: float | None) -> str:
    if p is None:
        return "no p"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def on_problem(results: Results, dataset: str, network: str) -> str:
    """Which methods have a better NLL and ECE than Adam at an accuracy no worse."""
    better, known = [], 0
    for method in NATURAL:
        found = comparisons(results, Cell(dataset, network, method), NAMES)
        if found is None:
            continue
        known += 1
        accuracy, nll, ece = (found[name] for name in NAMES)
        if nll.sign < 0 and ece.sign < 0 and accuracy.difference > -MARGIN:
            text = (
                f"{TITLES[method]}: NLL {nll.difference:+.4f} ({p_text(nll.p)}), ECE "
                f"{ece.difference:+.4f} ({p_text(ece.p)}), accuracy "
                f"{100 * accuracy.difference:+.2f} points ({p_text(accuracy.p)})"
            )
            better.append((nll.difference, text))
    where, below = f"On {dataset} with {network}", f"{100 * MARGIN:g} points below"
    if not known:
        return f"{where}, nothing can be compared with Adam yet."
    count, verb = (str(len(better)), "have") if better else ("none", "has")
    shown = ": " + "; ".join(text for _, text in sorted(better)) if better else ""
    return (
        f"{where}, {count} of {known} methods {verb} a significantly better NLL and "
        f"ECE than the tuned Adam at an accuracy no more than {below}{shown}."
    )


def answer(results: Results) -> str:
    """The answer in one paragraph."""
    parts = [on_problem(results, *problem) for problem in problems_of(results)]
    compared = [r for c, r in results.items() if c.method in (ADAM, *NATURAL)]
    seeds = sorted({len(r.runs) for r in compared})
    count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    parts.append(
        f"Differences are those of means over {count} runs to Adam with decoupled "
        "weight decay, whose grid is no smaller than any other's; p-values are of "
        f"Welch's two-sided test, significant below {LEVEL:g}, each for itself: none "
        "is corrected for the number of comparisons. They hold for the "
        "hyper-parameters that the searches found."
    )
    return " ".join(parts)


# -------------------------------------------------------------------------- the plots

BOTTOM = "outside lower center"


def style(method: str) -> Any:
    """How a method's line looks: dashed where it is made of others' weights."""
    dashed = "--" if method in DERIVED else "-"
    return {"color": COLOURS[method], "label": TITLES[method], "ls": dashed}


def grid_of(results: Results, rows: int) -> Any:
    """A column for every data set and network."""
    problems = problems_of(results)
    size = max(6, 3 * len(problems)), 1.5 + 2.6 * rows
    figure, grid = pages.panels(rows, len(problems), sharex=True, figsize=size)
    for axes, (dataset, network) in zip(grid[0], problems, strict=True):
        axes.set_title(f"{dataset}, {network}", fontsize=9)
    return figure, grid, problems


def mean_bins(runs: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and accuracy of all runs' examples together, by bin that has some."""
    bins = {k: np.array([r["bins"][k] for r in runs], float) for k in runs[0]["bins"]}
    total = bins["count"].sum(0)
    full = total > 0
    means = [
        (bins[name] * bins["count"]).sum(0)[full] / total[full]
        for name in ("confidence", "accuracy")
    ]
    return means[0], means[1]


def plot_reliability(results: Results, path: Path) -> None:
    """Accuracy less confidence by bin: trained methods above, others below."""
    figure, grid, problems = grid_of(results, 2)
    for row, methods in zip(grid, (TRAINED, ("adam", *DERIVED)), strict=True):
        for axes, problem in zip(row, problems, strict=True):
            axes.axhline(0, color="k", lw=0.8)
            for method in methods:
                dataset, network = problem
                result = results.get(Cell(dataset, network, method))
                if result is not None:
                    confidence, accuracy = mean_bins(result.runs)
                    gap = accuracy - confidence
                    axes.plot(confidence, gap, marker=".", lw=1, **style(method))
        row[0].set_ylabel("accuracy − confidence")
    for axes in grid[-1]:
        axes.set_xlabel("confidence")
    pages.finish(figure, path, BOTTOM)


def plot_shift(results: Results, path: Path) -> None:
    """Accuracy, NLL and ECE against the strength of the noise on the images."""
    figure, grid, problems = grid_of(results, len(NAMES))
    for cell, result in results.items():
        column = grid.T[problems.index((cell.dataset, cell.network))]
        at = [0.0, *result.runs[0]["shifted"]["severity"]]
        for axes, name in zip(column, NAMES, strict=True):
            curves = [[r["test"][name], *r["shifted"][name]] for r in result.runs]
            curve = np.mean(np.array(curves, float), 0)
            axes.plot(at, curve, marker=".", lw=1, **style(cell.method))
        column[-1].set_xlabel("noise on the images")
    for axes, name in zip(grid[:, 0], ("accuracy", "NLL", "ECE"), strict=True):
        axes.set_ylabel(name)
    pages.finish(figure, path, BOTTOM)


def plot_active(records: dict[str, list[Record]], path: Path) -> None:
    """Test accuracy and NLL against the number of labels, with standard errors."""
    figure, (grid,) = pages.panels(1, 2, figsize=(9, 4))
    for axes, name in zip(grid, ("accuracy", "nll"), strict=True):
        for number, (cell, runs) in enumerate(records.items()):
            curves = np.array([run[name] for run in runs], float)
            mean, colour = curves.mean(0), f"C{number}"
            x, title = runs[0]["labelled"], ACTIVE_TITLES[cell]
            axes.plot(x, mean, ".-", color=colour, label=title)
            if len(curves) > 1:
                error = stats.sem(curves)
                lines = mean - error, mean + error
                axes.fill_between(x, *lines, color=colour, alpha=0.2)
        axes.set(xlabel="labelled images", ylabel=f"test {name}")
    pages.finish(figure, path, BOTTOM)


def plot_regression(records: dict[str, Record], path: Path) -> None:
    """Mean and two standard deviations of every method, with data and function."""
    size = max(5, 4.5 * len(records)), 4
    figure, grid = pages.panels(1, len(records), sharey=True, figsize=size)
    for axes, (name, record) in zip(grid[0], records.items(), strict=True):
        x, mean = np.array(record["x"]), np.array(record["mean"])
        two = 2 * np.array(record["deviation"])
        label = "± 2 standard deviations"
        axes.fill_between(
            x, mean - two, mean + two, color="C0", alpha=0.25, label=label
        )
        axes.plot(x, mean, color="C0", label="predicted mean")
        axes.plot(x, truth(x), "k--", lw=1, label="function")
        axes.plot(record["data_x"], record["data_y"], "k.", ms=4, label="data")
        axes.set(title=REGRESSION_TITLES[name], xlabel="x", ylim=(-4, 4))
    grid[0][0].set_ylabel("y")
    pages.finish(figure, path, BOTTOM)


# --------------------------------------------------------------------------- the page


def shown(values: np.ndarray, factor: float = 1, digits: int = 4) -> str:
    """Mean and standard error as text."""
    if not np.isfinite(values).all():
        return "not finite"
    error = standard_error(values)
    mean = f"{factor * values.mean():.{digits}f}"
    return mean if error is None else f"{mean} ± {factor * error:.{digits}f}"


def score(name: str) -> Callable[[Result], str]:
    """What makes the cell of a score."""
    options = (100, 2) if name == "accuracy" else ()
    return lambda result: shown(result.figures(name), *options)


CELL: dict[str, Callable[[Any], Any]] = {
    "data": lambda r: r.cell.dataset,
    "network": lambda r: r.cell.network,
    "method": lambda r: TITLES[r.cell.method],
    "runs": lambda r: str(len(r.runs)),
}
SCORED = {
    "accuracy": score("accuracy"),
    "NLL": score("nll"),
    "Brier": score("brier"),
    "ECE": score("ece"),
    "adaptive ECE": score("adaptive_ece"),
}


def score_table(results: Results) -> Table:
    """All scores: a row per cell."""

    def ratio(result):
        adam, seconds = results.get(result.cell.of(ADAM)), result.seconds()
        base = adam and adam.seconds()
        return f"{seconds / base:.1f}" if seconds is not None and base else None

    cost = {
        "ms per step": lambda r: (s := r.seconds()) and f"{1e3 * s:.1f}",
        "of Adam's": ratio,
    }
    return Table.of(results.values(), CELL | SCORED | cost, MEASURED)


def comparison_table(results: Results) -> Table:
    """Every method less Adam."""
    rows = []
    for cell, result in results.items():
        found = comparisons(results, cell, NAMES)
        if found is not None:
            texts = []
            for name, one in found.items():
                factor, digits = (100, 2) if name == "accuracy" else (1, 4)
                texts += [f"{factor * one.difference:+.{digits}f}", p_text(one.p)]
            rows.append((*(make(result) for make in CELL.values()), *texts))
    header = (*CELL, "Δ accuracy", "", "Δ NLL", "", "Δ ECE", "")
    return Table(header, tuple(rows), COMPARED)


def mean_table(results: Results) -> Table:
    """The scores of mean weights, of methods that draw."""
    plain = [
        result._replace(runs=[{"test": run["mean_weights"]} for run in result.runs])
        for result in results.values()
        if all("mean_weights" in run for run in result.runs)
    ]
    return Table.of(plain, CELL | SCORED, MEANS)


def strange_table(results: Results) -> Table:
    """Strange images: a row per cell and set."""
    rows = []
    for result in results.values():
        first, runs = [make(result) for make in CELL.values()], result.runs
        for name in runs[0]["strange"]:
            keys = ("auroc", "fpr95", "auroc_entropy")
            seen = [np.array([r["strange"][name][key] for r in runs]) for key in keys]
            rows.append((*first, name, *(shown(values, digits=3) for values in seen)))
        last = np.array([run["shifted"]["auroc"][-1] for run in runs])
        rows.append((*first, "shifted", shown(last, digits=3), None, None))
    header = (*CELL, "images", "AUROC", "FPR95", "AUROC, entropy")
    return Table(header, tuple(rows), STRANGE)


def search_table(results: Results) -> Table:
    """What the searches found."""

    def winner(result):
        values = result.runs[0]["values"].items()
        return ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in values)

    def best(result):
        losses = [r["nll"] for r in result.trials if r.get("nll") is not None]
        return f"{min(losses):.4f}" if losses else None

    columns = {name: CELL[name] for name in ("data", "network", "method")}
    columns |= {"trials": lambda r: str(len(r.trials))}
    columns |= {"winner": winner, "validation NLL": best}
    return Table.of([r for r in results.values() if r.trials], columns, SEARCHED)


def active_section(records: list[Record], out: Path) -> list[Section]:
    """Active learning; nothing if it has not been run."""
    found = {
        name: [r for r in records if r["kind"] == "active" and r["method"] == name]
        for name in ACTIVE
    }
    found = {name: runs for name, runs in found.items() if runs}
    if not found:
        return []
    path = out / "active.png"
    plot_active(found, path)
    areas = {
        n: np.array([np.mean(r["accuracy"]) for r in rs]) for n, rs in found.items()
    }
    base = areas.get("active_random")
    rows = []
    for name, runs in found.items():
        last = np.array([run["accuracy"][-1] for run in runs])
        seen = None
        if base is not None and name != "active_random":
            seen = compare(areas[name], base)
        rows.append(
            (
                ACTIVE_TITLES[name],
                str(len(runs)),
                shown(last, 100, 2),
                shown(areas[name], 100, 2),
                seen and f"{100 * seen.difference:+.2f}",
                seen and p_text(seen.p),
            )
        )
    header = ("method", "runs", "accuracy at the end, %", "area, %", "Δ area", "")
    picture = Plot(path, "Test images against labelled images, with standard errors")
    parts = LEARNED, Table(header, tuple(rows)), picture
    return [Section("Active learning", parts)]


def regression_section(records: list[Record], out: Path) -> list[Section]:
    """The regression example; nothing if it has not been run."""
    found = {r["method"]: r for r in records if r["kind"] == "regression"}
    found = {name: found[name] for name in REGRESSION if name in found}
    if not found:
        return []
    path = out / "regression.png"
    plot_regression(found, path)
    where = {"at data": "data", "in the gap": "gap", "outside": "outside"}
    columns: dict[str, Callable[[Any], Any]] = {
        "method": lambda r: REGRESSION_TITLES[r["method"]],
        "prior precision": lambda r: f"{r['precision']:.3g}",
        **{k: lambda r, v=v: f"{r['where'][v]:.3f}" for k, v in where.items()},
    }
    picture = Plot(path, "Predicted mean and two standard deviations")
    parts = SYNTHETIC, Table.of(found.values(), columns), picture
    return [Section("Regression", parts)]


def setting(config: Record) -> str:
    """One paragraph on what was trained."""
    pool = config["pool"]
    images = f", averaged over squares of {pool} x {pool} pixels" if pool > 1 else ""
    return (
        f"{config['train_examples']} training images{images}, not augmented, "
        f"{config['validation_examples']} others for the searches; "
        f"{config['epochs']} epochs at batch {config['batch_size']} and a learning "
        "rate that falls to 0 as a cosine, for all methods. CIFAR-10 is a JPEG copy, "
        "so that its figures are not those of the original. Adam has decoupled "
        "weight decay. Posteriors draw one set of weights per step and "
        f"{config['samples']} for predictions."
    )


def summary(results: Results) -> list[dict[str, Any]]:
    """Numbers of every cell as JSON values."""
    rows = []
    for cell, result in results.items():
        found = comparisons(results, cell, NAMES)
        row: dict[str, Any] = {
            **dataclasses.asdict(cell),
            "runs": len(result.runs),
            "values": result.runs[0].get("values"),
            "seconds_per_step": result.seconds(),
        }
        for name in ("accuracy", "nll", "brier", "ece", "adaptive_ece"):
            values = result.figures(name)
            row[name] = float(values.mean())
            row[f"{name}_error"] = standard_error(values)
        row["less_adam"] = found and {k: v._asdict() for k, v in found.items()}
        rows.append(row)
    return rows


def save_report(config: BayesReport, console: Console) -> None:
    """Prints table and answer, writes page, plots, summary and the runs as Parquet."""
    out = config.out or config.folder
    out.mkdir(parents=True, exist_ok=True)
    results, records = read_results(config.folder), read_all(config.folder)
    shared = next(iter(results.values())).runs[0]["config"]
    reliability, shift = out / "reliability.png", out / "shift.png"
    plot_reliability(results, reliability)
    plot_shift(results, shift)
    said, scores = answer(results), score_table(results)
    gap = "Accuracy less confidence: below 0 a method is over-confident"
    noise = "Test images under normal noise; its strength in units of the brightest"
    sections = [
        Section("Answer", (said,)),
        Section("Setting", (setting(shared),)),
        Section("Result", (scores, comparison_table(results))),
        Section("Calibration", (Plot(reliability, gap), mean_table(results))),
        Section("Shifted images", (Plot(shift, noise),)),
        Section("Strange images", (strange_table(results),)),
        Section("The searches", (BEFORE, search_table(results))),
        *active_section(records, out),
        *regression_section(records, out),
    ]
    facts = {"config": shared, "cells": summary(results), "answer": said}
    (out / "summary.json").write_text(json.dumps(metrics.to_json(facts), indent=1))
    look: dict[str, Any] = {"markup": False, "highlight": False}
    console.print(pages.markdown_part(scores), soft_wrap=True, **look)
    console.print(said, **look)
    pages.publish("Bayesian study", sections, shared, config.folder, out, console)
