"""Which measure goes with the generalisation gap: rank correlations inside cells.

A cell is a data set with a network; its runs differ in hyper-parameters alone. Every
coefficient is taken inside each cell and averaged over the cells, so that no difference
between data sets or networks is in it. Intervals are bootstraps over whole cells.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import duckdb
import numpy as np

from experiments.studies.records import ask
from experiments.survey.config import APPROXIMATIONS, MATRICES
from kfac_jax_lite.curvature.correlations import (
    Interval,
    granulated,
    interval,
    kendall,
    partial,
)

# What is asked of a matrix, and what does not depend on one.
MEASURES = {
    "trace": "trace",
    "lambda_max": "largest eigenvalue",
    "frobenius": "Frobenius norm",
    "effective_dimension": "effective dimension",
    "stable_rank": "stable rank",
    "condition_number": "condition number",
    "log_det": "log determinant",
    "tic": "TIC",
}
OTHERS = {
    "sharpness": "sharpness",
    "gradient_norm": "gradient norm",
    "train_loss": "training loss",
}
SETTINGS = ("optimizer", "learning_rate", "batch_size", "weight_decay", "seed")
LEAST_RUNS, LEAST_CELLS = 3, 5
LEVEL, RESAMPLES = 0.95, 1000
ROWS = """
    SELECT run, dataset || ', ' || model AS cell, matrix, approximation, gap, last,
        checkpoint, optimizer, learning_rate, batch_size, weight_decay, seed,
        eigenvalues[1] AS lambda_max, trace, frobenius, effective_dimension,
        stable_rank, condition_number, log_det, tic, sharpness, gradient_norm,
        train_loss,
        max(train_loss) FILTER (last) OVER (PARTITION BY run) AS final_loss
    FROM checkpoints QUALIFY gap IS NOT NULL AND (last OR checkpoint = 1)
    ORDER BY dataset, model, run
"""
Row = dict[str, Any]
Runs = dict[str, Row]
Key = tuple[str | None, str, bool]
Coefficient = Callable[[list[Row], str], float]


class Correlation(NamedTuple):
    """A coefficient's mean over the cells."""

    found: Interval  # the mean with its interval; NaN where there is none
    cells: int  # how many it is of
    runs: int  # in these cells

    @property
    def decided(self) -> bool:
        """Whether there is an interval and 0 is not in it."""
        return self.found.low > 0 or self.found.high < 0

    @property
    def text(self) -> str:
        """The mean, then the interval; a dash for what there is not."""
        mean, low, high = self.found
        if math.isnan(mean):
            return "–"
        if math.isnan(low):
            return f"{mean:+.2f}"
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


class Predictor(NamedTuple):
    """A measure, of a matrix in an approximation, at a checkpoint."""

    measure: str  # a key of `MEASURES` or `OTHERS`
    matrix: str | None  # one of `MATRICES`; None for what has none
    approximation: str = "full"  # one of `APPROXIMATIONS`
    early: bool = False  # at the second checkpoint, not at the last


def predictors(approximation: str = "full", early: bool = False) -> list[Predictor]:
    """All measures of one approximation, those without a matrix at the end."""
    found = [Predictor(m, x, approximation, early) for m in MEASURES for x in MATRICES]
    if approximation == "full":
        found += [Predictor(name, None, early=early) for name in OTHERS]
    return found


class Records:
    """The rows that coefficients are made of, read once; what was asked is kept."""

    def __init__(self, base: duckdb.DuckDBPyConnection):
        """Reads them."""
        self.rows: dict[Key, dict[str, Runs]] = {}
        self.known: dict[tuple[Predictor, Coefficient], Correlation] = {}
        # Whether a run has a checkpoint between its first and its last.
        self.has_early = False
        for row in ask(base, ROWS):
            early = row["checkpoint"] == 1
            self.has_early |= early and not row["last"]
            for when, wanted in ((False, row["last"]), (True, early)):
                if wanted:
                    self.keep(row, (row["matrix"], row["approximation"], when))
                    self.keep(row, (None, "full", when))

    def keep(self, row: Row, key: Key) -> None:
        """Keeps the first row of a run."""
        runs = self.rows.setdefault(key, {}).setdefault(row["cell"], {})
        runs.setdefault(row["run"], row)

    def correlate(self, predictor: Predictor, coefficient: Coefficient) -> Correlation:
        """A coefficient of a measure and the gap."""
        asked = predictor, coefficient
        if asked not in self.known:
            self.known[asked] = self.mean(predictor, coefficient)
        return self.known[asked]

    def mean(self, predictor: Predictor, coefficient: Coefficient) -> Correlation:
        """The same, made anew."""
        values, count = [], 0
        key = predictor.matrix, predictor.approximation, predictor.early
        for runs in self.rows.get(key, {}).values():
            rows = [r for r in runs.values() if r[predictor.measure] is not None]
            if len(rows) < LEAST_RUNS:
                continue
            value = coefficient(rows, predictor.measure)
            if not math.isnan(value):
                values.append(value)
                count += len(rows)
        return Correlation(mean_of(values), len(values), count)


def mean_of(values: list[float]) -> Interval:
    """The mean over cells, and its interval from a bootstrap over the cells."""
    if len(values) >= LEAST_CELLS:
        return interval(np.mean, values, confidence=LEVEL, num_resamples=RESAMPLES)
    return Interval(float(np.mean(values)) if values else math.nan, math.nan, math.nan)


def column(rows: list[Row], name: str) -> np.ndarray:
    """A field of the rows."""
    return np.array([row[name] for row in rows])


def plain(rows: list[Row], measure: str) -> float:
    """Kendall's tau of a measure and the gap."""
    return kendall(column(rows, measure), column(rows, "gap"))


def one_at_a_time(rows: list[Row], measure: str) -> float:
    """The granulated coefficient: pairs of runs that differ in one hyper-parameter."""
    settings = {name: column(rows, name) for name in SETTINGS}
    return granulated(column(rows, measure), column(rows, "gap"), settings).value


def given_loss(rows: list[Row], measure: str) -> float:
    """The partial tau, given the training loss at the end."""
    columns = (column(rows, name) for name in (measure, "gap", "final_loss"))
    return partial(*columns)


def all_approximations(
    records: Records,
) -> dict[tuple[str, str], dict[str, Correlation]]:
    """Tau at the last checkpoint of every measure and matrix, by approximation."""
    return {
        (measure, matrix): {
            approximation: records.correlate(
                Predictor(measure, matrix, approximation), plain
            )
            for approximation in APPROXIMATIONS
        }
        for measure in MEASURES
        for matrix in MATRICES
    }
