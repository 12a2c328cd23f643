"""Table, summary, plots and page of the interval study, from its JSON lines alone."""

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.console import Console

from experiments.benchmarks.common import cell as cell_text
from experiments.benchmarks.common import text_table, write_json
from experiments.errors import MetricsError
from experiments.studies.intervals.config import EVERY, RULES, IntervalReport
from experiments.studies.pages import Page, Plot, Section, Table, save_page, show
from experiments.studies.records import commits, machines, query, save_parquet

EVALUATIONS = """
    SELECT rule, threshold, evaluation.step AS step,
        100 * avg(evaluation.accuracy) AS accuracy
    FROM (SELECT cell.rule, cell.threshold, unnest(evaluations) AS evaluation FROM runs)
    GROUP BY rule, threshold, step
    ORDER BY list_position($rules, rule), threshold, step
"""


def accuracies(file: Path) -> Table:
    """The test accuracy during training, a mean over the seeds."""
    found: dict[tuple, dict[int, float]] = {}
    for row in query(file, EVALUATIONS, rules=[EVERY, *RULES]):
        of_cell = found.setdefault((row["rule"], row["threshold"]), {})
        of_cell[row["step"]] = row["accuracy"]
    steps = sorted({step for of_cell in found.values() for step in of_cell})
    rows = [
        (rule, show(threshold), *(f"{x[s]:.2f}" if s in x else "–" for s in steps))
        for (rule, threshold), x in found.items()
    ]
    header = ("rule", "λ", *(f"step {step}" for step in steps))
    caption = "Test accuracy in %, means over the seeds"
    return Table(header, tuple(rows), caption)


def save_interval_page(
    file: Path, facts: dict[str, Any], table: Table, plots: Sequence[Plot], folder: Path
) -> list[Path]:
    """Writes the page of an interval study and its runs as Parquet."""
    config = facts["config"]
    setting = (
        f"Factor traffic and accuracy of refresh intervals per layer: "
        f"{facts['data']['title']}, {config['model']}, batch {config['batch_size']}, "
        f"{config['steps']} steps. Traffic is what the all-reduces of the statistics "
        "work on, as a share of the same with every layer refreshed at every step."
    )
    sections = (
        Section("Result", (setting, table, *plots)),
        Section("During training", (accuracies(file),)),
    )
    parquet = folder / f"{file.stem}.parquet"
    save_parquet(file, parquet)
    page = Page("Interval study", sections, config, machines(file), commits(file))
    return [*save_page(page, folder, file.stem), parquet]


Line = dict[str, Any]
# Told apart by colour-blind readers.
COLOURS = {
    EVERY: "#000000",
    "multiple": "#d55e00",
    "elapsed": "#0072b2",
    "staleness": "#009e73",
}
# Records over which refreshes are counted in the heat maps.
SPAN = 5
MARKERS = ("o", "s", "^", "D", "v", "P")
HEADER = (
    "rule", "λ", "seeds", "accuracy %", "range", "paired", "in spread",
    "train loss", "traffic %", "range", "2nd half %", "unlike", "MB", "seconds",
)  # fmt: skip


def read_lines(path: Path) -> list[Line]:
    """Reads the finished cells of a study."""
    written = path.is_file() and path.stat().st_size
    lines = query(path, "FROM runs") if written else []
    if not lines:
        raise MetricsError(f"{path} holds no finished cell of an interval study.")
    prints = sorted({line["fingerprint"] for line in lines})
    if len(prints) > 1:
        raise MetricsError(f"{path} mixes configurations: {', '.join(prints)}.")
    if all(line["cell"]["rule"] != EVERY for line in lines):
        raise MetricsError(f"{path} has no run of the rule {EVERY!r} to compare with.")
    return lines


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Means over the seeds, for every rule and threshold.

    ``within_spread`` says whether the mean accuracy is not below the lowest accuracy of
    the every-step runs; ``paired`` is the mean difference to the every-step run of the
    same seed.
    """
    baseline = {
        line["cell"]["seed"]: line["accuracy"]
        for line in lines
        if line["cell"]["rule"] == EVERY
    }
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        key = line["cell"]["rule"], line["cell"]["threshold"]
        groups.setdefault(key, []).append(line)
    return [
        {"rule": rule, "threshold": threshold, **means(group, baseline)}
        for (rule, threshold), group in sorted(groups.items(), key=order_of_group)
    ]


def means(group: Sequence[Line], baseline: dict[int, float]) -> dict[str, Any]:
    """Means over the seeds of one rule and threshold."""

    def mean(of: Callable[[Line], float]) -> float:
        return statistics.mean(map(of, group))

    accuracies = [line["accuracy"] for line in group]
    ratios = [line["ratio"] for line in group]
    pairs = [
        line["accuracy"] - baseline[line["cell"]["seed"]]
        for line in group
        if line["cell"]["seed"] in baseline
    ]
    counted = group[0]["cell"]["rule"] in ("multiple", "elapsed")
    return {
        "seeds": sorted(line["cell"]["seed"] for line in group),
        "accuracy": statistics.mean(accuracies),
        "accuracy_range": [min(accuracies), max(accuracies)],
        "paired": statistics.mean(pairs) if pairs else None,
        "within_spread": statistics.mean(accuracies) >= min(baseline.values()),
        "train_loss": mean(lambda line: line["train_loss"]),
        "ratio": statistics.mean(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "late_ratio": mean(late_ratio),
        "unlike": mean(unlike) if counted else None,
        "megabytes": mean(lambda line: line["bytes_reduced"] / 1e6),
        "inversions": mean(lambda line: sum(x["inversions"] for x in line["layers"])),
        "seconds": mean(lambda line: line["seconds"]),
    }


def order_of_group(item: tuple[tuple, Any]) -> tuple[int, float]:
    """Sorts rules as the paper and the README list them, then thresholds."""
    (rule, threshold), _ = item
    return (EVERY, *RULES).index(rule), threshold or 0.0


def late_ratio(line: Line) -> float:
    """Traffic over every-step traffic in the second half of a run."""
    records = line["records"]
    middle = records[len(records) // 2 - 1] if len(records) > 1 else None
    start, seen = (middle["step"], middle["bytes"]) if middle else (0, 0)
    last = records[-1]
    per_step = line["bytes_if_every_step"] / last["step"]
    return (last["bytes"] - seen) / (per_step * (last["step"] - start))


def unlike(line: Line) -> float:
    """Refreshes per layer that changed by the threshold or more, in Algorithm 1.

    The interval starts at 1 and each other refresh adds 1, except for the first, which
    has nothing to be compared with.
    """
    last = line["records"][-1]
    pairs = zip(last["refreshes"], last["interval"], strict=True)
    return statistics.mean(refreshes - interval for refreshes, interval in pairs)


def summary_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table as lines of text, of the rows of `summarise`."""
    return text_table(HEADER, table_cells(rows))


def table_cells(rows: Sequence[dict[str, Any]]) -> list[tuple]:
    """Rows of `summarise` as cells of the table."""
    return [
        (
            row["rule"],
            row["threshold"],
            len(row["seeds"]),
            f"{100 * row['accuracy']:.2f}",
            "-".join(f"{100 * x:.2f}" for x in row["accuracy_range"]),
            None if row["paired"] is None else f"{100 * row['paired']:+.2f}",
            "yes" if row["within_spread"] else "no",
            f"{row['train_loss']:.3f}",
            f"{100 * row['ratio']:.1f}",
            "-".join(f"{100 * x:.1f}" for x in row["ratio_range"]),
            f"{100 * row['late_ratio']:.1f}",
            row["unlike"],
            f"{row['megabytes']:.1f}",
            f"{row['seconds']:.0f}",
        )
        for row in rows
    ]


def depth(name: str) -> tuple:
    """Sorts layers from the input to the output by their names."""
    last = "dense" in name.lower() or "head" in name.lower()
    place = 1 if "/" in name else 2 if last else 0
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return place, numbers, "norm" in name.lower(), name


def windows(line: Line) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Intervals and refreshes of a run, window by window.

    Returns:
        Intervals in force at the end of each window ``[layers, windows]``; steps per
        refresh in the `SPAN` windows around it (their length where there was none), the
        same shape; the layers' names; the windows' ends, with the start in front.
    """
    names = [layer["name"] for layer in line["layers"]]
    order = sorted(range(len(names)), key=lambda i: depth(names[i]))
    steps = np.array([0] + [record["step"] for record in line["records"]])
    interval = np.array([record["interval"] for record in line["records"]]).T[order]
    refreshes = np.array([record["refreshes"] for record in line["records"]]).T[order]
    refreshes = np.pad(refreshes, ((0, 0), (1, 0)))
    here = np.arange(len(steps) - 1)
    first = np.maximum(here - SPAN // 2, 0)
    last = np.minimum(here + SPAN // 2 + 1, len(steps) - 1)
    counts = refreshes[:, last] - refreshes[:, first]
    between = (steps[last] - steps[first]) / np.maximum(counts, 1)
    return interval, between, [names[i] for i in order], steps


def draw_heat(axis: Axes, values: np.ndarray, names: list[str], steps: Any, top: float):
    """Draws layers against steps.

    Args:
        axis: where.
        values: ``[layers, windows]``.
        names: of the layers, input first.
        steps: ends of the windows, with the start in front.
        top: value of the brightest colour.
    """
    edges = np.arange(len(names) + 1) - 0.5
    image = axis.pcolormesh(steps, edges, values, norm=LogNorm(1, top), cmap="viridis")
    # A name per layer where they can be read.
    every = -(-len(names) // 30)
    axis.set_yticks(range(0, len(names), every), names[::every], fontsize=6)
    axis.set_xlabel("step")
    return image


def save_heat_maps(lines: Sequence[Line], threshold: float, path: Path) -> bool:
    """Draws intervals and steps per refresh of each rule at one threshold."""
    chosen: dict[str, Line] = {}
    for line in lines:
        cell = line["cell"]
        if cell["threshold"] == threshold:
            first = chosen.setdefault(cell["rule"], line)
            if cell["seed"] < first["cell"]["seed"]:
                chosen[cell["rule"]] = line
    rules = [rule for rule in RULES if rule in chosen]
    if not rules:
        return False
    found = {rule: windows(chosen[rule]) for rule in rules}
    top = max(max(np.max(w[0]), np.max(w[1])) for w in found.values())
    height = 2 * (1.2 + 0.12 * len(next(iter(found.values()))[2]))
    figure = Figure(
        figsize=(4.2 * len(rules) + 1.5, height), layout="constrained", dpi=100
    )
    title = lines[0]["data"]["title"]
    figure.suptitle(f"{title}, {lines[0]['config']['model']}, λ = {threshold:g}")
    axes = figure.subplots(2, len(rules), sharex=True, sharey=True, squeeze=False)
    image = None
    for column, rule in enumerate(rules):
        interval, between, names, steps = found[rule]
        image = draw_heat(axes[0, column], interval, names, steps, float(top))
        draw_heat(axes[1, column], between, names, steps, float(top))
        seed = chosen[rule]["cell"]["seed"]
        axes[0, column].set_title(f"{rule} (seed {seed}): interval", fontsize=9)
        axes[1, column].set_title(f"{rule}: steps per refresh", fontsize=9)
    # All share the vertical axis; the input is at the top.
    axes[0, 0].set_ylim(len(found[rules[0]][2]) - 0.5, -0.5)
    if image is not None:
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= top]
        bar = figure.colorbar(image, ax=axes, label="steps")
        bar.set_ticks(ticks, labels=[str(tick) for tick in ticks], minor=False)
        bar.minorticks_off()
    FigureCanvasAgg(figure).print_png(path)
    return True


def save_trade_off(
    lines: Sequence[Line], rows: Sequence[dict[str, Any]], path: Path
) -> None:
    """Draws accuracy against traffic, every run and the means."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    axis = figure.subplots()
    thresholds = sorted({row["threshold"] for row in rows} - {None})
    marker = dict(zip(thresholds, MARKERS, strict=False)) | {None: "*"}
    for line in lines:
        cell = line["cell"]
        axis.plot(
            100 * line["ratio"],
            100 * line["accuracy"],
            marker=marker.get(cell["threshold"], "x"),
            color=COLOURS[cell["rule"]],
            alpha=0.3,
            linestyle="",
        )
    for row in rows:
        threshold = row["threshold"]
        name = row["rule"] + ("" if threshold is None else f", λ = {threshold:g}")
        axis.errorbar(
            100 * row["ratio"],
            100 * row["accuracy"],
            yerr=np.abs(100 * (np.array([row["accuracy_range"]]).T - row["accuracy"])),
            marker=marker.get(threshold, "x"),
            color=COLOURS[row["rule"]],
            linestyle="",
            capsize=3,
            label=name,
        )
    low, high = (100 * x for x in rows[0]["accuracy_range"])
    axis.axhspan(low, high, color="0.9", zorder=0, label="seeds, every step")
    axis.set_xscale("log")
    ticks = [5, 10, 20, 50, 100]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("factor traffic, % of that of every-step refreshes")
    axis.set_ylabel("test accuracy, %")
    config = lines[0]["config"]
    axis.set_title(
        f"{lines[0]['data']['title']}, {config['model']}, "
        f"batch {config['batch_size']}, {config['steps']} steps",
        fontsize=10,
    )
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    FigureCanvasAgg(figure).print_png(path)


def save_report(config: IntervalReport, console: Console) -> list[Path]:
    """Writes summary, plots and page beside the results, and prints the table."""
    lines = read_lines(config.file)
    rows = summarise(lines)
    console.print(summary_text(rows), highlight=False, soft_wrap=True)
    folder, stem = config.out or config.file.parent, config.file.stem
    folder.mkdir(parents=True, exist_ok=True)
    loads = [line["machine"]["load"][0] for line in lines if line["machine"]["load"]]
    summary = {
        "data": lines[0]["data"],
        "config": lines[0]["config"],
        "machine": lines[0]["machine"],
        "load": [min(loads), max(loads)] if loads else None,
        "rows": rows,
    }
    paths = [folder / f"{stem}.json", folder / f"{stem}.png"]
    write_json(paths[0], summary)
    save_trade_off(lines, rows, paths[1])
    plots = [Plot(paths[1], "Accuracy against traffic, every run and the means")]
    heat = folder / f"{stem}_layers.png"
    if save_heat_maps(lines, config.heat_threshold, heat):
        paths.append(heat)
        caption = "Intervals and steps per refresh, layers × steps"
        plots.append(Plot(heat, f"{caption}, λ = {config.heat_threshold:g}"))
    cells = tuple(tuple(map(cell_text, row)) for row in table_cells(rows))
    table = Table(HEADER, cells, "Means over the seeds")
    paths += save_interval_page(config.file, summary, table, plots, folder)
    for path in paths:
        console.print(f"Written: {path}", soft_wrap=True, highlight=False)
    return paths
