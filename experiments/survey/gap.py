"""The page's sections on the generalisation gap: which measure goes with it."""

from pathlib import Path

import numpy as np

from experiments.studies.pages import NOTHING, Plot, Section, Table
from experiments.survey.config import APPROXIMATIONS
from experiments.survey.plots import save_taus
from experiments.survey.prediction import (
    LEAST_CELLS,
    LEAST_RUNS,
    LEVEL,
    MEASURES,
    OTHERS,
    Correlation,
    Predictor,
    Records,
    all_approximations,
    given_loss,
    one_at_a_time,
    plain,
    predictors,
)
from experiments.survey.schema import APPROXIMATION_TITLES, MATRIX_TITLES
from experiments.survey.sections import plural
from kfac_jax_lite.curvature.correlations import Interval

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
    """The answer in one paragraph."""
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
