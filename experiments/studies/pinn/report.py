"""The page of the PINN study: HTML, Markdown, a plot, runs as Parquet."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from experiments.studies.pages import Plot, Section, Table, markdown_part, publish
from experiments.studies.pinn.config import ADAM, DUAL, KFAC, LBFGS, PinnReport
from experiments.studies.records import query

TITLES = {
    ADAM: ("Adam", "learning rate"),
    LBFGS: ("L-BFGS", "pairs"),
    KFAC: ("K-FAC, line search", "damping"),
    DUAL: ("natural gradient (dual), line search", "damping"),
}
GOALS = (1e-2, 1e-3, 1e-4, 1e-5)
EXPLAINED = (
    "Relative L2 error of u against the known solution on a grid of 50 × 50 points. "
    "Every method has one hyper-parameter; its values are tried on a seed of their own "
    "and the best is run with the others. Seconds are processor time of training "
    "alone: waiting for a busy machine, compiling and evaluations are not in them. A "
    "time to an error is the median of the seeds, a dash where less than half of them "
    "reach it."
)
Record = dict[str, Any]


def read_runs(folder: Path) -> dict[str, list[Record]]:
    """The finished runs by method, without the trials."""
    found: dict[str, list[Record]] = {name: [] for name in TITLES}
    for record in query(folder, "FROM runs WHERE kind = 'run' ORDER BY cell, seed"):
        found[record["cell"]].append(record)
    return {name: records for name, records in found.items() if records}


def seconds_to(record: Record, goal: float) -> float:
    """Processor seconds until the error is at a goal; infinite if it never is."""
    pairs = zip(record["seconds"], record["errors"], strict=True)
    reached = (s for s, e in pairs if e is not None and e <= goal)
    return next(reached, np.inf)


def table(runs: dict[str, list[Record]]) -> Table:
    header = ("method", "best setting", "seeds", "error at the end, median", "range")
    header += ("steps, median", *(f"seconds to {goal:.0e}" for goal in GOALS))
    rows = []
    for name, records in runs.items():
        title, parameter = TITLES[name]
        ends = [np.inf if r["errors"][-1] is None else r["errors"][-1] for r in records]
        steps = np.median([r["steps"][-1] for r in records])
        times = [np.median([seconds_to(r, goal) for r in records]) for goal in GOALS]
        rows.append(
            (
                title,
                f"{parameter} {records[0]['value']:g}",
                str(len(records)),
                f"{np.median(ends):.1e}",
                f"{min(ends):.1e} to {max(ends):.1e}",
                f"{steps:.0f}",
                *("–" if np.isinf(t) else f"{t:.2f}" for t in times),
            )
        )
    return Table(header, tuple(rows))


def trials(folder: Path) -> Table:
    sql = """
        SELECT cell, value, errors[-1] AS error, steps[-1] AS steps FROM runs
        WHERE kind = 'trial' ORDER BY cell, value
    """
    rows = [
        (
            TITLES[r["cell"]][0],
            f"{TITLES[r['cell']][1]} {r['value']:g}",
            "not finite" if r["error"] is None else f"{r['error']:.1e}",
            str(r["steps"]),
        )
        for r in query(folder, sql)
    ]
    return Table(("method", "setting", "error at the end", "steps"), tuple(rows))


def plot(runs: dict[str, list[Record]], path: Path) -> None:
    """Errors against processor seconds and steps: every seed a line."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 4), sharey=True, layout="constrained"
    )
    labels = {"seconds": "processor seconds", "steps": "steps"}
    for axis, (field, label) in zip(axes, labels.items(), strict=True):
        for number, (name, records) in enumerate(runs.items()):
            for i, record in enumerate(records):
                errors = [np.nan if e is None else e for e in record["errors"]]
                title = TITLES[name][0] if i == 0 else None
                axis.plot(
                    record[field], errors, color=f"C{number}", lw=1.2, label=title
                )
        axis.set(xlabel=label, yscale="log")
        axis.grid(True, alpha=0.3)
    axes[1].set_xscale("symlog", linthresh=10)
    axes[0].set_ylabel("relative L2 error")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_report(config: PinnReport, console: Console) -> None:
    """Prints the table and writes page and plot."""
    out = config.out or config.folder
    out.mkdir(parents=True, exist_ok=True)
    runs = read_runs(config.folder)
    plot(runs, out / "errors.png")
    shown = table(runs)
    picture = Plot(out / "errors.png", "Relative error of every seed")
    sections = (
        Section("Result", (EXPLAINED, shown, picture)),
        Section("Settings that were tried", (trials(config.folder),)),
    )
    shared = next(records[0]["config"] for records in runs.values())
    console.print(markdown_part(shown), markup=False, highlight=False)
    publish("PINN study", sections, shared, config.folder, out, console)
