"""The page's sections on matrices beside one another and beside approximations."""

import itertools
from pathlib import Path

import numpy as np

from experiments.studies.pages import NOTHING, Part, Plot, Section, Table
from experiments.studies.records import ask
from experiments.survey.config import APPROXIMATIONS, MATRICES
from experiments.survey.plots import save_agreement, save_errors
from experiments.survey.schema import APPROXIMATION_TITLES, MATRIX_TITLES
from experiments.survey.sections import Base, Row, fixed, number

FIRST, LAST = "checkpoint = 0", "last"
PAIRS = list(itertools.combinations(range(len(MATRICES)), 2))
# Means of the entries, over the runs of each data set or of all.
AGREEMENT = """
    SELECT {dataset} AS dataset, matrix, count(*) AS runs,
        [avg({field}[1]), avg({field}[2]), avg({field}[3]), avg({field}[4])] AS means
    FROM checkpoints WHERE approximation = 'full' AND {when}
    GROUP BY ALL ORDER BY dataset
"""
SHARES = ("error", "spectral_error", "cosine", "overlap")
QUARTILES = ", ".join(
    f"quantile_cont({name}, [0.25, 0.5, 0.75]) AS {name}" for name in SHARES
)
ERRORS = f"""
    SELECT {{group}} matrix, approximation, count(error) AS runs,
        median(step) AS step, {QUARTILES}
    FROM checkpoints WHERE approximation <> 'full' AND {{when}}
    GROUP BY ALL
    ORDER BY ALL
"""


def squares(base: Base, field: str, when: str, dataset: str) -> dict[str, np.ndarray]:
    """Means of the agreement of all pairs of full matrices.

    Returns:
        Arrays ``[4, 4]`` by group, NaN for what is missing.
    """
    sql = AGREEMENT.format(dataset=dataset, field=field, when=when)
    found: dict[str, np.ndarray] = {}
    for row in ask(base, sql):
        square = found.setdefault(row["dataset"], np.full((4, 4), np.nan))
        square[MATRICES.index(row["matrix"])] = np.array(row["means"], np.float64)
    return found


def pair_title(pair: tuple[int, int]) -> str:
    """Two matrices."""
    return " – ".join(MATRIX_TITLES[MATRICES[i]] for i in pair)


def agreement(base: Base, out: Path) -> Section:
    """How much the four full matrices are alike."""
    fields = {"cosine": "cosines", "top-ten overlap": "subspace_overlaps"}
    whole = {
        (title, name): squares(base, field, when, "'all'").get("all")
        for title, field in fields.items()
        for name, when in (("first", FIRST), ("last", LAST))
    }
    known = {key: value for key, value in whole.items() if value is not None}
    sets = {
        title: squares(base, field, LAST, "dataset") for title, field in fields.items()
    }
    if not known or not any(np.isfinite(s[p]) for s in known.values() for p in PAIRS):
        said = "No run has a full matrix beside another: there is nothing to compare."
        return Section("Matrix against matrix", (said,))
    panels = {f"{title}, {name} checkpoint": s for (title, name), s in known.items()}
    save_agreement(panels, 2, out / "agreement.png")
    by_set = {
        f"{name}: {title}": square
        for title, squares_of in sets.items()
        for name, square in squares_of.items()
    }
    save_agreement(by_set, len(sets["cosine"]), out / "agreement_datasets.png")
    return Section(
        "Matrix against matrix",
        (
            agreement_said(whole["cosine", "last"], whole["top-ten overlap", "last"]),
            pair_table(base, whole),
            Plot(out / "agreement.png", "Full matrices, means over all runs"),
            set_table(sets),
            Plot(
                out / "agreement_datasets.png",
                "Full matrices at the last checkpoint by data set, means over runs",
            ),
        ),
    )


def agreement_said(cosines: np.ndarray | None, overlaps: np.ndarray | None) -> str:
    """Which pairs are most and least alike at the last checkpoint."""
    parts = []
    for title, square in (("cosine", cosines), ("top-ten overlap", overlaps)):
        pairs = [] if square is None else [p for p in PAIRS if np.isfinite(square[p])]
        if square is None or not pairs:
            continue
        most = max(pairs, key=lambda p, s=square: s[p])
        least = min(pairs, key=lambda p, s=square: s[p])
        parts.append(
            f"by {title}, {pair_title(most)} are most alike ({square[most]:.2f}) and "
            f"{pair_title(least)} least ({square[least]:.2f})"
        )
    return (
        f"At the last checkpoint, {'; '.join(parts)}. Cosines are of Frobenius's inner "
        "product and do not know of scale; the overlap of the ten leading eigenvectors "
        "is 1 for the same subspace and about 10 / P for random ones."
    )


def pair_table(base: Base, whole: dict[tuple[str, str], np.ndarray | None]) -> Table:
    """A row for every pair of matrices."""
    sql = "SELECT count(DISTINCT run) AS runs FROM checkpoints WHERE last"
    (count,) = ask(base, f"{sql} AND approximation = 'full'")
    rows = [
        (
            pair_title(pair),
            *(NOTHING if s is None else entry(s[pair]) for s in whole.values()),
            str(count["runs"]),
        )
        for pair in PAIRS
    ]
    header = ("matrices", *(f"{a}, {b} checkpoint" for a, b in whole), "runs")
    return Table(header, tuple(rows), "Means over runs, from −1 (overlap: 0) to 1")


def set_table(sets: dict[str, dict[str, np.ndarray]]) -> Table:
    """A row for every data set, a column for every pair."""
    cosines, overlaps = sets.values()
    rows = [
        (
            name,
            *(f"{entry(cosines[name][p])} / {entry(overlaps[name][p])}" for p in PAIRS),
        )
        for name in cosines
    ]
    header = ("data set", *map(pair_title, PAIRS))
    return Table(header, tuple(rows), "Cosine / top-ten overlap, last checkpoint")


def entry(value: float) -> str:
    """A mean with two decimals; a dash for none."""
    return NOTHING if np.isnan(value) else f"{value:.2f}"


def errors(base: Base, out: Path) -> Section:
    """How far the approximations are from the full matrices."""
    title = "Approximations against the full matrices"
    last = sorted_rows(ask(base, ERRORS.format(group="", when=LAST)))
    last = [row for row in last if row["runs"]]
    if not last:
        return Section(title, ("No approximation was measured beside a full matrix.",))
    first = sorted_rows(ask(base, ERRORS.format(group="", when=FIRST)))
    path = out / "errors.png"
    save_errors(ask(base, ERRORS.format(group="checkpoint,", when="true")), path)
    parts: list[Part] = [
        errors_said(last),
        error_table(first, "first"),
        error_table(last, "last"),
        Plot(path, "Medians over runs with quartiles, at all checkpoints"),
        model_table(ask(base, ERRORS.format(group="model,", when=LAST))),
    ]
    return Section(title, tuple(parts))


def sorted_rows(rows: list[Row]) -> list[Row]:
    """By matrix, then by approximation, in the survey's order."""
    return sorted(
        rows,
        key=lambda r: (
            MATRICES.index(r["matrix"]),
            APPROXIMATIONS.index(r["approximation"]),
        ),
    )


def errors_said(rows: list[Row]) -> str:
    """Medians over the matrices' rows at the last checkpoint, and the order."""
    parts = []
    for name in APPROXIMATIONS[1:]:
        found = [r for r in rows if r["approximation"] == name]
        middles = [r["error"][1] for r in found]
        if middles:
            parts.append(
                f"{APPROXIMATION_TITLES[name]} {min(middles):.2f} to {max(middles):.2f}"
            )
    worse = sum(r["error"][1] >= 1 for r in rows)
    return (
        "Relative error in Frobenius's norm at the last checkpoint, medians over runs, "
        f"from the best to the worst of the matrices: {'; '.join(parts)}. "
        f"{worse} of {len(rows)} medians are 1 or more: no better than a matrix of "
        "zeros."
    )


def quartiles(values: list[float] | None) -> str:
    """The median with the quartiles around it."""
    if values is None:
        return NOTHING
    low, middle, high = (number(value, 3) for value in values)
    return f"{middle} ({low} to {high})"


def error_table(rows: list[Row], which: str) -> Table:
    """A row for every matrix and approximation."""
    cells = [
        (
            MATRIX_TITLES[r["matrix"]],
            APPROXIMATION_TITLES[r["approximation"]],
            *(quartiles(r[name]) for name in SHARES),
            str(r["runs"]),
        )
        for r in rows
    ]
    header = (
        "matrix", "approximation", "error, Frobenius", "error, spectral", "cosine",
        "top-ten overlap", "runs",
    )  # fmt: skip
    caption = (
        f"At the {which} checkpoint, median over runs and quartiles; errors are "
        "relative to the full matrix"
    )
    return Table(header, tuple(cells), caption)


def model_table(rows: list[Row]) -> Table:
    """A row for every model and approximation, a column for every matrix."""
    found = {(r["model"], r["approximation"], r["matrix"]): r for r in rows}
    cells = []
    for model in sorted({row["model"] for row in rows}):
        for name in APPROXIMATIONS[1:]:
            here = [found.get((model, name, matrix)) for matrix in MATRICES]
            if any(here):
                texts = [NOTHING if r is None else both(r) for r in here]
                runs = max(r["runs"] for r in here if r)
                title = APPROXIMATION_TITLES[name]
                cells.append((model, title, *texts, str(runs)))
    header = ("model", "approximation", *MATRIX_TITLES.values(), "runs")
    caption = (
        "Relative error in Frobenius's norm / cosine with the full matrix, last "
        "checkpoint, medians over the runs of all data sets"
    )
    return Table(header, tuple(cells), caption)


def both(row: Row) -> str:
    """Median error and median cosine."""
    middles = (row[name] and row[name][1] for name in ("error", "cosine"))
    return " / ".join(fixed(value) for value in middles)
