"""What a batch shows to be wrong: with the loss, and beside the averaged factors."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.types import LayerTag
from kfac_jax_lite.diagnostics.doctor import symptoms
from kfac_jax_lite.diagnostics.doctor.counters import START
from kfac_jax_lite.diagnostics.doctor.findings import ERROR, NOTICE, WARNING, Finding
from kfac_jax_lite.diagnostics.doctor.modes import examples
from kfac_jax_lite.diagnostics.doctor.symptoms import Factors
from kfac_jax_lite.diagnostics.flops import layer_rows
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.state import curvature
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss

# A loss that doubles with the batch is a sum; a mean stays as it is.
DOUBLED = 1.5
# Input factors are means over all rows of the inputs' squares: a batch of the same
# kind, at about the same parameters, does not give four times (half of) them.
OTHER_INPUTS = 4.0
# Output factors follow the gradients and fall with the loss; a decade is another phase.
OTHER_GRADIENTS, OLD = 10.0, 10
# Before, an average is mostly of the first steps, where everything changes fastest.
SETTLED = 3
# The empirical Fisher matrix over one of labels drawn from the model: 1 on average
# where the model is right about its own errors. And a loss that is next to zero.
VANISHED, TINY_LOSS = 0.01, 0.01


# One function for all calls, so that a later one finds its program compiled.
COMPILED = jax.jit(TaggedLoss.value_and_grad, static_argnums=0)


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


def examined(
    tagged: TaggedLoss, params: Any, batch: Sequence[Any], key: Any, terms: int
) -> Batch:
    """Takes loss and statistics of a batch, and what else can be asked of it."""
    value, _, fresh = gradient(tagged, params, batch, key)
    rows = layer_rows(tagged, params, *batch)
    return Batch(
        float(value[0] if tagged.has_aux else value),
        fresh,
        {name: found.statistics for name, found in rows.items()},
        doubled_loss(tagged, params, batch, terms),
        sampled_share(tagged, params, batch, key, fresh),
    )


def gradient(tagged: TaggedLoss, params: Any, batch: Sequence[Any], key: Any) -> Any:
    """What ``value_and_grad`` returns."""
    try:
        hash(tagged)
    except TypeError:  # a loss function that no cache can hold
        return jax.jit(tagged.value_and_grad)(params, *batch, key=key)
    return COMPILED(tagged, params, *batch, key=key)


def doubled_loss(
    tagged: TaggedLoss, params: Any, batch: Sequence[Any], terms: int
) -> float | None:
    """The loss of a batch that holds every example twice."""
    leaves, tree = jax.tree.flatten(batch)
    flags = examples(terms, batch)
    if not any(flags):
        return None
    pairs = zip(leaves, flags, strict=True)
    twice = [jnp.concatenate([x, x]) if flag else x for x, flag in pairs]
    try:
        value = jax.jit(tagged.loss_fn)(params, *jax.tree.unflatten(tree, twice))
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
        _, _, drawn = gradient(model, params, batch, key)
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
    a, g = forms.mean_diagonals(layer, whole.a, whole.g)
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
    form_a, form_g = forms.forms_of(layer)
    sides = [("A", form_a, layer.a_shape)]
    if tagged.fisher != "exact":  # which has a row for every output
        sides.append(("G", form_g, layer.g_shape))
    # An average that is still filling up is taken for what it is going to be.
    early = record["steps"] < START
    memory = one.memory if early else record["memory"] or 1.0
    held = rows * memory
    for side, form, shape in sides:
        if form.matrix and held < shape[-1]:
            yield Finding(
                NOTICE,
                "too_few_rows",
                layer.name,
                f"Factor {side} is {shape[-1]} × {shape[-1]} and has a rank of at most "
                f"{held:.0f}: a refresh sees {rows} rows, the average holds "
                f"{memory:.1f} refreshes.",
                "A larger batch or factor_decay, more frequent refreshes, less "
                "subsampling; else keep the damping well above zero.",
                {"rows": rows, "memory": memory, "size": shape[-1]},
            )


def changed(one: Factors, seen: Batch, record: dict[str, Any]) -> Iterator[Finding]:
    """A batch whose statistics are unlike the average."""
    layer, age = one.layer, record["since_refresh"]
    if one.refreshes < SETTLED:
        return
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
