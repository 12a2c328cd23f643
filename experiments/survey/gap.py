"""The page's sections on the generalisation gap: which measure goes with it."""

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.studies.pages import NOTHING, Plot, Section, Table
from experiments.studies.records import ask
from experiments.survey.config import (
    APPROXIMATION_TITLES,
    APPROXIMATIONS,
    MATRICES,
    MATRIX_TITLES,
)
from experiments.survey.correlations import (
    Interval,
    granulated,
    interval,
    kendall,
    partial,
)

# Told apart by colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
MARKS = ("o", "s", "^", "D")
# A quarter of the file, and nobody sees it.
DPI, SHADES = 90, 128

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
        runs = self.rows.setdefault(key, {}).setdefault(row["cell"], {})
        runs.setdefault(row["run"], row)

    def correlate(self, predictor: Predictor, coefficient: Coefficient) -> Correlation:
        """A coefficient of a measure and the gap."""
        asked = predictor, coefficient
        if asked not in self.known:
            self.known[asked] = self.mean(predictor, coefficient)
        return self.known[asked]

    def mean(self, predictor: Predictor, coefficient: Coefficient) -> Correlation:
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


TITLE = "Which measure goes with the generalisation gap"
TITLES = MEASURES | OTHERS
BASELINE = Predictor("train_loss", None)
TOO_FEW = (
    f"No cell has {LEAST_RUNS} runs with a gap and different values, so that nothing "
    "can be said about it."
)
EXPLAINED = (
    "Kendall's tau-b of measure and gap over the runs of a cell (one data set, one "
    "model: only hyper-parameters differ), mean over cells with at least "
    f"{LEAST_RUNS} runs; in brackets the interval at {LEVEL:.0%} of a bootstrap over "
    f"whole cells, given from {LEAST_CELLS} cells on. One hyper-parameter at a time: "
    "the granulated coefficient, over pairs of runs that differ in one of optimiser, "
    "learning rate, batch size, weight decay and seed. Given the training loss: the "
    "partial tau, given the training loss at the end. If no measure had to do with the "
    "gap, one interval in twenty would still not contain 0, and more where the cells "
    "are few: the bootstrap is then too narrow."
)
Found = dict[Predictor, Correlation]


def name_of(predictor: Predictor) -> str:
    """A measure and its matrix, in words."""
    title = TITLES[predictor.measure]
    if predictor.matrix is None:
        return title
    return f"{title} of the {MATRIX_TITLES[predictor.matrix]}"


def strength(found: Correlation) -> float:
    """How far a coefficient is from 0; below all where there is none."""
    return -1.0 if np.isnan(found.found.value) else abs(found.found.value)


def strongest(found: Found) -> Predictor | None:
    """The measure whose coefficient is farthest from 0, without the baseline."""
    known = [
        p for p, c in found.items() if strength(c) >= 0 and p.measure != "train_loss"
    ]
    return max(known, key=lambda p: strength(found[p]), default=None)


def counted(found: Found) -> str:
    """How many intervals are without 0, of how many."""
    known = [
        c
        for p, c in found.items()
        if not np.isnan(c.found.low) and p.measure != "train_loss"
    ]
    if not known:
        return (
            f"there are no intervals, for which {LEAST_CELLS} cells with a coefficient "
            "are wanted"
        )
    without = sum(c.decided for c in known)
    return f"{without} of {len(known)} intervals do not contain 0"


def best_said(found: Found) -> str:
    """The strongest measure and what its interval says."""
    best = strongest(found)
    if best is None:
        return "no measure has a coefficient"
    value = found[best]
    said = f"farthest from 0 is the {name_of(best)}, {value.text}"
    if not np.isnan(value.found.low) and not value.decided:
        said += ", an interval that contains 0"
    cells, runs = plural(value.cells, "cell"), plural(value.runs, "run")
    return f"{said}, over {cells} with {runs}"


def at_the_end(records: Records, out: Path) -> Section:
    """Which measure of the full matrices goes with the gap."""
    wanted = predictors()
    taus = {p: records.correlate(p, plain) for p in wanted}
    single = {p: records.correlate(p, one_at_a_time) for p in wanted}
    given = {p: records.correlate(p, given_loss) for p in wanted}
    if strongest(taus) is None:
        return Section(TITLE, (TOO_FEW,))
    path = out / "taus.png"
    save_taus(by_measure(taus), path)
    caption = f"Tau at the last checkpoint and its interval at {LEVEL:.0%}, full matrix"
    table = end_table(taus, single, given)
    said = end_said(taus, single, given)
    return Section(TITLE, (said, EXPLAINED, table, Plot(path, caption)))


def end_said(taus: Found, single: Found, given: Found) -> str:
    base = taus[BASELINE]
    farther = sum(
        strength(c) > strength(base)
        for p, c in taus.items()
        if p.measure != "train_loss"
    )
    contains = "" if base.decided or np.isnan(base.found.low) else " (containing 0)"
    return (
        f"At the last checkpoint, {counted(taus)}; {best_said(taus)}. It is chosen as "
        f"the farthest of {len(taus) - 1}, which makes it look stronger than it is. "
        f"The training loss alone has {base.text}{contains}; {farther} measures are "
        f"farther from 0. With one hyper-parameter at a time, {counted(single)}; "
        f"{best_said(single)}. Given the training loss, {counted(given)}; "
        f"{best_said(given)}."
    )


def end_table(taus: Found, single: Found, given: Found) -> Table:
    """A row for every measure and matrix, the strongest first."""
    rows = []
    for p in sorted(taus, key=lambda p: -strength(taus[p])):
        found = taus[p], single[p], given[p]
        counts = [c.cells for c in found]
        cells = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
        matrix = NOTHING if p.matrix is None else MATRIX_TITLES[p.matrix]
        texts = [c.text for c in found]
        rows.append((TITLES[p.measure], matrix, *texts, cells, str(taus[p].runs)))
    header = (
        "measure", "matrix", "tau", "one hyper-parameter at a time",
        "given the training loss", "cells", "runs",
    )  # fmt: skip
    caption = (
        "Coefficients with the gap, from −1 to 1, full matrices at the last "
        "checkpoint; the farthest from 0 first"
    )
    return Table(header, tuple(rows), caption)


def by_measure(taus: Found) -> dict[str, dict[str | None, Interval]]:
    """What the plot shows: only what has a coefficient."""
    found: dict[str, dict[str | None, Interval]] = {}
    for p, c in taus.items():
        if strength(c) >= 0:
            found.setdefault(TITLES[p.measure], {})[p.matrix] = c.found
    return found


def stand_ins(records: Records) -> Section:
    """Whether measures of the approximations do what those of the matrices do."""
    found = all_approximations(records)
    title = "Measures of the approximations"
    if not any(strength(c) >= 0 for row in found.values() for c in row.values()):
        return Section(title, (TOO_FEW,))
    parts = [
        text for name in APPROXIMATIONS[1:] if (text := stand_in_said(name, found))
    ]
    said = "; ".join(parts) or "no approximation was measured beside a full matrix"
    rows = [
        (
            MEASURES[measure],
            MATRIX_TITLES[matrix],
            *(row[name].text for name in APPROXIMATIONS),
            str(max(c.cells for c in row.values())),
            str(max(c.runs for c in row.values())),
        )
        for (measure, matrix), row in found.items()
    ]
    header = ("measure", "matrix", *APPROXIMATION_TITLES.values(), "cells", "runs")
    caption = "Tau with the gap at the last checkpoint, from −1 to 1, with its interval"
    table = Table(header, tuple(rows), caption)
    return Section(title, (f"Tau beside that of the full matrix: {said}.", table))


def stand_in_said(
    name: str, found: dict[tuple[str, str], dict[str, Correlation]]
) -> str | None:
    """How an approximation's coefficients differ from the full matrices'."""
    pairs = [
        (row[name].found.value, row["full"].found.value)
        for row in found.values()
        if strength(row[name]) >= 0 and strength(row["full"]) >= 0
    ]
    if not pairs:
        return None
    apart = [abs(a - b) for a, b in pairs]
    same = sum(np.sign(a) == np.sign(b) for a, b in pairs)
    return (
        f"{APPROXIMATION_TITLES[name]} differs by {np.median(apart):.2f} in the median "
        f"and {max(apart):.2f} at most, with the same sign in {same} of {len(pairs)}"
    )


def early(records: Records) -> Section:
    """Whether measures at the second checkpoint go with the gap at the end."""
    title = "Early in training"
    if not records.has_early:
        said = "No run has a checkpoint between its first and its last."
        return Section(title, (said,))
    taus = {p: records.correlate(p, plain) for p in predictors(early=True)}
    if strongest(taus) is None:
        return Section(title, (TOO_FEW,))
    ends = {p: records.correlate(p, plain) for p in predictors()}
    rows = []
    for p in sorted(taus, key=lambda p: -strength(taus[p])):
        end = ends[p._replace(early=False)]
        matrix = NOTHING if p.matrix is None else MATRIX_TITLES[p.matrix]
        counts = str(taus[p].cells), str(taus[p].runs)
        rows.append((TITLES[p.measure], matrix, taus[p].text, end.text, *counts))
    header = ("measure", "matrix", "second checkpoint", "last", "cells", "runs")
    caption = "Tau with the gap at the end, from −1 to 1, full matrices"
    said = (
        f"At the second checkpoint, {counted(taus)}; {best_said(taus)}. The training "
        "loss there has "
        f"{taus[BASELINE._replace(early=True)].text}."
    )
    return Section(title, (said, Table(header, tuple(rows), caption)))


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


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def write(figure: Figure, path: Path) -> None:
    """Writes a figure as a small file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    with Image.open(content) as image:
        image.convert("RGB").quantize(SHADES).save(path, optimize=True)
