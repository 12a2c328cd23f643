"""The page of the damping study: tables in Markdown, plots, a summary in JSON."""

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
    FIXED,
    JUDGED,
    SGD,
    DampingReport,
)
from experiments.studies.damping.run import EDGES, WORST, final

TITLES = {
    SGD: "SGD",
    ADAPTIVE: "adaptive damping",
    JUDGED: "Levenberg-Marquardt",
}
Record = dict[str, Any]


def read_cells(folder: Path) -> dict[str, list[Record]]:
    """Finished runs by cell, the fixed dampings in order.

    Args:
        folder: of the results.

    Returns:
        Records by the name of their cell.

    Raises:
        MetricsError: if there are none.
    """
    found = {path.stem: metrics.read_records(path) for path in folder.glob("*.jsonl")}
    if not found:
        raise MetricsError(f"{folder} holds no results of the damping study.")

    def order(name):
        fixed = name.startswith(f"{FIXED}_")
        return (fixed, float(name.split("_")[1])) if fixed else (False, 0.0)

    return {name: found[name] for name in sorted(found, key=order)}


def title(name: str) -> str:
    """What a cell is called in tables and legends."""
    return TITLES.get(name, f"λ = {name.removeprefix(f'{FIXED}_')}")


def best_third(records: list[Record]) -> list[Record]:
    """The third of the trials with the lowest training loss, as in the paper."""
    trials = sorted((r for r in records if r["kind"] == "trial"), key=final)
    return trials[: max(1, len(trials) // 3)]


def summary(cells: dict[str, list[Record]]) -> dict[str, Any]:
    """Numbers of the table, by cell."""
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


def table(rows: dict[str, Any]) -> list[str]:
    """Lines of the Markdown table."""
    lines = [
        "| damping | trials | mean of the best third | best | median | not finite | "
        "learning rate, share left, momentum of the best |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        v = row["values"]
        lines.append(
            f"| {title(name)} | {row['trials']} | {row['best_third']:.4f} | "
            f"{row['best']:.4f} | {row['median']:.4f} | {row['diverged']:.0%} | "
            f"{v['rate']:.3g}, {v['end']:.2f}, {v['momentum']:.2f} |"
        )
    return lines


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
    """Prints the table and writes page, plots and summary.

    Args:
        config: what to report.
        console: where to print.
    """
    out = config.out or config.folder
    out.mkdir(parents=True, exist_ok=True)
    cells = read_cells(config.folder)
    rows = summary(cells)
    seen = [r["seen"][-1] for r in winners(cells).values()]
    plots = {
        "curves": (plot_curves, bool(rows)),
        "sensitivity": (plot_sensitivity, bool(rows) or "sensitivity" in cells),
        "squares": (plot_squares, bool(seen)),
        "eigenvalues": (plot_eigenvalues, any(s["eigenvalues"] for s in seen)),
    }
    plots = {name: draw for name, (draw, wanted) in plots.items() if wanted}
    for name, draw in plots.items():
        draw(cells, out / f"{name}.png")
    first = next(records[0] for records in cells.values() if records)
    facts = {"config": first["config"], "machine": first["machine"], "cells": rows}
    (out / "summary.json").write_text(json.dumps(metrics.to_json(facts), indent=1))
    lines = ["# Damping study", "", *table(rows), ""]
    lines += [f"![{name}]({name}.png)\n" for name in plots]
    (out / "page.md").write_text("\n".join(lines))
    console.print("\n".join(table(rows)), markup=False, highlight=False)
    console.print(f"Page: {out / 'page.md'}", soft_wrap=True, highlight=False)
