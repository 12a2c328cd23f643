"""From the runs of all seeds to medians, ratios and performance profiles.

A run that does not reach the target takes infinitely long.

References:
    Dolan & Moré, 2002, "Benchmarking optimization software with performance profiles",
    Mathematical Programming 91, Sec. 2.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks.common import first_reach

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
