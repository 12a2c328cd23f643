"""Tables and plot of the runs on other networks: default against adaptive damping."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.studies.damping.config import ADAPTIVE, DEFAULT
from experiments.studies.damping.tasks import CELL, SEARCH_SEED, best_rate
from experiments.studies.pages import Table
from experiments.studies.records import query

# The seeds of the winners: of each method the rate with the lowest loss in the search.
CHOSEN = f"""
    WITH best AS (
        SELECT task, method, arg_min(values.rate, loss[-1]) AS rate
        FROM runs WHERE cell = '{CELL}' AND seed = {SEARCH_SEED} GROUP BY ALL
    ), chosen AS (
        SELECT runs.*, rate FROM runs JOIN best USING (task, method)
        WHERE cell = '{CELL}' AND seed != {SEARCH_SEED} AND values.rate = rate
    )
"""
# Null where a loss was not a number.
WINNERS = f"""
    {CHOSEN} SELECT task, method, rate, count(*) AS seeds,
        avg(train_loss[-1]) AS train, min(loss[-1]) AS low, max(loss[-1]) AS high,
        avg(loss[-1]) AS held, sum(CAST(loss[-1] IS NULL AS INTEGER)) AS failed
    FROM chosen GROUP BY ALL ORDER BY task, method DESC
"""
PAIRS = f"""
    {CHOSEN} SELECT task, count(*) AS seeds,
        sum(CAST(a.loss[-1] < d.loss[-1] AS INTEGER)) AS wins,
        avg(a.loss[-1] / d.loss[-1]) AS ratio,
        avg(a.train_loss[-1] / d.train_loss[-1]) AS train_ratio
    FROM chosen AS d JOIN chosen AS a USING (task, seed)
    WHERE d.method = '{DEFAULT}' AND a.method = '{ADAPTIVE}'
    GROUP BY ALL ORDER BY task
"""
SEARCHED = f"FROM runs WHERE cell = '{CELL}' AND seed = {SEARCH_SEED}"
Record = dict[str, Any]


def number(value: float | None) -> str:
    """A loss for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.4g}"


def tasks_tables(folder: Path) -> tuple[Table, ...]:
    """Winners, their ratios by seed, and the learning rates that were tried."""
    winners = Table(
        ("task", "damping", "rate", "seeds", "held-out loss", "range", "training loss",
         "not finite"),
        tuple(
            (
                r["task"], r["method"], f"{r['rate']:g}", str(r["seeds"]),
                number(r["held"]), f"{number(r['low'])} – {number(r['high'])}",
                number(r["train"]), str(r["failed"]),
            )
            for r in query(folder, WINNERS)
        ),
        "Losses at the end at the best learning rate of each",
    )  # fmt: skip
    pairs = Table(
        ("task", "seeds", "adaptive lower in", "held-out loss, adaptive / default",
         "training loss, adaptive / default"),
        tuple(
            (r["task"], str(r["seeds"]), str(r["wins"]), number(r["ratio"]),
             number(r["train_ratio"]))
            for r in query(folder, PAIRS)
        ),
        "The same, seed by seed: in how many the held-out loss is lower, mean ratios",
    )  # fmt: skip
    return winners, pairs, searched(query(folder, SEARCHED))


def searched(records: list[Record]) -> Table:
    """Held-out losses at the end by learning rate."""
    rates = sorted({r["values"]["rate"] for r in records})
    names = sorted({(r["task"], r["method"]) for r in records}, reverse=True)
    rows = []
    for name in sorted(names, key=lambda pair: pair[0]):
        found = {
            r["values"]["rate"]: r["loss"][-1]
            for r in records
            if (r["task"], r["method"]) == name
        }
        rows.append((*name, *(number(found.get(rate)) for rate in rates)))
    header = ("task", "damping", *(f"rate {rate:g}" for rate in rates))
    return Table(header, tuple(rows), "Held-out loss at the end of the search's runs")


def plot_tasks(cells: dict[str, list[Record]], path: Path) -> None:
    """Held-out loss and damping of the winners' runs, a column per task."""
    records = cells[CELL]
    names = sorted({r["task"] for r in records})
    size = {"figsize": (3.2 * len(names), 5), "layout": "constrained"}
    figure, grid = plt.subplots(2, len(names), sharex="col", squeeze=False, **size)
    for column, task in enumerate(names):
        known = {r["method"] for r in records if r["task"] == task}
        for method, style in ((DEFAULT, "--"), (ADAPTIVE, "-")):
            if method not in known:
                continue
            rate = best_rate(records, task, method)
            runs = [
                r
                for r in records
                if (r["task"], r["method"], r["values"]["rate"]) == (task, method, rate)
            ]
            for i, run in enumerate(runs):
                label = f"{method}, rate {rate:g}" if i == 0 else None
                look: dict[str, Any] = {"ls": style, "alpha": 0.8, "label": label}
                look["color"] = "C0" if method == ADAPTIVE else "C1"
                losses = np.array(run["loss"], float)
                grid[0][column].plot(run["steps"], losses, **look)
                grid[1][column].plot(run["steps"], run["damping"], **look)
        grid[0][column].set(title=task, yscale="log")
        grid[1][column].set(xlabel="step", yscale="log")
        grid[0][column].legend(fontsize=7)
    grid[0][0].set_ylabel("held-out loss")
    grid[1][0].set_ylabel("damping")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def wins(folder: Path) -> dict[str, Any]:
    """Numbers of the second table by task, for the summary."""
    return {r.pop("task"): r for r in query(folder, PAIRS)}


def has_seeds(records: list[Record]) -> bool:
    """Whether some winner was run."""
    return any(r["seed"] != SEARCH_SEED for r in records)
