"""What the counters and rules of an optimiser's state show to be wrong.

One function per complaint; every threshold is a constant with its reason.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from kfac_jax_lite.findings import ERROR, NOTICE, WARNING, Finding

# Below it, the learning rate plays no part: ten times as much would change nothing.
SHORTENED = 0.1
# Fewer observations of the last step are not "always".
OBSERVATIONS = 3
# A share of batches that data errors seldom reach, and one that wastes the run.
SKIPPED, MANY_SKIPPED = 0.01, 0.1
# An adaptive damping settles after a few; one step of ten taken back costs two.
RETREATS = 0.1
# Statistics that differ by half from those before are not known for so many steps.
STALE_CHANGE, LONG_INTERVAL = 0.5, 10
# Refreshes between inversions, below which an old inverse hardly differs.
FEW_REFRESHES = 10
# Intervals (and steps) after which a refresh that is due has been forgotten: rules and
# stagger may hold one back for two.
FORGOTTEN_INTERVALS, FORGOTTEN_STEPS = 3, 10


def skipped_batches(record: dict[str, Any]) -> Iterator[Finding]:
    """Batches with NaN or Inf, and steps that were taken back."""
    back, steps = record["retreats"] or 0, record["steps"]
    skipped = record["skipped"] - back
    share = skipped / max(1, skipped + steps)
    if share > SKIPPED:
        yield Finding(
            ERROR if share > MANY_SKIPPED else WARNING,
            "skipped_batches",
            None,
            f"{skipped} of {skipped + steps} batches were skipped because a gradient "
            "or a statistic was NaN or infinite.",
            "Look for NaN in the data and in the loss; a lower learning rate or a "
            "larger damping if they began in mid-run.",
            {"skipped": skipped, "steps": steps, "share": share},
        )
    if back / max(1, back + steps) > RETREATS:
        yield Finding(
            WARNING,
            "steps_taken_back",
            None,
            f"{back} steps in {back + steps} ended so far uphill that they were taken "
            "back.",
            "A larger first damping, a lower learning rate or less momentum; larger "
            "batches if gradients are mostly noise.",
            {"retreats": back, "steps": steps, "damping": record["damping"]},
        )


def trust_region(
    record: dict[str, Any], history: Sequence[Sequence[dict[str, Any]]]
) -> Iterator[Finding]:
    """A trust region that decides the length of every step."""
    same = [r for past in history for r in past if r["name"] == record["name"]]
    seen = [r["trust"] for r in (*same, record) if r.get("trust") is not None]
    if not seen or statistics.median(seen) > SHORTENED:
        return
    middle, often = statistics.median(seen), len(seen) >= OBSERVATIONS
    over = f"in the median of {len(seen)} steps" if often else "at the last step"
    yield Finding(
        WARNING if often else NOTICE,
        "trust_region_saturated",
        None,
        f"The trust region shortens the update to {middle:.2g} of its length {over}: "
        "kl_clip decides how far to go, the learning rate does not.",
        "A lower learning rate or a larger damping; a larger kl_clip if training is "
        "stable and slow.",
        {"trust": middle, "observations": len(seen)},
    )


def inversions(record: dict[str, Any]) -> Iterator[Finding]:
    """Factorisations that failed, and inverses of factors long gone."""
    failures, good = record["failures"], record["inversions"]
    if failures:
        yield Finding(
            WARNING if good else ERROR,
            "failed_inversions",
            record["name"],
            f"{failures} of {failures + good} inversions failed; the last good inverse "
            "stayed in use." + ("" if good else " There has been no good one."),
            'A larger damping, or inverse="eigh", which bears singular factors.',
            {"failures": failures, "inversions": good},
        )
    if not record["since_inversion"] or not record["memory"]:
        return
    steps = record["since_inversion"] - record["since_refresh"]
    between = steps * record["refreshes"] / max(1, record["steps"])
    if between > max(FEW_REFRESHES, record["memory"] / 2):
        yield Finding(
            NOTICE,
            "old_inverse",
            record["name"],
            f"The factors were refreshed about {between:.0f} times since they were "
            "last inverted: their average has since been replaced, unused.",
            "A smaller inverse_interval, or a longer refresh interval: refreshes "
            "between inversions are mostly wasted.",
            {"refreshes_between": between, "memory": record["memory"]},
        )


def refreshes(record: dict[str, Any]) -> Iterator[Finding]:
    """Layers without statistics, statistics that have changed, refreshes forgotten."""
    name, interval, age = record["name"], record["interval"], record["since_refresh"]
    if age is None:
        yield Finding(
            ERROR,
            "never_refreshed",
            name,
            f"No statistics have arrived in {record['steps']} steps: the gradient "
            "passes as it is.",
            "Pass statistics= of tagged.value_and_grad(…, opt_state=opt_state) to "
            "update at every step.",
            {"steps": record["steps"]},
        )
        return
    change = record["diff"]
    if change is not None and change > STALE_CHANGE and interval >= LONG_INTERVAL:
        yield Finding(
            WARNING,
            "stale_factors",
            name,
            f"The statistics changed by {change:.0%} between the last two refreshes, "
            f"yet they are kept for {interval} steps.",
            "A smaller threshold or max_interval of the interval rule; larger batches "
            "if the change is noise.",
            {"change": change, "interval": interval, "age": age},
        )
    limit = FORGOTTEN_INTERVALS * interval + FORGOTTEN_STEPS
    if record["next_due"] and age > limit:
        yield Finding(
            ERROR,
            "refresh_forgotten",
            name,
            f"A refresh is due, with an interval of {interval} steps, and the last "
            f"was {age} steps ago.",
            "Pass statistics= to update at every step; hand the current opt_state to "
            "value_and_grad.",
            {"age": age, "interval": interval},
        )
