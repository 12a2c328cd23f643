"""The page of the damping study: HTML, Markdown, plots, a summary, runs as Parquet."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from experiments import metrics
from experiments.errors import MetricsError
from experiments.studies.damping.config import (
    ADAPTIVE,
    DEFAULT,
    FIXED,
    JUDGED,
    SGD,
    DampingReport,
)
from experiments.studies.damping.run import EDGES, WORST, final
from experiments.studies.damping.tasks import CELL, SEARCH_SEED, best_rate
from experiments.studies.damping.tasks import CELL as TASKS
from experiments.studies.pages import Plot, Section, Table, markdown_part, publish
from experiments.studies.records import query, without_nulls

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
    return any(r["seed"] != SEARCH_SEED for r in records)


TITLES = {
    SGD: "SGD",
    ADAPTIVE: "adaptive damping",
    JUDGED: "Levenberg-Marquardt",
}
CAPTIONS = {
    "curves": "Training loss: mean of the best third of the trials, with its range",
    "sensitivity": "Final training loss against damping",
    "squares": "Squared gradients of the best trials, by layer and iteration",
    "eigenvalues": "Smallest eigenvalue of every factor after the best trials",
    "tasks": "Other networks: held-out loss and damping at the best learning rates",
}
EXPLAINED = (
    "Each cell has its own search over learning rate, the share of it left at the end "
    "and momentum. Losses are those of training images after the last step; "
    f"{WORST:g} stands for everything above and for what is not finite."
)
OTHERS = (
    "kfac.kfac with its defaults, factors and inverses every five steps, the learning "
    "rate falling linearly to 0; adaptive stands for damping=kfac.damping.adaptive(), "
    "and nothing else differs."
)
UNTUNED_LOSSES = """
    SELECT method, values.damping AS damping, count(*) AS seeds, avg(ended) AS mean,
        min(ended) AS low, max(ended) AS high
    FROM (SELECT *, least(coalesce(curve[-1], $worst), $worst) AS ended FROM runs)
    WHERE cell = 'sensitivity' GROUP BY ALL ORDER BY damping, method
"""


def read_cells(folder: Path) -> dict[str, list[Record]]:
    """Finished runs by cell, those without a fixed damping first, then by damping."""
    if not any(path.stat().st_size for path in folder.glob("*.jsonl")):
        raise MetricsError(f"{folder} holds no results of the damping study.")
    found: dict[str, list[Record]] = {}
    for record in query(folder, "FROM runs"):
        # Cells have other hyper-parameters, and SGD has no factors.
        nested = {name: without_nulls(record.get(name)) for name in ("values", "seen")}
        found.setdefault(record["cell"], []).append(record | nested)

    first = [SGD, JUDGED, ADAPTIVE]

    def order(name):
        if name.startswith(f"{FIXED}_"):
            return len(first), float(name.removeprefix(f"{FIXED}_"))
        return (first.index(name) if name in first else len(first) + 1), 0.0

    return {name: found[name] for name in sorted(found, key=order)}


def title(name: str) -> str:
    """What a cell is called in tables and legends."""
    return TITLES.get(name, f"λ = {name.removeprefix(f'{FIXED}_')}")


def best_third(records: list[Record]) -> list[Record]:
    """The third of the trials with the lowest training loss, as in the paper."""
    trials = sorted((r for r in records if r["kind"] == "trial"), key=final)
    return trials[: max(1, len(trials) // 3)]


def summary(cells: dict[str, list[Record]]) -> dict[str, Any]:
    rows = {}
    for name, records in cells.items():
        trials = [r for r in records if r["kind"] == "trial"]
        if not trials:
            continue
        losses = np.array([final(r) for r in trials])
        best = trials[int(np.argmin(losses))]
        rows[name] = {
            "trials": len(trials),
            "best": losses.min(),
            "best_third": float(np.mean([final(r) for r in best_third(trials)])),
            "median": float(np.median(losses)),
            "diverged": float(np.mean(losses >= WORST)),
            "values": best["values"],
        }
    return rows


def table(rows: dict[str, Any]) -> Table:
    """The table: a row for every cell."""
    header = (
        "damping", "trials", "mean of the best third", "best", "median", "not finite",
        "learning rate, share left, momentum of the best",
    )  # fmt: skip
    cells = []
    for name, row in rows.items():
        v = row["values"]
        losses = (f"{row[which]:.4f}" for which in ("best_third", "best", "median"))
        best = f"{v['rate']:.3g}, {v['end']:.2f}, {v['momentum']:.2f}"
        counts = title(name), str(row["trials"])
        cells.append((*counts, *losses, f"{row['diverged']:.0%}", best))
    return Table(header, tuple(cells))


def untuned(folder: Path) -> Table:
    """The runs with settings that nobody tuned, by damping."""
    found = query(folder, UNTUNED_LOSSES, worst=WORST)
    rows = [
        (
            f"{row['damping']:.0e}",
            row["method"],
            str(row["seeds"]),
            *(f"{row[which]:.4f}" for which in ("mean", "low", "high")),
        )
        for row in found
    ]
    header = (
        "damping, or its first value",
        "method",
        "seeds",
        "mean",
        "lowest",
        "highest",
    )
    return Table(header, tuple(rows), "Final training loss of untuned runs")


def curve_of(record: Record, length: int) -> np.ndarray:
    """A curve filled up with the worst loss after its end."""
    values = [WORST if x is None else min(x, WORST) for x in record["curve"]]
    return np.array(values + [WORST] * (length - len(values)))


def plot_curves(cells: dict[str, list[Record]], path: Path) -> None:
    """Learning curves: mean of the best third of the trials, with its range."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = plt.get_cmap("viridis")
    fixed = [n for n in cells if n.startswith(FIXED)]
    for name, records in cells.items():
        best = best_third(records)
        if not best or best[0]["kind"] != "trial":
            continue
        config = best[0]["config"]
        steps = np.arange(0, config["steps"] + 1, config["eval_every"])
        curves = np.stack([curve_of(r, len(steps)) for r in best])
        look: dict[str, Any] = {"lw": 2.5, "ls": "-" if name == ADAPTIVE else "--"}
        if name in fixed:
            look = {"color": colours(fixed.index(name) / max(1, len(fixed) - 1))}
        (line,) = axes.plot(steps, curves.mean(0), label=title(name), **look)
        low, high = curves.min(0), curves.max(0)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12)
    axes.set(xlabel="iteration", ylabel="training loss", yscale="log", ylim=(None, 4))
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_sensitivity(cells: dict[str, list[Record]], path: Path) -> None:
    """Final losses against damping: tuned, and untuned where it is only the first."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    rows = summary(cells)
    fixed = {float(n.split("_")[1]): r for n, r in rows.items() if n.startswith(FIXED)}
    if fixed:
        losses = [row["best_third"] for row in fixed.values()]
        axes.plot(list(fixed), losses, "o-", label="fixed, tuned (best third)")
    for name in (ADAPTIVE, JUDGED, SGD):
        if name in rows:
            style = {ADAPTIVE: "-", JUDGED: "--", SGD: ":"}[name]
            label = f"{title(name)}, tuned (best third)"
            axes.axhline(rows[name]["best_third"], color="k", ls=style, label=label)
    for method, label in ((FIXED, "fixed, untuned"), (ADAPTIVE, "adaptive, untuned")):
        runs = [r for r in cells.get("sensitivity", []) if r["method"] == method]
        by_damping: dict[float, list[float]] = {}
        for run in runs:
            by_damping.setdefault(run["values"]["damping"], []).append(final(run))
        if by_damping:
            points = sorted(by_damping.items())
            means = [np.mean(losses) for _, losses in points]
            spread = [
                [m - min(losses) for m, (_, losses) in zip(means, points, strict=True)],
                [max(losses) - m for m, (_, losses) in zip(means, points, strict=True)],
            ]
            axes.errorbar([d for d, _ in points], means, spread, fmt="s--", label=label)
    axes.set(
        xlabel="damping, or its first value", ylabel="final training loss",
        xscale="log", yscale="log",
    )  # fmt: skip
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def winners(cells: dict[str, list[Record]]) -> dict[str, Record]:
    """The winner's run of every cell that has one."""
    found = {n: [r for r in rs if r["kind"] == "winner"] for n, rs in cells.items()}
    return {name: records[0] for name, records in found.items() if records}


def plot_squares(cells: dict[str, list[Record]], path: Path) -> None:
    """Histograms of squared gradients: a row per layer, a column per evaluation."""
    chosen = winners(cells)
    layers = max(len(r["seen"][0]["squares"]) for r in chosen.values())
    times = max(len(r["seen"]) for r in chosen.values())
    size = {"figsize": (2 * times, 1.4 * layers), "layout": "constrained"}
    figure, grid = plt.subplots(
        layers, times, sharex=True, sharey=True, squeeze=False, **size
    )
    for name, record in chosen.items():
        for t, seen in enumerate(record["seen"]):
            for i, counts in enumerate(seen["squares"]):
                shares = np.array(counts) / np.sum(counts)
                grid[i][t].stairs(shares, EDGES, label=title(name))
    every = next(iter(chosen.values()))["config"]["eval_every"]
    for t in range(times):
        grid[0][t].set_title(f"iteration {(t + 1) * every}", fontsize=8)
    for i in range(layers):
        grid[i][0].set_ylabel(f"layer {i + 1}", fontsize=8)
    grid[-1][times // 2].set_xlabel("log10 of the squared gradient")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=6, loc="outside upper center")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_eigenvalues(cells: dict[str, list[Record]], path: Path) -> None:
    """Smallest eigenvalue of every factor at the end of the winners' runs."""
    chosen = {n: r for n, r in winners(cells).items() if r["seen"][-1]["eigenvalues"]}
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, record in chosen.items():
        last = record["seen"][-1]["eigenvalues"]
        # Rounding makes zeros negative: they are drawn at the lower end.
        smallest = [max(pair[0], 1e-12) for pair in last.values()]
        axes.plot(list(last), smallest, "o", ms=4, label=title(name))
    axes.set(ylabel="smallest eigenvalue of the factor", yscale="log")
    axes.tick_params(axis="x", rotation=90)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_report(config: DampingReport, console: Console) -> None:
    """Prints the table and writes page, plots and summary."""
    out = config.out or config.folder
    out.mkdir(parents=True, exist_ok=True)
    cells = read_cells(config.folder)
    rows = summary(cells)
    seen = [r["seen"][-1] for r in winners(cells).values()]
    others = has_seeds(cells.get(TASKS, []))
    plots = {
        "curves": (plot_curves, bool(rows)),
        "sensitivity": (plot_sensitivity, bool(rows) or "sensitivity" in cells),
        "squares": (plot_squares, bool(seen)),
        "eigenvalues": (plot_eigenvalues, any(s["eigenvalues"] for s in seen)),
        "tasks": (plot_tasks, others),
    }
    plots = {name: draw for name, (draw, wanted) in plots.items() if wanted}
    for name, draw in plots.items():
        draw(cells, out / f"{name}.png")
    first = next(records[0] for records in cells.values() if records)
    facts = {"config": first["config"], "machine": first["machine"], "cells": rows}
    if others:
        facts["tasks"] = wins(config.folder)
    (out / "summary.json").write_text(json.dumps(metrics.to_json(facts), indent=1))
    tuned = table(rows)
    pictures = {name: Plot(out / f"{name}.png", CAPTIONS[name]) for name in plots}
    shown = [plot for name, plot in pictures.items() if name != TASKS]
    sections = [Section("Result", (EXPLAINED, tuned, *shown))]
    if "sensitivity" in cells:
        sections.append(Section("Untuned runs", (untuned(config.folder),)))
    if others:
        parts = (OTHERS, *tasks_tables(config.folder), pictures[TASKS])
        sections.append(Section("Other networks", parts))
    console.print(markdown_part(tuned), markup=False, highlight=False)
    record = first["config"], config.folder, out, console
    publish("Damping study", sections, *record)
