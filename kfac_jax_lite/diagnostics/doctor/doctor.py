"""``doctor``: looks at a run and says in plain words what is wrong with it."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optax

from kfac_jax_lite.core.pytree import find_states
from kfac_jax_lite.diagnostics.accuracy import kronecker_layers
from kfac_jax_lite.diagnostics.doctor.batch import of_batch
from kfac_jax_lite.diagnostics.doctor.findings import (
    ERROR,
    NOTICE,
    WARNING,
    Finding,
    Findings,
)
from kfac_jax_lite.diagnostics.doctor.state import (
    damping,
    degenerate,
    fallback,
    guided_by,
    lags_of,
    of_counters,
    rule_of,
    unbatched,
)
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
    found, factors = [*fallback(tagged.layers), *unbatched(tagged.layers)], []
    for state in find_states(opt_state):
        if state.factors:
            own = [records[name] for name in sorted(state.factors)]
            guided = guided_by(opt_state, state)
            found += of_counters(own, lags_of(state), history, guided)
            rule = rule_of(own[0], guided)
            seen = [s for s in kronecker_layers(tagged.layers, state) if s.refreshes]
            for one in seen:
                found += [*damping(one, rule), *degenerate(one)]
            factors += seen
    if params is not None:
        found += of_parameters(opt_state, params, records, learning_rate)
    if batch is not None:
        found += of_batch(tagged, params, tuple(batch), key, records, factors)
    odd = {f.layer for f in found if f.kind == "unbatched_use"}  # the better reason
    found = [f for f in found if f.kind != "no_gradient" or f.layer not in odd]
    if any(finding.kind == "fisher_vanishes" for finding in found):
        found = [f for f in found if f.kind != "damping_too_large"]  # its consequence
    order = [ERROR, WARNING, NOTICE]
    return Findings(sorted(found, key=lambda f: order.index(f.severity)))


def of_parameters(
    opt_state: Any, params: Any, records: dict[str, Any], learning_rate: float | None
) -> Iterator[Finding]:
    """Parameters that are not finite, and updates as long as they are."""
    size, step = float(optax.tree.norm(params)), last_update(opt_state, learning_rate)
    if not np.isfinite(size):
        yield Finding.of(ERROR, "parameters_not_finite", norm=size)
    elif step is not None and size > 0 and step > LONG_STEP * size:
        trust = next(iter(records.values()))["trust"]
        held = "nothing held it back" if trust in (None, 1.0) else f"trust {trust:.2g}"
        numbers = {"update": step, "parameters": size, "trust": trust}
        yield Finding.of(ERROR, "steps_explode", None, {"held": held}, **numbers)


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
