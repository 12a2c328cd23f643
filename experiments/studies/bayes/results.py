"""The finished runs of a Bayesian study, and what they say of its question.

Tests are Welch's, of the seeds' figures, two-sided, each for itself: none is corrected
for the number of comparisons. They hold for the hyper-parameters that the searches
found; what another search would change is not in them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.errors import MetricsError
from experiments.studies.bayes.config import ADAM, METHODS, Cell
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
    marks = {record["fingerprint"] for record in records}
    if len(marks) > 1:
        raise MetricsError(
            f"{folder} holds runs of {len(marks)} configurations; wanted one."
        )
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
    if len(values) < 2:
        return None
    return float(values.std(ddof=1) / np.sqrt(len(values)))


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
