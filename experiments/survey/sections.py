"""The page's first sections and its last: what was run, eigenvalues, the columns.

Each is made by queries over ``checkpoints`` and starts with a sentence on its numbers.
"""

from pathlib import Path
from typing import Any

import duckdb

from experiments.studies.pages import NOTHING, Plot, Section, Table, show
from experiments.studies.records import ask
from experiments.survey.config import MATRICES
from experiments.survey.plots import save_trajectories
from experiments.survey.schema import MATRIX_TITLES, ROW_COLUMNS, RUN_COLUMNS

Base = duckdb.DuckDBPyConnection
Row = dict[str, Any]
TOTALS = """
    SELECT count(*) AS runs, sum(rows) AS rows, sum(seconds) / 3600 AS hours,
        count(*) FILTER (gap IS NULL) AS lost,
        count(DISTINCT dataset) AS datasets, count(DISTINCT model) AS models,
        count(DISTINCT (dataset, model)) AS cells,
        count(DISTINCT fingerprint) AS configurations,
        min(damping) AS least_damping, max(damping) AS most_damping
    FROM (
        SELECT run, dataset, model, fingerprint, damping, count(*) AS rows,
            any_value(seconds) AS seconds, any_value(gap) AS gap
        FROM checkpoints GROUP BY ALL
    )
"""
CELLS = """
    SELECT dataset, any_value(data) AS data, model, any_value(num_params) AS params,
        any_value(num_train) AS train, any_value(num_test) AS test,
        count(DISTINCT run) AS runs, count(*) AS rows,
        list_sort(list(DISTINCT step)) AS steps,
        median(train_loss) FILTER (last) AS train_loss,
        median(test_loss) FILTER (last) AS test_loss,
        median(gap) FILTER (last) AS gap,
        100 * median(test_accuracy) FILTER (last) AS accuracy,
        median(seconds) AS seconds
    FROM checkpoints GROUP BY dataset, model ORDER BY dataset, model
"""
SETTINGS = """
    SELECT optimizer, list_sort(list(DISTINCT learning_rate)) AS rates,
        list_sort(list(DISTINCT batch_size)) AS batch_sizes,
        list_sort(list(DISTINCT weight_decay)) AS weight_decays,
        count(DISTINCT seed) AS seeds, count(DISTINCT run) AS runs,
        count(DISTINCT run) FILTER (gap IS NULL) AS lost
    FROM checkpoints GROUP BY optimizer ORDER BY optimizer
"""
ENDS = """
    SELECT dataset, matrix, count(DISTINCT run) AS runs,
        median(eigenvalues[1]) FILTER (checkpoint = 0) AS first,
        median(eigenvalues[1]) FILTER (last) AS last,
        median(eigenvalues[-1] / eigenvalues[1]) FILTER (checkpoint = 0) AS ratio,
        median(eigenvalues[-1] / eigenvalues[1]) FILTER (last) AS last_ratio
    FROM checkpoints WHERE approximation = 'full'
    GROUP BY dataset, matrix
    ORDER BY dataset, list_position($matrices, matrix)
"""
GROWTH = """
    SELECT matrix, count(*) AS runs, count(*) FILTER (last > first) AS grown,
        median(last / first) AS factor
    FROM (
        SELECT matrix, max(eigenvalues[1]) FILTER (checkpoint = 0) AS first,
            max(eigenvalues[1]) FILTER (last) AS last
        FROM checkpoints WHERE approximation = 'full'
        GROUP BY run, matrix HAVING count(*) > 1
    ) WHERE first > 0 AND last IS NOT NULL
    GROUP BY matrix ORDER BY list_position($matrices, matrix)
"""
# Of every cell the run that ends with the lowest test loss.
TRAJECTORIES = """
    SELECT dataset, model, num_params, matrix, step, eigenvalues FROM checkpoints
    WHERE approximation = 'full' AND run IN (
        SELECT arg_min(run, test_loss) FROM checkpoints WHERE last
        GROUP BY dataset, model
    )
    ORDER BY dataset, model, list_position($matrices, matrix), step
"""


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits; a dash for none."""
    return NOTHING if value is None else f"{value:.{digits}g}"


def fixed(value: float | None, places: int = 2) -> str:
    """A number with so many decimals; a dash for none."""
    return NOTHING if value is None else f"{value:.{places}f}"


def plural(count: int, word: str) -> str:
    """A count with its noun."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def what_was_run(base: Base) -> Section:
    """Cells, settings and time."""
    (total,) = ask(base, TOTALS)
    spent = "" if total["hours"] is None else f", together {total['hours']:.2g} hours"
    lost = "All end with finite losses"
    if total["lost"]:
        lost = (
            f"{total['lost']} of them ended with a loss that is not finite: left out "
            "wherever the gap is needed"
        )
    said = (
        f"{plural(total['runs'], 'run')} of {plural(total['cells'], 'cell')} "
        f"({plural(total['datasets'], 'data set')}, {plural(total['models'], 'model')})"
        f"{spent}, in {plural(total['rows'], 'row')}. {lost}. The gap is test loss "
        "less training loss at a run's last checkpoint. The damping λ of the measures "
        f"is {number(total['least_damping'])}"
    )
    if total["least_damping"] != total["most_damping"]:
        said += f" to {number(total['most_damping'])}"
    said += "."
    if total["configurations"] > 1:
        said += f" These are runs of {total['configurations']} configurations."
    return Section("What was run", (said, cell_table(base), setting_table(base)))


def cell_table(base: Base) -> Table:
    """A row for every data set and model."""
    rows = [
        (
            *(show(r[name]) for name in ("dataset", "data", "model")),
            *(show(r[name]) for name in ("params", "train", "test", "runs", "rows")),
            show(r["steps"]),
            *(number(r[name]) for name in ("train_loss", "test_loss", "gap")),
            fixed(r["accuracy"], 1),
            fixed(r["seconds"], 1),
        )
        for r in ask(base, CELLS)
    ]
    header = (
        "data set", "in full", "model", "parameters", "training examples",
        "test examples", "runs", "rows", "checkpoints at steps", "training loss",
        "test loss", "gap", "test accuracy, %", "seconds of a run",
    )  # fmt: skip
    caption = "Losses, gap, accuracy at the last checkpoint and seconds: medians"
    return Table(header, tuple(rows), caption)


def setting_table(base: Base) -> Table:
    """A row for every optimiser."""
    names = ("optimizer", "rates", "batch_sizes", "weight_decays", "seeds", "runs")
    rows = [
        tuple(show(r[name]) for name in (*names, "lost")) for r in ask(base, SETTINGS)
    ]
    header = (
        "optimiser", "learning rates", "batch sizes", "weight decays", "seeds", "runs",
        "not finite",
    )  # fmt: skip
    return Table(header, tuple(rows), "Hyper-parameters, and runs over all cells")


def eigenvalues(base: Base, out: Path) -> Section:
    """Trajectories of the ten largest eigenvalues."""
    growth = ask(base, GROWTH, matrices=list(MATRICES))
    said = "No run has two checkpoints, so that nothing can be said about training."
    if growth:
        parts = [
            f"that of the {MATRIX_TITLES[r['matrix']]} in {r['grown']} of "
            f"{plural(r['runs'], 'run')} (median factor {number(r['factor'])})"
            for r in growth
        ]
        said = (
            "From the first to the last checkpoint the largest eigenvalue grows: "
            f"{', '.join(parts)}."
        )
    rows = ask(base, TRAJECTORIES, matrices=list(MATRICES))
    plots = []
    for name in sorted({row["dataset"] for row in rows}):
        path = out / f"eigenvalues_{name}.png"
        save_trajectories([row for row in rows if row["dataset"] == name], path)
        caption = (
            f"{name}: the ten largest eigenvalues of the full matrices, of each model "
            "the run that ends with the lowest test loss; those of 0 or less are not "
            "drawn"
        )
        plots.append(Plot(path, caption))
    return Section("Eigenvalues during training", (said, end_table(base), *plots))


def end_table(base: Base) -> Table:
    """Largest and tenth eigenvalue at the first and the last checkpoint."""
    names = ("first", "last", "ratio", "last_ratio")
    rows = [
        (
            r["dataset"],
            MATRIX_TITLES[r["matrix"]],
            *(number(r[name]) for name in names),
            str(r["runs"]),
        )
        for r in ask(base, ENDS, matrices=list(MATRICES))
    ]
    header = (
        "data set", "matrix", "λ₁, first", "λ₁, last", "λ₁₀ / λ₁, first",
        "λ₁₀ / λ₁, last", "runs",
    )  # fmt: skip
    caption = (
        "Largest eigenvalue of the full matrix (in units of the loss over those of the "
        "parameters squared) and the tenth over it, at the first and the last "
        "checkpoint: medians over runs of all models"
    )
    return Table(header, tuple(rows), caption)


def columns() -> Section:
    """What the columns of the table mean."""
    rows = [(c.name, c.kind, c.meaning) for c in (*RUN_COLUMNS, *ROW_COLUMNS)]
    rows += [
        ("fingerprint", "VARCHAR", "digest of the configuration"),
        ("config", "STRUCT", "configuration of the run"),
        ("machine", "STRUCT", "device, versions, commit and date of the run"),
    ]
    said = (
        "A row of survey.parquet is one matrix, in one approximation, at one "
        "checkpoint of one run; numbers that were not finite are null."
    )
    return Section("Columns", (said, Table(("column", "type", "meaning"), tuple(rows))))
