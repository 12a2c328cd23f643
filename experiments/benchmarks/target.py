"""When the best run of ours first has the loss of a baseline's best run."""

from typing import Any

from experiments.benchmarks.common import first_reach


def compare_with(baseline: str, best: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compares the best trials."""
    target = best[baseline]["best_loss"]
    when = {name: first_reach(best[name]["curve"], target) for name in best}
    theirs, ours = when[baseline], when["ours"]
    ratios = {
        f"{field}_ratio": ours[field] / theirs[field] if theirs and ours else None
        for field in ("step", "seconds")
    }
    return {"target": target, **when, **ratios}
