"""``doctor``: looks at a run and says in plain words what is wrong with it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optax

from kfac_jax_lite.core.pytree import find_states
from kfac_jax_lite.diagnostics.doctor import counters, marks, symptoms
from kfac_jax_lite.diagnostics.doctor.examination import examined, of_batch
from kfac_jax_lite.diagnostics.doctor.findings import (
    ERROR,
    NOTICE,
    WARNING,
    Finding,
    Findings,
)
from kfac_jax_lite.diagnostics.doctor.modes import evaluation_mode
from kfac_jax_lite.diagnostics.doctor.symptoms import Rule
from kfac_jax_lite.diagnostics.report import report
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

# An update as long as the parameters leaves nothing of them.
LONG_STEP = 1.0


def doctor(
    tagged: TaggedLoss,
    opt_state: Any,
    batch: tuple[Any, ...] | None = None,
    params: Any = None,
    *,
    key: Any = None,
    learning_rate: float | None = None,
    history: Sequence[Sequence[dict[str, Any]]] = (),
) -> Findings:
    """Looks for what commonly goes wrong; a healthy run has no findings.

    From the layers: ``diagonal_fallback``, ``unbatched_use``. From the state alone:
    ``no_steps``, ``skipped_batches``, ``every_batch_skipped``, ``steps_taken_back``,
    ``trust_region_saturated``, ``failed_inversions``, ``old_inverse``,
    ``never_refreshed``, ``stale_factors``, ``refresh_forgotten``,
    ``interval_at_longest``, ``damping_at_bound``, ``damping_below_rounding``,
    ``damping_too_small``, ``damping_too_large``, ``constant_inputs``, ``no_gradient``,
    ``dead_units``, ``dead_inputs``. With ``params``:
    ``parameters_not_finite`` and, where the last update is known, ``steps_explode``.
    With ``params`` and ``batch``: ``loss_not_finite``, ``labels_out_of_range``,
    ``loss_is_a_sum``, ``loss_is_scaled``, ``wrong_mark``, ``too_few_rows``,
    ``other_inputs``, ``other_gradients``, ``fisher_vanishes``, ``stored_averages``,
    ``unused_key``. What each rests on is in its ``numbers``; thresholds and their
    reasons are in the modules of ``diagnostics.doctor``.

    Eigendecompositions of all factors on the host, in float64: not for every step. A
    single state knows its last step only; "always" needs ``history``, and so do
    ``interval_at_longest``, ``learning_rate_without_effect`` and most of
    ``damping_at_bound``.

    Args:
        tagged: The tagged loss.
        opt_state: Any optax state that contains a ``KFACState``, whole arrays.
        batch: Arguments of the loss after ``params``, as in training; with ``params``.
        params: The parameters.
        key: PRNG key: of ``fisher="mc"``; with ``"empirical"`` and a marked output it
            compares that matrix with a sampled one, instead of the loss with zero.
        learning_rate: ``η`` of the last step, where the state does not hold it.
        history: Earlier results of ``kfac.report``.

    Returns:
        The findings, gravest first.

    Raises:
        ValueError: There is no ``KFACState``; a batch without parameters; ``key`` is
            missing with ``fisher="mc"``.
    """
    if batch is not None and params is None:
        raise ValueError("doctor wants params= with batch=.")
    records = {record["name"]: record for record in report(opt_state)}
    found = [*symptoms.fallback(tagged.layers), *symptoms.unbatched(tagged.layers)]
    factors = []
    for state in find_states(opt_state):
        if state.factors:
            own = [records[name] for name in sorted(state.factors)]
            last = counters.judged(opt_state, state)
            found += of_state(own, counters.lags(state), history, last)
            rule = rule_of(own[0], last)
            factors += symptoms.factors_of(tagged.layers, state, records, rule)
    for one in factors:
        adapted = one.rule is not None and one.rule.name == "adaptive"
        shown = [f for f in symptoms.damping(one) if not (adapted and is_large(f))]
        found += [*shown, *symptoms.degenerate(one)]
    if params is not None:
        found += of_parameters(opt_state, params, records, learning_rate)
    if batch is not None:
        traced = tagged.trace(params, tuple(batch), tagged.fisher != "empirical")
        seen = examined(tagged, params, batch, key, traced.num_examples)
        outputs = marks.seen_outputs(tagged, traced, params, batch)
        found += of_batch(tagged, seen, records, factors)
        summed = any(finding.kind == "loss_is_a_sum" for finding in found)
        said = marks.marks(outputs)
        found += [f for f in said if not (summed and f.kind == "loss_is_a_sum")]
        found += marks.labels(outputs, batch, seen.loss)
        found += evaluation_mode(traced, params, batch)
    odd = {f.layer for f in found if f.kind == "unbatched_use"}  # the better reason
    found = [f for f in found if f.kind != "no_gradient" or f.layer not in odd]
    if any(finding.kind == "fisher_vanishes" for finding in found):
        found = [f for f in found if not is_large(f)]  # its consequence
    order = [ERROR, WARNING, NOTICE]
    return Findings(sorted(found, key=lambda f: order.index(f.severity)))


def is_large(finding: Finding) -> bool:
    """Whether it complains of a large damping, which an adaptive one chooses itself."""
    return finding.kind == "damping_too_large"


def rule_of(record: dict[str, Any], last: counters.Judged | None) -> Rule | None:
    """What adapts the damping of a state, or None."""
    if record["retreats"] is not None:
        return Rule("adaptive", (record["agreement"] or 0) < 0)
    if last is not None:
        return Rule("levenberg_marquardt", last.ratio < counters.POOR)
    return None


def of_state(
    records: Sequence[dict[str, Any]],
    lags: dict[str, float],
    history: Any,
    last: counters.Judged | None,
) -> Iterator[Finding]:
    """What the counters of one ``KFACState`` show."""
    whole = records[0]
    yield from counters.skipped_batches(whole)
    if not whole["steps"]:
        if whole["skipped"]:
            return
        yield Finding(
            NOTICE,
            "no_steps",
            None,
            "No step has been taken: there is nothing to look at.",
            "Call doctor after some steps.",
            {"steps": 0},
        )
        return
    yield from counters.trust_region(whole, history)
    yield from counters.adaptive_damping(records, history)
    if last is not None:
        yield from counters.judged_damping(whole, history, last)
    yield from counters.intervals(records, history)
    for record in records:
        idle = counters.is_idle(record, records)
        if idle:
            yield from counters.idle(record)
        else:
            yield from counters.refreshes(record, lags.get(record["name"]))
        yield from counters.inversions(record)


def of_parameters(
    opt_state: Any, params: Any, records: dict[str, Any], learning_rate: float | None
) -> Iterator[Finding]:
    """Parameters that are not finite, and updates as long as they are."""
    size, step = float(optax.tree.norm(params)), last_update(opt_state, learning_rate)
    if not np.isfinite(size):
        yield Finding(
            ERROR,
            "parameters_not_finite",
            None,
            "The parameters are not finite: nothing can be learned from here on.",
            "Go back to a checkpoint; a lower learning rate or a larger damping.",
            {"norm": size},
        )
    elif step is not None and size > 0 and step > LONG_STEP * size:
        trust = next(iter(records.values()))["trust"]
        held = "nothing held it back" if trust in (None, 1.0) else f"trust {trust:.2g}"
        yield Finding(
            ERROR,
            "steps_explode",
            None,
            f"The last update ({step:.2g}) is longer than the parameters ({size:.2g}); "
            f"{held}.",
            "Set kl_clip, a lower learning rate, or a larger damping.",
            {"update": step, "parameters": size, "trust": trust},
        )


def last_update(opt_state: Any, learning_rate: float | None) -> float | None:
    """The norm of the last update, where the state knows it."""
    for name, field in (("AdaptedState", "step"), ("GuidedState", "velocity")):
        for state in find_states(opt_state, name):
            return float(optax.tree.norm(getattr(state, field)))
    rates = find_states(opt_state, "learning_rate")
    if learning_rate is None and len(rates) == 1:
        learning_rate = float(rates[0])
    for state in find_states(opt_state, "TraceState"):
        if learning_rate is not None:
            return abs(learning_rate) * float(optax.tree.norm(state.trace))
    return None
