"""The page of the survey: HTML, Markdown, plots, and its table as Parquet.

    python -m experiments.main survey report --folder <folder>

Everything is made from the records of the finished runs; nothing is measured.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.pyplot import get_cmap
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from rich.console import Console

from experiments.errors import MetricsError
from experiments.studies.pages import (
    NOTHING,
    Page,
    Part,
    Plot,
    Section,
    Table,
    markdown_part,
    save_page,
    show,
)
from experiments.studies.records import ask, commits, machines
from experiments.survey import gap
from experiments.survey.config import (
    APPROXIMATION_TITLES,
    APPROXIMATIONS,
    MATRICES,
    MATRIX_TITLES,
    ROW_COLUMNS,
    RUN_COLUMNS,
    TOP,
    SurveyReport,
)
from experiments.survey.gap import COLOURS, MARKS, Records, plural, write
from experiments.survey.queries import PARQUET, open_survey, save_survey, source_of

Row = dict[str, Any]
SHORT = ("H", "F", "MC", "C")


def save_trajectories(rows: Sequence[Row], path: Path) -> None:
    """Eigenvalues against steps: a row for every matrix, a column for every model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    params = {row["model"]: row["num_params"] for row in rows}
    size = (1.2 + 2.1 * len(models), 7)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        len(MATRICES), len(models), sharex="col", sharey="row", squeeze=False
    )
    norm = BoundaryNorm(np.arange(TOP + 1) + 0.5, 256)
    colours = get_cmap("viridis_r")
    for i, matrix in enumerate(MATRICES):
        for j, model in enumerate(models):
            here = [r for r in rows if (r["matrix"], r["model"]) == (matrix, model)]
            steps = [row["step"] for row in here]
            for rank in range(TOP):
                values = [logarithm(row["eigenvalues"], rank) for row in here]
                colour = colours(norm(rank + 1))
                grid[i, j].plot(steps, values, ".-", ms=3, lw=1, color=colour)
            grid[i, j].grid(alpha=0.3)
            grid[i, j].tick_params(labelsize=7)
        grid[i, 0].set_ylabel(f"{MATRIX_TITLES[matrix]}, log₁₀ λ", fontsize=8)
        grid[i, 0].yaxis.set_major_locator(MaxNLocator(4))
    for j, model in enumerate(models):
        grid[0, j].set_title(f"{model}, P = {params[model]:,}", fontsize=8)
        grid[-1, j].set_xlabel("step", fontsize=8)
    shades = ScalarMappable(norm, colours)
    bar = figure.colorbar(shades, ax=grid, label="rank of the eigenvalue", aspect=40)
    bar.set_ticks(list(range(1, TOP + 1)))
    write(figure, path)


def logarithm(values: Sequence[float | None] | None, rank: int) -> float:
    """``log₁₀ λ`` of an eigenvalue above 0; otherwise NaN."""
    value = values[rank] if values and rank < len(values) else None
    return np.log10(value) if value is not None and value > 0 else np.nan


def save_agreement(panels: Mapping[str, np.ndarray], columns: int, path: Path) -> None:
    """Heat maps of matrices against matrices.

    Args:
        panels: ``[4, 4]`` by title.
        columns: in a row.
        path: the PNG file.
    """
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1 + 2.1 * columns, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, square) in zip(grid.flat, panels.items(), strict=False):
        image = axes.imshow(square, vmin=-0.2, vmax=1, cmap="cividis")
        axes.set_title(title, fontsize=8)
        axes.set_xticks(range(len(SHORT)), SHORT, fontsize=8)
        axes.set_yticks(range(len(SHORT)), SHORT, fontsize=8)
        for (i, j), value in np.ndenumerate(square):
            if np.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                place = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(j, i, f"{value:.2f}", color=colour, **place)
    if image is not None:
        figure.colorbar(image, ax=grid, shrink=0.8)
    names = zip(SHORT, MATRIX_TITLES.values(), strict=True)
    figure.supxlabel(", ".join(f"{a}: {b}" for a, b in names), fontsize=8)
    write(figure, path)


def save_errors(rows: Sequence[Row], path: Path) -> None:
    """Errors of the approximations against checkpoints."""
    fields = {
        "error": "relative error, Frobenius",
        "cosine": "cosine",
        "overlap": "top-ten overlap",
    }
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    grid = figure.subplots(len(fields), len(MATRICES), sharex=True, sharey="row")
    for i, (field, label) in enumerate(fields.items()):
        for j, matrix in enumerate(MATRICES):
            for k, name in enumerate(APPROXIMATIONS[1:]):
                here = [
                    row
                    for row in rows
                    if (row["matrix"], row["approximation"]) == (matrix, name)
                    and row[field] is not None
                ]
                if here:
                    draw_band(grid[i, j], here, field, k)
            grid[i, j].grid(alpha=0.3)
        grid[i, 0].set_ylabel(label, fontsize=9)
    grid[0, 0].set_yscale("log")
    grid[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    grid[0, 0].yaxis.set_major_formatter("{x:g}")
    grid[0, 0].yaxis.set_minor_locator(NullLocator())
    for j, matrix in enumerate(MATRICES):
        grid[0, j].set_title(MATRIX_TITLES[matrix], fontsize=9)
    steps = {row["checkpoint"]: f"{row['step']:g}" for row in rows}
    for axes in grid[-1]:
        axes.set_xticks(sorted(steps), [steps[c] for c in sorted(steps)])
        axes.set_xlabel("step of the checkpoint (median)", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    write(figure, path)


def draw_band(axes: Any, rows: Sequence[Row], field: str, number: int) -> None:
    """A line of medians between the quartiles."""
    ordered = sorted(rows, key=lambda row: row["checkpoint"])
    low, middle, high = np.array([row[field] for row in ordered], np.float64).T
    x, colour = [row["checkpoint"] for row in ordered], COLOURS[number]
    label = APPROXIMATION_TITLES[ordered[0]["approximation"]]
    axes.plot(x, middle, MARKS[number] + "-", ms=4, color=colour, label=label)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


Base = duckdb.DuckDBPyConnection
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


def what_was_run(base: Base) -> Section:
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


CONFIG = "SELECT config FROM survey LIMIT 1"


def save_report(config: SurveyReport, console: Console) -> None:
    """Prints the answer and writes page and plots, and the table if it was not one."""
    out = config.out or config.folder
    source = source_of(config.folder)
    with open_survey(config.folder) as base:
        shared = ask(base, CONFIG)
        if not shared:
            raise MetricsError(f"{source} holds no finished run.")
        out.mkdir(parents=True, exist_ok=True)
        records = Records(base)
        parts = (
            what_was_run(base),
            eigenvalues(base, out),
            agreement(base, out),
            errors(base, out),
            gap.at_the_end(records, out),
            gap.stand_ins(records),
            gap.early(records),
            columns(),
        )
    paths = []
    if source == config.folder:
        paths.append(out / PARQUET)
        save_survey(config.folder, out / PARQUET)
    made_with = machines(source), commits(source)
    page = Page("Survey", parts, shared[0]["config"], *made_with)
    for section in parts[:-1]:
        tell(section, console)
    for path in (*save_page(page, out), *paths):
        console.print(f"Written: {path}", soft_wrap=True, highlight=False)


def tell(section: Section, console: Console) -> None:
    """Prints what a section says first; of the answer on the gap its table, too."""
    console.print(section.title, style="bold", markup=False, highlight=False)
    console.print(section.parts[0], markup=False, highlight=False)
    if section.title == gap.TITLE:
        for part in section.parts:
            if isinstance(part, Table):
                text = markdown_part(part)
                console.print(text, markup=False, highlight=False, soft_wrap=True)
