"""Summary, tables and plots from the records of the study."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from experiments import metrics
from experiments.benchmarks.common import first_reach, text_table, write_json
from experiments.benchmarks.time_to_target.config import Study
from experiments.errors import MetricsError

MEASURES = ("steps", "seconds", "with_compiling", "cpu_seconds")


def times(run: Mapping[str, Any], target: float) -> dict[str, float]:
    """What a run took to the target, by measure."""
    point = first_reach(run["curve"], target)
    if point is None:
        return dict.fromkeys(MEASURES, math.inf)
    whole = point["seconds"] + run["compile_seconds"]
    values = point["step"], point["seconds"], whole, point["cpu_seconds"]
    return dict(zip(MEASURES, values, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, each one of the values."""
    ordered = sorted(values)
    low, middle, high = (
        ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in (0.25, 0.5, 0.75)
    )
    return low, middle, high


def ends(run: Mapping[str, Any]) -> dict[str, float]:
    """What a run took until it ended, at the target or not, by measure."""
    return times({**run, "curve": [{**run["curve"][-1], "loss": 0.0}]}, 0.0)


def relative(
    medians: Mapping[str, Mapping[str, float]],
    baseline: str,
    baseline_ends: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """Geometric means of ratios to a baseline."""
    names = dict.fromkeys(name for row in medians.values() for name in row)
    against = {
        task: min(row[baseline], baseline_ends[task])
        for task, row in medians.items()
        if baseline in row and task in baseline_ends
    }
    found = {}
    for name in names:
        ratios = {
            task: medians[task][name] / time
            for task, time in against.items()
            if math.isfinite(medians[task].get(name, math.inf))
        }
        logs = [math.log(ratio) for ratio in ratios.values()]
        mean = math.exp(sum(logs) / len(logs)) if logs else None
        bounds = [task for task in ratios if math.isinf(medians[task][baseline])]
        found[name] = {"geometric_mean": mean, "ratios": ratios, "bounds": bounds}
    return found


def profiles(
    medians: Mapping[str, Mapping[str, float]],
) -> dict[str, list[tuple[float, float]]]:
    """Performance profiles: share of tasks within a factor of the best."""
    names = dict.fromkeys(name for row in medians.values() for name in row)
    found = {}
    for name in names:
        factors = sorted(
            row[name] / min(row.values())
            for row in medians.values()
            if math.isfinite(row.get(name, math.inf))
        )
        count = len(medians)
        found[name] = [(tau, (i + 1) / count) for i, tau in enumerate(factors)]
    return found


BASELINE = "adamw"
TITLES = {
    "sgd": "SGD, momentum",
    "adamw": "AdamW",
    "muon": "Muon",
    "soap": "SOAP",
    "kfac_jax": "kfac-jax",
    "ours": "kfac_jax_lite",
    "kfac_jax_auto": "kfac-jax, automatic",
    "ours_auto": "kfac_jax_lite, automatic",
}
COLOURS = {
    "sgd": "#999999",
    "adamw": "#0072b2",
    "muon": "#cc79a7",
    "soap": "#e69f00",
    "kfac_jax": "#009e73",
    "ours": "#d55e00",
    "kfac_jax_auto": "#009e73",
    "ours_auto": "#d55e00",
}
AXES = {
    "steps": "steps",
    "seconds": "seconds, without compiling",
    "with_compiling": "seconds, with compiling",
    "cpu_seconds": "processor seconds, without compiling",
}
Record = dict[str, Any]


def summarise(study: Study, records: Sequence[Record]) -> Record:
    """Turns the records into the result."""
    tasks = {r["task"]: dict(r) for r in records if r["kind"] == "target"}
    result: Record = {"size": study.size, "slack": study.slack, "tasks": {}}
    for name, found in tasks.items():
        of_task = [r for r in records if r["task"] == name]
        seeds = [r for r in of_task if r["kind"] == "seed"]
        if not seeds:
            continue
        result.setdefault("machine", seeds[0]["machine"])
        rows = {
            n: optimiser_row([r for r in seeds if r["optimiser"] == n], found["target"])
            for n in TITLES
            if any(r["optimiser"] == n for r in seeds)
        }
        missing = {
            r["optimiser"]: r["reason"] for r in of_task if r["kind"] == "missing"
        }
        kept = {k: found[k] for k in ("target", "lowest", "set_by")}
        size = study.rung.tasks[name].shared()
        data = seeds[0]["data"]
        result["tasks"][name] = {
            **kept, "data": data, "size": size, "optimisers": rows, "missing": missing
        }  # fmt: skip
    result["relative"], result["profiles"] = {}, {}
    for measure in MEASURES:
        medians = medians_of(result, measure)
        ends = {
            task: found["optimisers"][BASELINE]["ends"][measure]
            for task, found in result["tasks"].items()
            if BASELINE in found["optimisers"]
        }
        result["relative"][measure] = relative(medians, BASELINE, ends)
        result["profiles"][measure] = profiles(medians)
    return result


def optimiser_row(runs: Sequence[Record], target: float) -> Record:
    taken = [times(run, target) for run in runs]
    rates = [1e3 * r["curve"][-1]["seconds"] / r["curve"][-1]["step"] for r in runs]
    busy = [r["cores_busy"] for r in runs]
    return {
        "values": runs[0]["values"],
        "seeds": len(runs),
        "reached": sum(math.isfinite(t["steps"]) for t in taken),
        **{m: quartiles([t[m] for t in taken]) for m in MEASURES},
        "ends": {m: quartiles([ends(run)[m] for run in runs])[1] for m in MEASURES},
        "compile_seconds": quartiles([r["compile_seconds"] for r in runs])[1],
        "ms_per_step": quartiles(rates)[1],
        "cores_busy": quartiles(busy)[1],
    }


def medians_of(result: Record, measure: str) -> dict[str, dict[str, float]]:
    """Medians over the seeds, by task and optimiser."""
    return {
        task: {name: row[measure][1] for name, row in found["optimisers"].items()}
        for task, found in result["tasks"].items()
    }


def interval(three: Sequence[float], digits: int) -> str:
    """A median with its quartiles, as text."""
    low, middle, high = (f"{x:.{digits}f}" if math.isfinite(x) else "-" for x in three)
    return f"{middle} ({low} to {high})"


def tables(result: Record) -> str:
    """The tables of all tasks, and the ratios."""
    parts = []
    for task, found in result["tasks"].items():
        rows = [
            [
                TITLES[name],
                f"{row['reached']}/{row['seeds']}",
                interval(row["steps"], 0),
            ]
            + [interval(row[m], 2) for m in MEASURES[1:]]
            + [row["compile_seconds"], row["ms_per_step"], row["cores_busy"]]
            for name, row in found["optimisers"].items()
        ]
        header = ["optimiser", "reached", "steps", "seconds", "with compiling"]
        header += ["processor seconds", "compiling", "ms/step", "cores busy"]
        title = (
            f"{task}, {found['data']['title']}: held-out loss {found['target']:.4g} "
            f"({TITLES[found['set_by']]}: {found['lowest']:.4g})"
        )
        parts += [title, text_table(header, rows), ""]
        parts += [f"{TITLES[n]}: missing, {why}" for n, why in found["missing"].items()]
    names = list(result["relative"]["steps"])
    rows = [
        [TITLES[name]]
        + [result["relative"][m][name]["geometric_mean"] for m in MEASURES]
        + [len(result["relative"]["steps"][name][k]) for k in ("ratios", "bounds")]
        for name in names
    ]
    parts.append(
        "Geometric mean relative to AdamW, over the tasks that an optimiser reaches; "
        "where AdamW does not, its whole run counts and the ratio is an upper bound"
    )
    header = ["optimiser", *MEASURES, "tasks", "bounds"]
    parts.append(text_table(header, rows))
    return "\n".join(parts)


def save_report(study: Study, console: Console) -> Record:
    """Writes ``time_to_target.json``, plots the profiles and curves, prints tables."""
    records = metrics.read_records(study.lines)
    result = summarise(study, records)
    if not result["tasks"]:
        raise MetricsError(f"{study.lines} has no seeds of a winner yet.")
    write_json(study.out / "time_to_target.json", result)
    plot_profiles(study, result)
    plot_curves(study, result, records)
    console.print(tables(result), soft_wrap=True, markup=False, highlight=False)
    return result


def plot_profiles(study: Study, result: Record) -> None:
    """Draws a profile per measure to ``time_to_target_profiles.png``."""
    figure = Figure(figsize=(12, 4), layout="constrained", dpi=120)
    measures = MEASURES[:3]
    for axis, measure in zip(figure.subplots(1, 3, sharey=True), measures, strict=True):
        found = result["profiles"][measure]
        last = 1.5 * max((p[-1][0] for p in found.values() if p), default=1.0)
        for name, points in found.items():
            factors = [1.0, *(tau for tau, _ in points), last]
            shares = [0.0, *(share for _, share in points)]
            shares.append(shares[-1])
            label, colour = TITLES[name], COLOURS[name]
            axis.step(factors, shares, where="post", label=label, color=colour)
        axis.set_xscale("log")
        axis.set_xlabel(f"times the best: {AXES[measure]}")
        axis.set_ylim(-0.02, 1.02)
        axis.grid(True, which="both", alpha=0.3)
    figure.axes[0].set_ylabel("share of tasks at the target")
    figure.axes[0].legend()
    FigureCanvasAgg(figure).print_png(study.out / "time_to_target_profiles.png")


def plot_curves(
    study: Study, result: Record, records: Sequence[Mapping[str, Any]]
) -> None:
    """Draws every seed's held-out loss to ``time_to_target_curves.png``."""
    tasks = result["tasks"]
    figure = Figure(figsize=(10, 3.2 * len(tasks)), layout="constrained", dpi=100)
    axes = figure.subplots(len(tasks), 2, sharey="row", squeeze=False)
    for (task, found), row in zip(tasks.items(), axes, strict=True):
        seeds = [r for r in records if r["kind"] == "seed" and r["task"] == task]
        for axis, field in zip(row, ("step", "seconds"), strict=True):
            labelled: set[str] = set()
            for run in seeds:
                name, curve = run["optimiser"], run["curve"]
                shown = [p for p in curve if p["loss"] is not None]
                axis.plot(
                    [p[field] for p in shown],
                    [p["loss"] for p in shown],
                    color=COLOURS[name],
                    label=None if name in labelled else TITLES[name],
                    linewidth=0.9,
                )
                labelled.add(name)
            axis.axhline(found["target"], color="black", linewidth=0.8, linestyle=":")
            axis.set_ylim(0.97 * found["target"], 2.5 * found["target"])
            axis.set_xlabel("steps" if field == "step" else AXES["seconds"])
            axis.grid(True, alpha=0.3)
        row[0].set_ylabel("held-out loss")
        row[0].set_title(f"{task}, {found['data']['title']}")
    axes[0][0].legend()
    FigureCanvasAgg(figure).print_png(study.out / "time_to_target_curves.png")
