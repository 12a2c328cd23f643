"""What the counters and rules of an optimiser's state show to be wrong.

One function per complaint; every threshold is a constant with its reason.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kfac_jax_lite.core.linalg import is_known
from kfac_jax_lite.core.pytree import find_states
from kfac_jax_lite.diagnostics.doctor.findings import ERROR, NOTICE, WARNING, Finding
from kfac_jax_lite.optimizer.damping import GOOD, POOR, adaptive, levenberg_marquardt

# Below it, the learning rate plays no part: ten times as much would change nothing.
SHORTENED = 0.1
# Fewer observations of the last step are not "always". And the first steps of a run,
# where gradients are largest, are what the trust region is for.
OBSERVATIONS, START = 3, 50
# A share of batches that data errors seldom reach, and one that wastes the run.
SKIPPED, MANY_SKIPPED = 0.01, 0.1
# An adaptive damping settles after a few; one step of ten taken back costs two.
RETREATS = 0.1
# Refreshes at one interval after which a cap is what holds it, if their changes were
# below this share of one that has lengthened an interval before.
AT_LONGEST, FAR_BELOW = 5, 0.5
# Statistics that differ by half from those before are not known for so many steps.
STALE_CHANGE, LONG_INTERVAL = 0.5, 10
# Refreshes between inversions, below which an old inverse hardly differs.
FEW_REFRESHES = 10
# Intervals (and steps) after which a refresh that is due has been forgotten: rules and
# stagger may hold one back for two.
FORGOTTEN_INTERVALS, FORGOTTEN_STEPS = 3, 10


class Judged(NamedTuple):
    """What a Levenberg-Marquardt rule has made of its last reduction ratio.

    Attributes:
        ratio: ``ρ``.
        damping: ``λ`` of the next step.
    """

    ratio: float
    damping: float


def skipped_batches(record: dict[str, Any]) -> Iterator[Finding]:
    """Batches with NaN or Inf, and steps that were taken back."""
    back, steps = record["retreats"] or 0, record["steps"]
    skipped = record["skipped"] - back
    share = skipped / max(1, skipped + steps)
    if skipped and not steps:
        yield Finding(
            ERROR,
            "every_batch_skipped",
            None,
            f"All {skipped} batches so far were skipped, from the first on: a gradient "
            "or a statistic was NaN or infinite, and nothing has been learned.",
            "kfac.doctor with params= and batch= looks at the loss: labels that are "
            "no classes, NaN in the data, a logarithm or root of zero.",
            {"skipped": skipped, "steps": steps},
        )
    elif share > SKIPPED:
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
    """A trust region that decides the length of every step.

    Yields:
        ``learning_rate_without_effect``, ``trust_region_saturated``.
    """
    same = [r for past in history for r in past if r["name"] == record["name"]]
    seen = [r["trust"] for r in (*same, record) if r.get("trust") is not None]
    if not seen:
        return
    middle, often = statistics.median(seen), len(seen) >= OBSERVATIONS
    if often and max(seen) < 1:
        yield Finding(
            NOTICE,
            "learning_rate_without_effect",
            None,
            f"kl_clip has shortened the update in each of {len(seen)} reports, to "
            f"{min(seen):.2g} to {max(seen):.2g} of its length: it sets how far to go, "
            "and the learning rate, or its schedule, changes nothing.",
            "Tune kl_clip in its place (steps grow with its root), or take a larger "
            f"one, or a learning rate below {min(seen):.2g} times this one.",
            {"least": min(seen), "largest": max(seen), "observations": len(seen)},
        )
    if middle > SHORTENED:
        return
    if not often and record["steps"] < START:
        return
    over = f"in the median of {len(seen)} steps" if often else "at the last step"
    yield Finding(
        WARNING if often else NOTICE,
        "trust_region_saturated",
        None,
        f"The trust region shortens the update to {middle:.2g} of its length {over}: "
        "kl_clip decides how far to go, the learning rate does not.",
        "kl_clip=None: to an adaptive damping, steps that the trust region shortens "
        "look too short, and it falls without end."
        if record["retreats"] is not None
        else "A lower learning rate or a larger damping; a larger kl_clip if training "
        "is stable and slow.",
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


def is_idle(record: dict[str, Any], records: Sequence[dict[str, Any]]) -> bool:
    """Whether a layer waits for a gradient: it is due, while others are refreshed."""
    ages = [r["since_refresh"] for r in records if r["since_refresh"] is not None]
    if not record["next_due"] or not ages:
        return False
    age = record["since_refresh"]
    return age is None or (age > overdue(record) and min(ages) <= record["interval"])


def overdue(record: dict[str, Any]) -> int:
    """Steps after which a refresh that is due has been forgotten."""
    return FORGOTTEN_INTERVALS * record["interval"] + FORGOTTEN_STEPS


def idle(record: dict[str, Any]) -> Iterator[Finding]:
    """A layer that no gradient reaches: its averages wait, and it stays due."""
    age = (
        record["steps"] if record["since_refresh"] is None else record["since_refresh"]
    )
    yield Finding(
        WARNING,
        "no_gradient",
        record["name"],
        f"No gradient has reached this layer in the last {age} steps.",
        "A head of a task without examples may wait so. Else freeze it on purpose "
        "(optax.masked), look for a dead or cut network above it, or mark every output "
        "that the loss depends on.",
        {"steps": age, "refreshes": record["refreshes"]},
    )


def refreshes(record: dict[str, Any], lag: float | None = None) -> Iterator[Finding]:
    """Layers without statistics, statistics that have changed, refreshes forgotten.

    Yields:
        ``never_refreshed``, ``stale_factors``, ``refresh_forgotten``.
    """
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
    if (
        change is not None
        and change > STALE_CHANGE
        and interval >= LONG_INTERVAL
        and (lag is None or lag > change)
    ):
        yield Finding(
            WARNING,
            "stale_factors",
            name,
            f"The statistics changed by {change:.0%} between the last two refreshes, "
            f"yet they are kept for {interval} steps.",
            "A smaller threshold or max_interval of the interval rule.",
            {"change": change, "interval": interval, "age": age, "lag": lag},
        )
    if record["next_due"] and age > overdue(record):
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


def lags(state: Any) -> dict[str, float]:
    """How far every average is from the last fresh statistics, relative to these."""
    found = {}
    for name, kept in jax.device_get(state.previous).items():
        if not kept:
            continue
        average = jax.device_get(state.factors[name])
        pairs = zip(*map(jax.tree.leaves, (average, kept[0])), strict=True)
        norms = [(np.linalg.norm(x - y), np.linalg.norm(y)) for x, y in pairs]
        found[name] = max((float(d / n) for d, n in norms if n > 0), default=0.0)
    return found


def intervals(
    records: Sequence[dict[str, Any]], history: Sequence[Sequence[dict[str, Any]]]
) -> Iterator[Finding]:
    """Intervals that the rule would lengthen, were they not at their longest.

    The longest interval is no part of the state; that it holds an interval is seen
    where changes far below one that has lengthened an interval lengthen none.

    Yields:
        ``interval_at_longest``.
    """
    tracks = [track(record, history, "refreshes") for record in records]
    steps = [pair for one in tracks for pair in zip(one, one[1:], strict=False)]
    lengthened = [
        new["diff"]
        for old, new in steps
        if new["refreshes"] == old["refreshes"] + 1
        and new["interval"] > old["interval"]
        and new["diff"] is not None
    ]
    if not lengthened:
        return
    for record, past in zip(records, tracks, strict=True):
        same = [one for one in past if one["interval"] == record["interval"]]
        count = record["refreshes"] - same[0]["refreshes"]
        changes = [one["diff"] for one in same[1:]]
        known = len(changes) >= OBSERVATIONS and None not in changes
        if (
            count >= AT_LONGEST
            and known
            and max(changes) < FAR_BELOW * max(lengthened)
            and max(one["interval"] for one in past) == record["interval"]
        ):
            yield Finding(
                NOTICE,
                "interval_at_longest",
                record["name"],
                f"{count} refreshes have left the interval at {record['interval']} "
                f"steps, although they changed the statistics by {max(changes):.1%} at "
                f"most: changes of {max(lengthened):.1%} have lengthened an interval "
                "before. max_interval decides, not the rule.",
                "A larger max_interval if refreshes cost much; "
                f"kfac.intervals.every({record['interval']}) does the same.",
                {"interval": record["interval"], "refreshes": count},
            )


def track(
    record: dict[str, Any], history: Sequence[Sequence[dict[str, Any]]], by: str
) -> list[dict[str, Any]]:
    """A layer's records from the first step (or refresh) on, the latest of each."""
    same = [r for past in history for r in past if r["name"] == record["name"]]
    latest = {r[by]: r for r in same if r[by]} | {record[by]: record}
    return [latest[n] for n in sorted(latest) if n <= record[by]]


def adaptive_damping(
    records: Sequence[dict[str, Any]], history: Sequence[Sequence[dict[str, Any]]]
) -> Iterator[Finding]:
    """An adaptive damping that has come to its bound.

    The bounds are no part of the state. But ``λ ← λ exp(−γ r)`` leaves no ``λ`` as it
    was: the same number at several steps, or at the last one and in an inverse that was
    made before, has been held. So has one at a default bound.

    Yields:
        ``damping_at_bound``.
    """
    whole = records[0]
    if whole["retreats"] is None or not whole["agreement"]:
        return
    value, rule = whole["damping"], adaptive()
    last = track(whole, history, "steps")[-OBSERVATIONS:]
    same = [r for r in last if r["agreement"] and r["damping"] == value]
    held = [r["since_inversion"] or 0 for r in records if r["inverse_damping"] == value]
    bounds = [np.float32(bound) for bound in (rule.minimum, rule.maximum)]
    if len(same) < OBSERVATIONS and max(held, default=0) < 2 and value not in bounds:
        return
    agreement = statistics.median(r["agreement"] for r in same)
    short = agreement > 0
    end = "short of" if short else "beyond"
    yield Finding(
        WARNING,
        "damping_at_bound",
        None,
        f"The adaptive damping stays at its {'lower' if short else 'upper'} bound, "
        f"{value:.2g}, and steps still end {end} the minimum along their direction "
        f"(agreement {agreement:.2g}).",
        "A larger learning rate or kl_clip: no damping lengthens steps that they hold "
        "back; or a smaller minimum of kfac.damping.adaptive(), unless "
        "damping_too_small is found as well."
        if short
        else "A lower learning rate or larger batches: gradients are mostly noise; or "
        "a larger maximum of kfac.damping.adaptive().",
        {"damping": value, "agreement": agreement, "observations": len(same)},
    )


def judged(opt_state: Any, state: Any) -> Judged | None:
    """What the Levenberg-Marquardt rule around a ``KFACState`` did last, if any."""
    for outer in find_states(opt_state, "GuidedState"):
        ratio = float(outer.ratio)
        if outer.kfac is state and is_known(ratio):
            return Judged(ratio, float(outer.damping))
    return None


def judged_damping(
    record: dict[str, Any], history: Sequence[Sequence[dict[str, Any]]], last: Judged
) -> Iterator[Finding]:
    """A Levenberg-Marquardt damping that has come to its bound.

    Bounds and ``T`` are no part of the state. But ``ρ < 1/4`` or ``ρ > 3/4`` changes
    any ``λ`` that is not held, and two changes are a multiple of ``T`` steps apart: a
    ``λ`` that has stayed for longer was there when the last ``ρ`` was taken, and was
    held. So is one at a default bound.

    Yields:
        ``damping_at_bound``.
    """
    value, rule, good = record["damping"], levenberg_marquardt(), last.ratio > GOOD
    if POOR <= last.ratio <= GOOD or last.damping != value:
        return
    bound = np.float32(rule.minimum if good else rule.maximum)
    if value != bound and not stayed(record, history):
        return
    well, end = ("well", "lower") if good else ("badly", "upper")
    yield Finding(
        NOTICE if good else WARNING,
        "damping_at_bound",
        None,
        f"The Levenberg-Marquardt damping stays at its {end} bound, {value:.2g}, "
        f"although the quadratic model predicts the loss {well} (reduction ratio "
        f"{last.ratio:.2g}).",
        "A smaller minimum of kfac.damping.levenberg_marquardt() if training is slow, "
        "unless damping_too_small is found as well; else nothing."
        if good
        else "Larger batches for the model, a lower learning rate where it is fixed; "
        "or a larger maximum of kfac.damping.levenberg_marquardt().",
        {"damping": value, "ratio": last.ratio},
    )


def stayed(record: dict[str, Any], history: Sequence[Sequence[dict[str, Any]]]) -> bool:
    """Whether a damping has stayed three times as long as between two changes."""
    past = track(record, history, "steps")
    changes = [
        (old["steps"], new["steps"])
        for old, new in zip(past, past[1:], strict=False)
        if old["damping"] != new["damping"]
    ]
    pairs = zip(changes, changes[1:], strict=False)
    between = min((new - old for (old, _), (_, new) in pairs), default=None)
    if between is None:
        return False
    return record["steps"] - changes[-1][1] >= OBSERVATIONS * between
