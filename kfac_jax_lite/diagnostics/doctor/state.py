"""What an optimiser's state shows to be wrong: counters, rules, averaged factors.

One function per complaint; every threshold is a constant with its reason.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from kfac_jax_lite.core.linalg import is_known
from kfac_jax_lite.core.pytree import find_states
from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.diagnostics.accuracy import Damped, Factors
from kfac_jax_lite.diagnostics.doctor.findings import Finding, error, notice, warning
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
# Rounding errors grow with the condition number: above a tenth of 1 / eps, not one
# digit of the inverse along the smallest eigenvalues is right.
ROUNDED = 0.1
# How much farther than a typical direction the flattest one may be carried. Factors
# are estimates: eigenvalues thousands of times below the mean are noise, or directions
# that no batch has shown yet, and a gradient along them is noise as well.
MOST_AMPLIFIED = 1e4
# The least damping to advise, over the mean eigenvalue: ten times what amplifies so.
SHARE = 1e-3
# Where even the largest curvature changes the damped matrix by less than a tenth, the
# step is the gradient over the damping: K-FAC's cost for plain gradient descent.
FLAT = 1.1
# Trace shared by one direction: 1 + 2 · (what is left) for small rests. Inputs whose
# mean is thirty times their deviation.
CONSTANT_RANK = 1.002
# Diagonal entries this far below the largest are zero; images have a tenth of pixels
# that never change, so that only a quarter is a complaint.
ZERO, DEAD = 1e-10, 0.25
# Refreshes before "never" is said: of few images, a third of the pixels is black.
SEEN = 5
# Notes of the table that speak of rows which belong to no example, and what follows.
UNBATCHED = {
    "applied once for the whole batch": "the rows that it sees are not examples. They "
    "are counted as they are, so that its curvature is that of these rows, not a mean "
    "over examples.",
    "products outside the batch": "beside its layer the weight is applied to fewer "
    "rows than the batch has examples. The curvature is that of the layer alone.",
}
# Parameters outside of any curvature block that couples them.
FALLBACK, MOSTLY_FALLBACK = 0.05, 0.5

Record = dict[str, Any]
History = Sequence[Sequence[Record]]


def of_counters(
    records: Sequence[Record], lags: dict[str, float], history: History, guided: Any
) -> Iterator[Finding]:
    """What the counters of one ``KFACState`` show; ``guided``: see ``guided_by``."""
    whole = records[0]
    yield from skipped_batches(whole)
    if not whole["steps"]:
        if not whole["skipped"]:
            yield notice("no_steps", steps=0)
        return
    yield from trust_region(whole, history)
    yield from adaptive_damping(records, history)
    if guided is not None:
        yield from guided_damping(whole, history, guided)
    yield from intervals(records, history)
    for record in records:
        if is_idle(record, records):
            age = record["since_refresh"]
            steps = record["steps"] if age is None else age
            numbers = {"steps": steps, "refreshes": record["refreshes"]}
            yield warning("no_gradient/waits", record["name"], **numbers)
        else:
            yield from refreshes(record, lags.get(record["name"]))
        yield from inversions(record)


def skipped_batches(record: Record) -> Iterator[Finding]:
    """Batches with NaN or Inf, and steps that were taken back."""
    back, steps = record["retreats"] or 0, record["steps"]
    skipped = record["skipped"] - back
    batches = skipped + steps
    share = skipped / max(1, batches)
    numbers = {"skipped": skipped, "steps": steps}
    if skipped and not steps:
        yield error("every_batch_skipped", **numbers)
    elif share > SKIPPED:
        say, words = error if share > MANY_SKIPPED else warning, {"batches": batches}
        yield say("skipped_batches", None, words, **numbers, share=share)
    if back / max(1, back + steps) > RETREATS:
        words = {"all": back + steps}
        numbers = {"retreats": back, "steps": steps, "damping": record["damping"]}
        yield warning("steps_taken_back", None, words, **numbers)


def trust_region(record: Record, history: History) -> Iterator[Finding]:
    """A trust region that decides the length of every step."""
    records = [*earlier(record, history), record]
    seen = [r["trust"] for r in records if r.get("trust") is not None]
    if not seen:
        return
    middle, often = statistics.median(seen), len(seen) >= OBSERVATIONS
    count = {"observations": len(seen)}
    if often and max(seen) < 1:
        ends = {"least": min(seen), "largest": max(seen)}
        yield notice("learning_rate_without_effect", **ends, **count)
    if middle > SHORTENED or (not often and record["steps"] < START):
        return
    over = f"in the median of {len(seen)} steps" if often else "at the last step"
    text = "trust_region_saturated"
    if record["retreats"] is not None:
        text = "trust_region_saturated/adaptive"
    say = warning if often else notice
    yield say(text, None, {"over": over}, trust=middle, **count)


def inversions(record: Record) -> Iterator[Finding]:
    """Factorisations that failed, and inverses of factors long gone."""
    failures, good = record["failures"], record["inversions"]
    if failures:
        none = "" if good else " There has been no good one."
        words = {"all": failures + good, "none": none}
        numbers = {"failures": failures, "inversions": good}
        say = warning if good else error
        yield say("failed_inversions", record["name"], words, **numbers)
    if not record["since_inversion"] or not record["memory"]:
        return
    steps = record["since_inversion"] - record["since_refresh"]
    between = steps * record["refreshes"] / max(1, record["steps"])
    if between > max(FEW_REFRESHES, record["memory"] / 2):
        numbers = {"refreshes_between": between, "memory": record["memory"]}
        yield notice("old_inverse", record["name"], **numbers)


def is_idle(record: Record, records: Sequence[Record]) -> bool:
    """Whether a layer waits for a gradient: it is due, while others are refreshed."""
    ages = [r["since_refresh"] for r in records if r["since_refresh"] is not None]
    if not record["next_due"] or not ages:
        return False
    age = record["since_refresh"]
    return age is None or (age > overdue(record) and min(ages) <= record["interval"])


def overdue(record: Record) -> int:
    """Steps after which a refresh that is due has been forgotten."""
    return FORGOTTEN_INTERVALS * record["interval"] + FORGOTTEN_STEPS


def refreshes(record: Record, lag: float | None) -> Iterator[Finding]:
    """Layers without statistics, statistics that have changed, refreshes forgotten."""
    name, interval, age = record["name"], record["interval"], record["since_refresh"]
    if age is None:
        yield error("never_refreshed", name, steps=record["steps"])
        return
    change = record["diff"] or 0.0
    far = change > STALE_CHANGE and (lag is None or lag > change)
    if far and interval >= LONG_INTERVAL:
        numbers = {"change": change, "interval": interval, "age": age, "lag": lag}
        yield warning("stale_factors", name, **numbers)
    if record["next_due"] and age > overdue(record):
        yield error("refresh_forgotten", name, age=age, interval=interval)


def lags_of(state: Any) -> dict[str, float]:
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


def intervals(records: Sequence[Record], history: History) -> Iterator[Finding]:
    """Intervals that the rule would lengthen, were they not at their longest.

    The longest interval is no part of the state; that it holds an interval is seen
    where changes far below one that has lengthened an interval lengthen none.
    """
    tracks = [track(record, history, "refreshes") for record in records]
    lengthened = [
        new["diff"]
        for one in tracks
        for old, new in zip(one, one[1:], strict=False)
        if new["refreshes"] == old["refreshes"] + 1
        and new["interval"] > old["interval"]
        and new["diff"] is not None
    ]
    if not lengthened:
        return
    for record, past in zip(records, tracks, strict=True):
        interval = record["interval"]
        same = [one for one in past if one["interval"] == interval]
        count = record["refreshes"] - same[0]["refreshes"]
        changes = [one["diff"] for one in same[1:]]
        known = len(changes) >= OBSERVATIONS and None not in changes
        if (
            count >= AT_LONGEST
            and known
            and max(changes) < FAR_BELOW * max(lengthened)
            and max(one["interval"] for one in past) == interval
        ):
            words = {"most": max(changes), "longer": max(lengthened)}
            name, numbers = record["name"], {"interval": interval, "refreshes": count}
            yield notice("interval_at_longest", name, words, **numbers)


def earlier(record: Record, history: History) -> list[Record]:
    """A layer's records before."""
    return [r for past in history for r in past if r["name"] == record["name"]]


def track(record: Record, history: History, by: str) -> list[Record]:
    """A layer's records from the first step (or refresh) on, the latest of each."""
    latest = {r[by]: r for r in earlier(record, history) if r[by]}
    latest[record[by]] = record
    return [latest[n] for n in sorted(latest) if n <= record[by]]


def adaptive_damping(records: Sequence[Record], history: History) -> Iterator[Finding]:
    """An adaptive damping that has come to its bound.

    The bounds are no part of the state. But ``λ ← λ exp(−γ r)`` leaves no ``λ`` as it
    was: the same number at several steps, or at the last one and in an inverse that was
    made before, has been held. So has one at a default bound.
    """
    whole = records[0]
    if whole["retreats"] is None or not whole["agreement"]:
        return
    value, rule = whole["damping"], adaptive()
    last = track(whole, history, "steps")[-OBSERVATIONS:]
    same = [r["agreement"] for r in last if r["agreement"] and r["damping"] == value]
    held = [r["since_inversion"] or 0 for r in records if r["inverse_damping"] == value]
    bounds = [np.float32(bound) for bound in (rule.minimum, rule.maximum)]
    if len(same) < OBSERVATIONS and max(held, default=0) < 2 and value not in bounds:
        return
    agreement = statistics.median(same)
    text = "damping_at_bound/short" if agreement > 0 else "damping_at_bound/beyond"
    numbers = {"damping": value, "agreement": agreement, "observations": len(same)}
    yield warning(text, **numbers)


def guided_by(opt_state: Any, state: Any) -> Any:
    """The ``GuidedState`` around a ``KFACState`` that knows a ratio ``ρ``, or None."""
    for outer in find_states(opt_state, "GuidedState"):
        if outer.kfac is state and is_known(float(outer.ratio)):
            return outer
    return None


def guided_damping(record: Record, history: History, guided: Any) -> Iterator[Finding]:
    """A Levenberg-Marquardt damping that has come to its bound.

    Bounds and ``T`` are no part of the state. But ``ρ < 1/4`` or ``ρ > 3/4`` changes
    any ``λ`` that is not held, and two changes are a multiple of ``T`` steps apart: a
    ``λ`` that has stayed for longer was there when the last ``ρ`` was taken, and was
    held. So is one at a default bound.
    """
    value, ratio, rule = record["damping"], float(guided.ratio), levenberg_marquardt()
    if POOR <= ratio <= GOOD or float(guided.damping) != value:
        return
    good = ratio > GOOD
    bound = np.float32(rule.minimum if good else rule.maximum)
    if value == bound or stayed(record, history):
        text = "damping_at_bound/good" if good else "damping_at_bound/poor"
        yield (notice if good else warning)(text, damping=value, ratio=ratio)


def stayed(record: Record, history: History) -> bool:
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


class Rule(NamedTuple):
    """The function in ``kfac.damping`` that adapts ``λ``, and whether it raises it."""

    name: str
    rises: bool


def rule_of(record: Record, guided: Any) -> Rule | None:
    """What adapts the damping of a state, or None."""
    if record["retreats"] is not None:
        return Rule("adaptive", (record["agreement"] or 0) < 0)
    if guided is not None:
        return Rule("levenberg_marquardt", float(guided.ratio) < POOR)
    return None


def damping(factors: Factors, rule: Rule | None) -> Iterator[Finding]:
    """A damping far too small or far too large against the factors' eigenvalues."""
    block, value, name = factors.damped, factors.damping, factors.layer.name
    if block is None or largest(factors) <= 0:
        return
    condition = float(np.max(block.condition))
    adapt = "kfac.damping.adaptive()."
    if condition * factors.eps > ROUNDED:
        advice = "A damping that is orders of magnitude larger, or "
        words = {"larger": larger(rule, block) or advice + adapt}
        numbers = {"damping": value, "condition": condition, "eps": factors.eps}
        yield error("damping_below_rounding", name, words, **numbers)
    amplified = float(np.max(block.mean / block.low))
    if amplified > MOST_AMPLIFIED:
        advice = "A larger damping, about the mean eigenvalue times 1e-3 to 1, or "
        words = {"larger": larger(rule, block) or advice + adapt}
        numbers = {"damping": value, "amplification": amplified}
        yield warning("damping_too_small", name, words, **numbers)
    # An adaptive rule chooses a large damping itself.
    if is_flat(factors) and (rule is None or rule.name != "adaptive"):
        ratio = float(np.max(block.high)) / value
        numbers = {"damping": value, "largest": largest(factors), "ratio": ratio}
        yield warning("damping_too_large", name, **numbers)


def largest(factors: Factors) -> float:
    """The largest eigenvalue of ``A ⊗ G``."""
    a, g = factors.values
    return float(np.max(a[..., -1] * g[..., -1]))


def is_flat(factors: Factors) -> bool:
    """Whether the damping outweighs all curvature."""
    if factors.damped is None or largest(factors) <= 0:
        return False
    return float(np.max(factors.damped.high)) / factors.damping < FLAT


def larger(rule: Rule | None, block: Damped) -> str:
    """What keeps a rule from making the damping too small."""
    if rule is None:
        return ""
    call = f"kfac.damping.{rule.name}(), about {SHARE * np.max(block.mean):.1g}"
    if rule.rises:
        return f"A larger initial of {call}: the rule is raising the damping already."
    where = {
        "adaptive": "steps end too short, as those do that kl_clip shortens",
        "levenberg_marquardt": "the quadratic model predicts the loss well",
    }[rule.name]
    return (
        f"A larger minimum of {call}: the rule does not see the eigenvalues, and "
        f"lowers the damping where {where}."
    )


def degenerate(factors: Factors) -> Iterator[Finding]:
    """Constant inputs, dead inputs and dead units."""
    layer, (values, _) = factors.layer, factors.values
    squares = np.square(values).sum(-1)
    ranks = np.square(values.sum(-1)) / np.maximum(squares, np.finfo(np.float64).tiny)
    if layer.sizes[0] > 1 and ranks.min() < CONSTANT_RANK:
        numbers = {"effective_rank": float(ranks.min()), "size": layer.sizes[0]}
        yield warning("constant_inputs", layer.name, **numbers)
    of_a, of_g = factors.diagonals
    if not np.all(of_g.max(-1) > 0):
        numbers = {"largest_g": float(of_g.max())}
        yield warning("no_gradient", layer.name, **numbers)
        return
    if factors.refreshes < SEEN:
        return
    sides = [("dead_units", of_g)]
    if factors.forms[0].matrix:
        sides.append(("dead_inputs", of_a[..., : layer.sizes[0] - layer.bias]))
    for kind, entries in sides:
        if entries.size:
            share = float(np.mean(entries <= ZERO * entries.max(-1, keepdims=True)))
            if share > DEAD:
                numbers = {"share": share, "size": entries.shape[-1]}
                yield warning(kind, layer.name, **numbers)


def unbatched(layers: Sequence[LayerTag]) -> Iterator[Finding]:
    """Layers that the loss applies, also or only, to something without examples."""
    for layer in layers:
        notes = [note for note in UNBATCHED if note in layer.note]
        if notes:
            words = {"found": notes[0], "meaning": UNBATCHED[notes[0]]}
            yield notice("unbatched_use", layer.name, words, note=layer.note)


def fallback(layers: Sequence[LayerTag]) -> Iterator[Finding]:
    """Parameters under a diagonal, for want of a rule."""
    fallen = [layer for layer in layers if layer.fallback]
    elements = sum(layer.elements for layer in fallen)
    share = elements / max(1, sum(layer.elements for layer in layers))
    if share > FALLBACK:
        first = max(fallen, key=lambda layer: layer.elements)
        words = {"first": f"{', '.join(first.params)} ({first.note or 'no rule'})"}
        numbers = {"share": share, "elements": elements, "layers": len(fallen)}
        say = warning if share > MOSTLY_FALLBACK else notice
        yield say("diagonal_fallback", None, words, **numbers)
