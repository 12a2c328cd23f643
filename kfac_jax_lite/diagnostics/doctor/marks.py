"""Does the loss have the likelihood that its marks say? What one batch tells.

The loss ``L = w · mean_n ℓ(z_n)`` of a marked output with ``N`` rows has
``∂L/∂z_n = w/N (E[t | z_n] − t_n)`` and ``∂²L/∂z² = w/N Λ(z)``. One product of the
second derivative with a fixed vector is compared with that of every likelihood's ``Λ``.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kfac_jax_lite.core.likelihoods import (
    BESIDE,
    LIKELIHOODS,
    fisher_product,
    outputs_of,
    row_shape,
)
from kfac_jax_lite.diagnostics.doctor.findings import ERROR, NOTICE, WARNING, Finding
from kfac_jax_lite.statistics.fisher_passes import typed_like
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss
from kfac_jax_lite.statistics.weights import MULTIPLE, direction, tail_of
from kfac_jax_lite.tagging.interpreter import Interpreter
from kfac_jax_lite.tagging.trace import Trace

# A squared error without its half, or its mean over a few outputs, is within it.
FAR = 3.0
# How near a weight comes to N, or without the half of a squared error to 2 N.
NEAR = 0.05
# Share of a gradient along (1, …, 1), to which a softmax is blind; a penalty on the
# logits leaves less.
SHIFTED = 0.3
# Rows of probabilities and of their logarithms add up to 1 within rounding.
NORMALISED = 1e-3
# Weights of rows that differ by less are one.
UNEVEN = 0.05


class Seen(NamedTuple):
    """A marked output and the loss's derivatives by it, on the host in float64.

    Attributes:
        likelihood: Its mark.
        number: Which output, from 0 in program order.
        alone: Whether it is the only one.
        value: ``z``.
        counts: Which rows count.
        terms: How many.
        slope: ``N ∂L/∂z``.
        bend: ``N ∂²L/∂z² v`` for a fixed ``v``; None if the loss has no forward mode.
        fisher: ``Λ v`` of every likelihood, weights of rows included.
        given: The weight that the mark states, or None.
    """

    likelihood: str
    number: int
    alone: bool
    value: np.ndarray
    counts: np.ndarray
    terms: int
    slope: np.ndarray
    bend: np.ndarray | None
    fisher: dict[str, np.ndarray]
    given: np.ndarray | None

    def fit(self, likelihood: str) -> tuple[float, float]:
        """``(w, error)`` of the multiple of ``Λ v`` that is nearest to ``bend``."""
        assert self.bend is not None
        wanted, length = self.fisher[likelihood], np.linalg.norm(self.bend)
        size = float(np.sum(wanted**2))
        if not size or not length:
            return 0.0, 1.0
        weight = float(np.sum(self.bend * wanted)) / size
        return weight, float(np.linalg.norm(self.bend - weight * wanted) / length)

    def fits(self, likelihood: str) -> bool:
        """Whether the loss has that likelihood, up to a positive weight."""
        weight, error = self.fit(likelihood)
        return error <= MULTIPLE and weight > 0


def seen_outputs(
    tagged: TaggedLoss, traced: Trace, params: Any, batch: Sequence[Any]
) -> list[Seen]:
    """Every marked output of a batch, with derivatives of the loss by it."""
    if tagged.curvature is not None or not traced.marks:
        return []
    jaxpr, consts = traced.closed.jaxpr, traced.closed.consts

    def run(operands: Sequence[Any], bent: bool) -> tuple[Any, ...]:
        interpreter = Interpreter(None, {}, None)
        _, marks = interpreter.run(traced.plan, jaxpr, consts, operands, {})
        outputs = outputs_of(traced.marks, marks)
        tail, values = tail_of(traced, operands), [o.value for o in outputs]
        slopes, bends = jax.grad(tail)(values), [None] * len(outputs)
        for i, output in enumerate(outputs if bent else ()):
            v = typed_like(output, direction, None)
            tangents = [
                v if j == i else jnp.zeros_like(z) for j, z in enumerate(values)
            ]
            bends[i] = jax.jvp(jax.grad(tail), (values,), (tangents,))[1][i]
        products = []
        for output in outputs:
            v = typed_like(output, direction, None)
            names = [n for n in LIKELIHOODS if n == output.likelihood or v.ndim > 1]
            kinds = [output._replace(likelihood=name) for name in names]
            made = [typed_like(kind, fisher_product, v) for kind in kinds]
            products.append(dict(zip(names, made, strict=True)))
        return outputs, slopes, bends, products

    operands = [*jax.tree.leaves(params), *jax.tree.leaves(tuple(batch))]
    names = [name for name in traced.marks if name not in BESIDE]
    try:
        arrays = jax.jit(lambda x: stripped(run(x, True)))(operands)
    except TypeError:  # a rule for reverse mode only
        arrays = jax.jit(lambda x: stripped(run(x, False)))(operands)
    found = zip(names, *jax.device_get(arrays), strict=True)
    alone = len(names) == 1
    return [record(i, alone, *one) for i, one in enumerate(found)]


def stripped(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays alone, as ``jit`` returns them."""
    outputs, *rest = found
    parts = [(o.value, o.mask, o.given) for o in outputs]
    return parts, *rest


def record(
    number: int,
    alone: bool,
    likelihood: str,
    parts: Any,
    slope: Any,
    bend: Any,
    products: dict[str, Any],
) -> Seen:
    """What was computed of one output, times ``N``, zero in rows that do not count."""
    value, mask, given = (None if x is None else np.asarray(x, float) for x in parts)
    assert value is not None
    rows = row_shape(value.shape, likelihood)
    counts = np.ones(rows, bool) if mask is None else mask.astype(bool)
    terms = max(int(counts.sum()), 1)

    def whole(x: Any, factor: Any = 1.0) -> np.ndarray:
        flags = (counts * factor).reshape(rows + (1,) * (value.ndim - len(rows)))
        return np.asarray(x, np.float64) * flags

    weights = 1.0 if given is None else given
    fisher = {name: whole(x, weights) for name, x in products.items()}
    bent = None if bend is None else whole(bend, terms)
    return Seen(
        likelihood, number, alone, value, counts, terms, whole(slope, terms), bent,
        fisher, given,
    )  # fmt: skip


def marks(outputs: Sequence[Seen]) -> Iterator[Finding]:
    """Marks that the loss contradicts, and weights that they do not state.

    Yields:
        ``wrong_mark``, ``loss_is_a_sum``, ``loss_is_scaled``.
    """
    for seen in outputs:
        if not all(np.all(np.isfinite(x)) for x in (seen.value, seen.slope)):
            continue
        if seen.bend is not None and seen.fits(seen.likelihood):
            if seen.alone:
                yield from scaled(seen)
        elif not is_logarithm(seen):
            yield from wrong(seen)


def scaled(seen: Seen) -> Iterator[Finding]:
    """A loss that is a multiple of the mean of the negative log-likelihoods."""
    weight, _ = seen.fit(seen.likelihood)
    if 1 / FAR <= weight <= FAR:
        return
    numbers = {"weight": weight, "terms": seen.terms}
    halves = (1, 2) if seen.likelihood == "normal" else (1,)
    total = any(abs(weight / (k * seen.terms) - 1) < NEAR for k in halves)
    said = "" if seen.given is None else " and weighs"
    wanted = weight if seen.given is None else weight * float(seen.given.mean())
    if total and seen.given is None:
        yield Finding(
            ERROR,
            "loss_is_a_sum",
            None,
            f"The loss is {weight:.4g} times the mean negative log-likelihood of its "
            f"{seen.terms} rows: their sum. Output factors of the empirical Fisher "
            "matrix are too large by the square of that, steps with the others too "
            "long by it, and damping depends on the batch size.",
            "Return the mean over the examples.",
            numbers,
        )
        return
    yield Finding(
        WARNING,
        "loss_is_scaled",
        None,
        f"The loss is {weight:.3g} times the mean negative log-likelihood that kfac."
        f'{seen.likelihood} names{said}: with fisher="exact" or "mc" the curvature '
        f'is too small by that factor, with "empirical" it is too large by it.',
        f"Pass weight={wanted:.3g} to kfac.{seen.likelihood}, or scale the loss.",
        numbers,
    )


def is_logarithm(seen: Seen) -> bool:
    """Log-probabilities marked as logits: their own softmax, and the same matrix.

    A loss ``−z_y`` of ``z = log_softmax(…)`` is linear in ``z``, which is right: what
    its second derivative misses, the gradient of ``log_softmax`` would have removed.
    """
    if seen.likelihood != "categorical":
        return False
    z = seen.value[seen.counts]
    return bool(np.all(np.abs(np.log(np.sum(np.exp(z), -1))) < NORMALISED))


def wrong(seen: Seen) -> Iterator[Finding]:
    """A mark whose second derivative is not that of the loss."""
    which = "" if seen.alone else f" number {seen.number + 1}"
    said = f"The output{which} marked with kfac.{seen.likelihood}"
    share = float("nan") if seen.bend is None else seen.fit(seen.likelihood)[1]
    numbers: dict[str, Any] = {"output": seen.number, "error": share}
    if are_probabilities(seen):
        yield Finding(
            ERROR,
            "wrong_mark",
            None,
            f"{said} holds probabilities: every entry is between 0 and 1, and the loss "
            "takes their logarithm. The mark wants what softmax or sigmoid is applied "
            "to, and samples its labels from softmax or sigmoid of what it marks.",
            f"kfac.{seen.likelihood}(logits), before softmax or sigmoid.",
            numbers,
        )
        return
    others = [n for n in seen.fisher if seen.bend is not None and seen.fits(n)]
    if others:
        weight = seen.fit(others[0])[0]
        yield Finding(
            ERROR,
            "wrong_mark",
            None,
            f"{said} is that of a {others[0]} distribution: wanted a second derivative "
            f"of the loss by it that is a multiple of the mark's Fisher information, "
            f"seen {weight:.3g} times that of kfac.{others[0]}.",
            f"kfac.{others[0]}, or the loss of a {seen.likelihood} distribution.",
            numbers | {"likelihood": others[0], "weight": weight},
        )
        return
    size = np.linalg.norm(seen.slope)
    if seen.likelihood == "categorical" and size > 0 and seen.value.shape[-1] > 1:
        along = np.sum(seen.slope, -1) / math.sqrt(seen.value.shape[-1])
        shift = float(np.linalg.norm(along) / size)
        if shift > SHIFTED:
            yield Finding(
                ERROR,
                "wrong_mark",
                None,
                f"{said} is not used through a softmax: wanted rows of the loss's "
                f"gradient that add up to 0, (p − y)/N, seen a share of {shift:.2g} of "
                "it along (1, …, 1).",
                "Mark the logits that the softmax of the loss is applied to; "
                "kfac.bernoulli for outputs that are independent.",
                numbers | {"shift": shift},
            )
            return
    if seen.bend is not None and not of_rows(seen):
        return
    if seen.bend is not None and np.linalg.norm(seen.bend) > 0:
        yield Finding(
            NOTICE,
            "wrong_mark",
            None,
            f"{said} does not have the loss's second derivative: the nearest multiple "
            f"of the mark's Fisher information is off by {share:.0%}. So it is meant "
            "for weighted rows, robust losses and policies.",
            "weight= of the mark for rows (or classes) that the loss weighs; else mark "
            "what the loss is a likelihood of.",
            numbers,
        )


def are_probabilities(seen: Seen) -> bool:
    """Whether an output holds probabilities of which the loss takes the logarithm."""
    z, slope = seen.value[seen.counts], seen.slope[seen.counts]
    if seen.likelihood == "normal" or not z.size or np.any((z < 0) | (z > 1)):
        return False
    if seen.likelihood == "categorical":
        return bool(np.all(np.abs(z.sum(-1) - 1) < NORMALISED))
    # ∂ℓ/∂p is −1/p where the label is 1, and 1/(1 − p) where it is 0.
    weights = np.where(slope < 0, -slope * z, slope * (1 - z))
    return bool(np.ptp(weights) < NORMALISED * weights.max())


def of_rows(seen: Seen) -> bool:
    """Whether the rows' second derivatives are worth a notice.

    Not where rows are multiples of the mark's of either sign: a policy's advantages,
    for which the mark's matrix is the one that is wanted.
    """
    assert seen.bend is not None
    wanted, bend = seen.fisher[seen.likelihood], seen.bend
    if not seen.counts.ndim:
        return True
    axes = tuple(range(seen.counts.ndim, wanted.ndim))
    size = np.sum(wanted**2, axes)
    ratio = np.sum(wanted * bend, axes) / np.where(size > 0, size, 1)
    rows = ratio.reshape(ratio.shape + (1,) * len(axes))
    rest = np.linalg.norm(bend - rows * wanted)
    multiples = rest <= MULTIPLE * np.linalg.norm(bend)
    return not (multiples and ratio.min() < -UNEVEN * ratio.max())


def labels(
    outputs: Sequence[Seen], batch: Sequence[Any], loss: float
) -> Iterator[Finding]:
    """Class labels that are no classes, where the loss is not finite.

    Yields:
        ``labels_out_of_range``.
    """
    if np.isfinite(loss):
        return
    for seen in outputs:
        if seen.likelihood != "categorical":
            continue
        classes = seen.value.shape[-1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(batch)):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
                continue
            values = np.asarray(leaf)
            if values.shape != seen.counts.shape:
                continue
            bad = ((values < 0) | (values >= classes)) & seen.counts
            if bad.any():
                low, high, name = int(values.min()), int(values.max()), keyed(path)
                yield Finding(
                    ERROR,
                    "labels_out_of_range",
                    None,
                    f"{bad.sum()} of {bad.size} entries of {name} are no class of the "
                    f"{classes} that kfac.categorical marks: wanted 0 to "
                    f"{classes - 1}, seen {low} to {high}. Such a loss is NaN.",
                    "Labels that count from 0, as many logits as classes; a mask for "
                    "padding, and a valid label there.",
                    {"argument": name, "least": low, "largest": high, "count": classes},
                )


def keyed(path: Any) -> str:
    """The name of a loss's argument."""
    return f"args{jax.tree_util.keystr(path)}"
