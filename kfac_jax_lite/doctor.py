"""``doctor``: looks at a run and says in plain words what is wrong with it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kfac_jax_lite import forms, symptoms
from kfac_jax_lite.factors.estimate import TaggedLoss
from kfac_jax_lite.factors.state import curvature
from kfac_jax_lite.flops import layer_rows
from kfac_jax_lite.symptoms import ERROR, NOTICE, WARNING, Factors, Finding
from kfac_jax_lite.telemetry import report
from kfac_jax_lite.tree import find_states
from kfac_jax_lite.types import LayerTag

# A loss that doubles with the batch is a sum; a mean stays as it is.
DOUBLED = 1.5
# Input factors are means over all rows of the inputs' squares: a batch of the same
# kind, at about the same parameters, does not give four times (half of) them.
OTHER_INPUTS = 4.0
# Output factors follow the gradients and fall with the loss; a decade is another phase.
OTHER_GRADIENTS, OLD = 10.0, 10
# The empirical Fisher matrix over one of labels drawn from the model: 1 on average
# where the model is right about its own errors. And a loss that is next to zero.
VANISHED, TINY_LOSS = 0.01, 0.01
# An update as long as the parameters leaves nothing of them.
LONG_STEP = 1.0


class Findings(list[Finding]):
    """Findings, the gravest first; ``print`` them."""

    def __str__(self) -> str:
        """One paragraph per complaint, with the layers that share it."""
        if not self:
            return "No findings."
        groups: dict[str, list[Finding]] = {}
        for finding in self:
            groups.setdefault(finding.kind, []).append(finding)
        return "\n".join(paragraph(group) for group in groups.values())


def paragraph(group: Sequence[Finding]) -> str:
    """The text of a complaint: the first in full, the others by their layers."""
    first = group[0]
    where = "" if first.layer is None else f" layer {first.layer}:"
    lines = [f"[{first.severity}] {first.kind}:{where} {first.message}"]
    if len(group) > 1:
        others = ", ".join(str(finding.layer) for finding in group[1:])
        lines.append(f"  the same in: {others}")
    numbers = ", ".join(f"{k} {number(v)}" for k, v in first.numbers.items())
    return "\n".join([*lines, f"  try: {first.advice}", f"  from: {numbers}"])


def number(value: Any) -> str:
    """Three digits of a float."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Batch(NamedTuple):
    """What a batch shows.

    Attributes:
        loss: The loss.
        statistics: Fresh statistics by layer name.
        rows: Rows of the statistics by layer name.
        doubled: The loss of the batch, twice over; None where it cannot be told.
        sampled: Trace of the empirical Fisher matrix over that of labels drawn from the
            model; None where it was not asked for.
    """

    loss: float
    statistics: dict[str, Any]
    rows: dict[str, int]
    doubled: float | None
    sampled: float | None


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

    From the state alone: ``no_steps``, ``skipped_batches``, ``steps_taken_back``,
    ``trust_region_saturated``, ``failed_inversions``, ``old_inverse``,
    ``never_refreshed``, ``stale_factors``, ``refresh_forgotten``,
    ``damping_below_rounding``, ``damping_too_small``, ``damping_too_large``,
    ``constant_inputs``, ``no_gradient``, ``dead_units``, ``dead_inputs``,
    ``diagonal_fallback``. With ``params``: ``parameters_not_finite`` and, where the
    last update is known, ``steps_explode``. With ``params`` and ``batch``:
    ``loss_not_finite``, ``loss_is_a_sum``, ``too_few_rows``, ``other_inputs``,
    ``other_gradients``, ``fisher_vanishes``. What each rests on is in its ``numbers``;
    thresholds and their reasons are in ``kfac_jax_lite.symptoms`` and here.

    Eigendecompositions of all factors on the host, in float64: not for every step. A
    single state knows its last step only; "always" needs ``history``.

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
    found = list(symptoms.fallback(tagged.layers))
    factors = []
    for state in find_states(opt_state):
        names = sorted(state.factors)
        if names:
            found += of_state(records[names[0]], [records[n] for n in names], history)
        factors += symptoms.factors_of(tagged.layers, state, records)
    for one in factors:
        found += [*symptoms.damping(one), *symptoms.degenerate(one)]
    if params is not None:
        found += of_parameters(opt_state, params, records, learning_rate)
    if batch is not None:
        seen = examined(tagged, params, batch, key)
        found += of_batch(tagged, seen, records, factors)
    if any(finding.kind == "fisher_vanishes" for finding in found):
        found = [f for f in found if f.kind != "damping_too_large"]  # its consequence
    order = [ERROR, WARNING, NOTICE]
    return Findings(sorted(found, key=lambda f: order.index(f.severity)))


def of_state(
    whole: dict[str, Any], records: Sequence[dict[str, Any]], history: Any
) -> Iterator[Finding]:
    """What the counters of one ``KFACState`` show."""
    yield from symptoms.skipped_batches(whole)
    if not whole["steps"]:
        yield Finding(
            NOTICE,
            "no_steps",
            None,
            "No step has been taken: there is nothing to look at.",
            "Call doctor after some steps.",
            {"steps": 0},
        )
        return
    yield from symptoms.trust_region(whole, history)
    for record in records:
        yield from symptoms.refreshes(record)
        yield from symptoms.inversions(record)


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
    """The norm of the last update, where the state knows it.

    Args:
        opt_state: Any optax state.
        learning_rate: ``η``, or None: of ``optax.inject_hyperparams``, if it is there.

    Returns:
        The norm, or None.
    """
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


def examined(tagged: TaggedLoss, params: Any, batch: Sequence[Any], key: Any) -> Batch:
    """Takes loss and statistics of a batch, and what else can be asked of it."""
    value, _, fresh = jax.jit(tagged.value_and_grad)(params, *batch, key=key)
    rows = layer_rows(tagged, params, *batch)
    return Batch(
        float(value[0] if tagged.has_aux else value),
        fresh,
        {name: found.statistics for name, found in rows.items()},
        doubled_loss(tagged, params, batch),
        sampled_share(tagged, params, batch, key, fresh),
    )


def doubled_loss(tagged: TaggedLoss, params: Any, batch: Sequence[Any]) -> float | None:
    """The loss of a batch that holds every example twice.

    Args:
        tagged: The tagged loss.
        params: The parameters.
        batch: Its arguments.

    Returns:
        The loss; None where the arguments share no leading axis, or where the loss does
        not take another batch size.
    """
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)}
    if len(sizes) != 1:
        return None
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]) if np.ndim(x) else x, batch)
    try:
        value = jax.jit(tagged.loss_fn)(params, *twice)
    except (TypeError, ValueError):  # it was written for one batch size
        return None
    return float(value[0] if tagged.has_aux else value)


def sampled_share(
    tagged: TaggedLoss,
    params: Any,
    batch: Sequence[Any],
    key: Any,
    fresh: dict[str, Any],
) -> float | None:
    """Trace of the empirical Fisher matrix over that of sampled labels, or None."""
    if tagged.fisher != "empirical" or key is None:
        return None
    model = dataclasses.replace(tagged, fisher="mc")
    try:
        _, _, drawn = jax.jit(model.value_and_grad)(params, *batch, key=key)
    except ValueError:  # no marked output to draw labels from
        return None
    total, part = (
        sum(
            float(np.sum(np.prod(traces(layer, curvature(layer, s[layer.name])), 0)))
            for layer in tagged.layers
            if layer.kronecker
        )
        for s in (drawn, fresh)
    )
    return part / total if total > 0 else None


def traces(layer: LayerTag, whole: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean diagonals of both factors of a Kronecker layer, ``[*blocks]``."""
    a = forms.mean_diagonal(whole.a, layer.a_form, layer.sizes[0])
    g = forms.mean_diagonal(whole.g, layer.g_form, layer.sizes[1])
    return np.asarray(a, np.float64), np.asarray(g, np.float64)


def of_batch(
    tagged: TaggedLoss, seen: Batch, records: dict[str, Any], factors: Sequence[Factors]
) -> Iterator[Finding]:
    """What a batch shows of the loss and of the factors."""
    if not np.isfinite(seen.loss):
        yield Finding(
            ERROR,
            "loss_not_finite",
            None,
            "The loss of this batch is not finite.",
            "Look for NaN in the data and in the parameters.",
            {"loss": seen.loss},
        )
        return
    ratio = seen.doubled / seen.loss if seen.doubled and seen.loss else 1.0
    if ratio > DOUBLED:
        yield Finding(
            ERROR,
            "loss_is_a_sum",
            None,
            f"With every example twice the loss is {ratio:.2f} times as large: it is a "
            "sum over the batch. Output factors are then too large by the square of "
            "the number of examples, and damping depends on the batch size.",
            "Return the mean over the examples.",
            {"loss": seen.loss, "doubled": seen.doubled},
        )
    yield from vanishing(tagged, seen, factors)
    for one in factors:
        yield from too_few_rows(tagged, one, seen, records[one.layer.name])
        yield from changed(one, seen, records[one.layer.name])


def vanishing(
    tagged: TaggedLoss, seen: Batch, factors: Sequence[Factors]
) -> Iterator[Finding]:
    """The empirical Fisher matrix where the data is fitted (arXiv:1905.12558)."""
    if tagged.fisher != "empirical" or not factors:
        return
    kinds = [[f.kind for f in symptoms.damping(one)] for one in factors]
    flat = all("damping_too_large" in found for found in kinds)
    gone = flat and abs(seen.loss) < TINY_LOSS
    if seen.sampled is not None:
        gone = seen.sampled < VANISHED
    if gone:
        yield Finding(
            WARNING,
            "fisher_vanishes",
            None,
            f"The loss of this batch is {seen.loss:.2g}: the examples are fitted, "
            "their gradients vanish and the empirical Fisher matrix with them. It no "
            "longer says anything about the curvature.",
            'tag(…, fisher="mc") or fisher="exact", which do not look at the labels.',
            {"loss": seen.loss, "share_of_sampled": seen.sampled},
        )


def too_few_rows(
    tagged: TaggedLoss, one: Factors, seen: Batch, record: dict[str, Any]
) -> Iterator[Finding]:
    """A factor that the rows seen cannot fill."""
    layer, rows = one.layer, seen.rows[one.layer.name]
    sides = [("A", layer.a_form, layer.a_shape)]
    if tagged.fisher != "exact":  # which has a row for every output
        sides.append(("G", layer.g_form, layer.g_shape))
    held = rows * (record["memory"] or 1.0)
    for side, form, shape in sides:
        if form != forms.DIAGONAL and held < shape[-1]:
            yield Finding(
                NOTICE,
                "too_few_rows",
                layer.name,
                f"Factor {side} is {shape[-1]} × {shape[-1]} and has a rank of at most "
                f"{held:.0f}: a refresh sees {rows} rows, the average holds "
                f"{record['memory'] or 1.0:.1f} refreshes.",
                "A larger batch or factor_decay, more frequent refreshes, less "
                "subsampling; else keep the damping well above zero.",
                {"rows": rows, "memory": record["memory"], "size": shape[-1]},
            )


def changed(one: Factors, seen: Batch, record: dict[str, Any]) -> Iterator[Finding]:
    """A batch whose statistics are unlike the average."""
    layer, age = one.layer, record["since_refresh"]
    whole = curvature(layer, seen.statistics[layer.name])
    if whole.a.shape != one.statistics.a.shape:
        return  # a mask hides a part of the layer
    fresh = traces(layer, whole)
    pairs = zip(fresh, (one.a.mean(-1), one.g.mean(-1)), strict=True)
    a, g = (float(new.mean() / old.mean()) if old.mean() else 1.0 for new, old in pairs)
    if not 1 / OTHER_INPUTS < a < OTHER_INPUTS:
        yield Finding(
            WARNING,
            "other_inputs",
            layer.name,
            f"This batch's inputs have {a:.2g} times the mean square of those that "
            f"the factor averages (last refresh {age} steps ago).",
            "Take statistics in training mode and from the data that is trained on, "
            "with the same preprocessing; refresh more often.",
            {"ratio": a, "age": age},
        )
    if not 1 / OTHER_GRADIENTS < g < OTHER_GRADIENTS and age >= OLD:
        yield Finding(
            WARNING,
            "other_gradients",
            layer.name,
            f"This batch's output factor is {g:.2g} times the average one, which was "
            f"refreshed {age} steps ago: it is of another phase of the training.",
            "A shorter refresh interval.",
            {"ratio": g, "age": age},
        )
