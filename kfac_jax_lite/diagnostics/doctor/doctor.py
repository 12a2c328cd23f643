"""``doctor``: says in plain words what is wrong with a run, a batch and its loss."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Literal

from kfac_jax_lite.core.likelihoods import (
    BESIDE,
    LIKELIHOODS,
    fisher_product,
    outputs_of,
    row_shape,
)
from kfac_jax_lite.core.pytree import find_states, is_key
from kfac_jax_lite.core.types import Jaxpr, JaxprEqn, LayerTag
from kfac_jax_lite.diagnostics.accuracy import Factors, kronecker_layers
from kfac_jax_lite.diagnostics.cost import layer_rows
from kfac_jax_lite.diagnostics.doctor import state as checks
from kfac_jax_lite.diagnostics.doctor.findings import (
    SEVERITIES,
    Finding,
    Findings,
    error,
    notice,
    warning,
)
from kfac_jax_lite.diagnostics.report import report
from kfac_jax_lite.kronecker import factors as forms
from kfac_jax_lite.kronecker.state import curvature
from kfac_jax_lite.statistics.fisher_passes import typed_like
from kfac_jax_lite.statistics.tagged_loss import TaggedLoss
from kfac_jax_lite.statistics.weights import MULTIPLE, direction, tail_of
from kfac_jax_lite.tagging.interpreter import Interpreter
from kfac_jax_lite.tagging.sites import inside
from kfac_jax_lite.tagging.trace import Trace, leading_axes

# An update as long as the parameters leaves nothing of them.
LONG_STEP = 1.0
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
# What leaves an array what it was, up to its shape and one number: a stored variance
# with epsilon added is still a stored variance; a mean over a batch is none.
CARRYING = frozenset(
    "add add_any broadcast_in_dim convert_element_type copy max min reshape slice "
    "squeeze expand_dims transpose stop_gradient sub mul div dynamic_slice "
    "optimization_barrier clamp".split()
)
ROOTS = frozenset(("sqrt", "rsqrt", "pow"))
PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))

# One function for all calls, so that a later one finds its program compiled.
COMPILED = jax.jit(TaggedLoss.value_and_grad, static_argnums=0)


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
    found = [*checks.fallback(tagged.layers), *checks.unbatched(tagged.layers)]
    factors = []
    for state in find_states(opt_state):
        if state.factors:
            own = [records[name] for name in sorted(state.factors)]
            guided = checks.guided_by(opt_state, state)
            found += checks.of_counters(own, checks.lags_of(state), history, guided)
            rule = checks.rule_of(own[0], guided)
            for one in kronecker_layers(tagged.layers, state):
                if one.refreshes:
                    one.inverse = None  # large, and not looked at
                    found += [*checks.damping(one, rule), *checks.degenerate(one)]
                    factors.append(one)
    if params is not None:
        found += of_parameters(opt_state, params, records, learning_rate)
    if batch is not None:
        found += of_batch(tagged, params, tuple(batch), key, records, factors)
    odd = {f.layer for f in found if f.kind == "unbatched_use"}  # the better reason
    found = [f for f in found if f.kind != "no_gradient" or f.layer not in odd]
    if any(finding.kind == "fisher_vanishes" for finding in found):
        found = [f for f in found if f.kind != "damping_too_large"]  # its consequence
    return Findings(sorted(found, key=lambda f: SEVERITIES.index(f.severity)))


def of_parameters(
    opt_state: Any, params: Any, records: dict[str, Any], learning_rate: float | None
) -> Iterator[Finding]:
    """Parameters that are not finite, and updates as long as they are."""
    size, step = float(optax.tree.norm(params)), last_update(opt_state, learning_rate)
    if not np.isfinite(size):
        yield error("parameters_not_finite", norm=size)
    elif step is not None and size > 0 and step > LONG_STEP * size:
        trust = next(iter(records.values()))["trust"]
        held = "nothing held it back" if trust in (None, 1.0) else f"trust {trust:.2g}"
        numbers = {"update": step, "parameters": size, "trust": trust}
        yield error("steps_explode", None, {"held": held}, **numbers)


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


def of_batch(
    tagged: TaggedLoss,
    params: Any,
    batch: tuple[Any, ...],
    key: Any,
    records: dict[str, Any],
    factors: Sequence[Factors],
) -> Iterator[Finding]:
    """What a batch shows of the loss, of the factors and of the marks."""
    traced = tagged.trace(params, batch, tagged.fisher != "empirical")
    value, _, fresh = gradient(tagged, params, batch, key)
    loss = float(value[0] if tagged.has_aux else value)
    summed = False
    if np.isfinite(loss):
        doubled = doubled_loss(tagged, params, batch, traced.num_examples)
        ratio = doubled / loss if doubled and loss else 1.0
        summed = ratio > DOUBLED
        if summed:
            text, words = "loss_is_a_sum/doubled", {"ratio": ratio}
            yield error(text, None, words, loss=loss, doubled=doubled)
        if tagged.fisher == "empirical" and factors:
            share = sampled_share(tagged, params, batch, key, fresh)
            gone = all(map(checks.is_flat, factors)) and abs(loss) < TINY_LOSS
            # Where the data is fitted (arXiv:1905.12558).
            if gone if share is None else share < VANISHED:
                numbers = {"loss": loss, "share_of_sampled": share}
                yield warning("fisher_vanishes", **numbers)
        rows = layer_rows(tagged, params, *batch)
        for one in factors:
            name = one.layer.name
            exact, seen = tagged.fisher == "exact", rows[name].statistics
            yield from too_few_rows(one, seen, exact, records[name])
            yield from changed(one, fresh[name], records[name]["since_refresh"])
    else:
        yield error("loss_not_finite", loss=loss)
    outputs = seen_outputs(tagged, traced, params, batch)
    for one in marks(outputs):
        if not (summed and one.kind == "loss_is_a_sum"):
            yield one
    yield from labels(outputs, batch, loss)
    yield from evaluation_mode(traced, params, batch)


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
    """The loss of a batch that holds every example twice; None if it cannot be told."""
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
    tagged: TaggedLoss, params: Any, batch: Sequence[Any], key: Any, fresh: Any
) -> float | None:
    """Trace of the empirical Fisher matrix over that of sampled labels, or None."""
    if key is None:
        return None
    try:
        model = dataclasses.replace(tagged, fisher="mc")
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


def too_few_rows(
    one: Factors, rows: int, exact: bool, record: dict[str, Any]
) -> Iterator[Finding]:
    """A factor that the rows seen cannot fill."""
    # An average that is still filling up is taken for what it is going to be.
    memory = one.memory if record["steps"] < checks.START else record["memory"] or 1.0
    held, shapes = rows * memory, (one.layer.a_shape, one.layer.g_shape)
    sides = list(zip("AG", one.forms, shapes, strict=True))
    # The exact Fisher matrix has a row for every output.
    for side, form, shape in sides[:1] if exact else sides:
        if form.matrix and held < shape[-1]:
            words = {"side": side, "held": held}
            numbers = {"rows": rows, "memory": memory, "size": shape[-1]}
            yield notice("too_few_rows", one.layer.name, words, **numbers)


def changed(one: Factors, fresh: Any, age: int) -> Iterator[Finding]:
    """A batch whose statistics are unlike the average."""
    layer = one.layer
    if one.refreshes < SETTLED:
        return
    whole = curvature(layer, fresh)
    if whole.a.shape != one.statistics.a.shape:
        return  # a mask hides a part of the layer
    old = (x.mean() for x in one.values)
    pairs = zip(traces(layer, whole), old, strict=True)
    a, g = (float(new.mean() / mean) if mean else 1.0 for new, mean in pairs)
    if not 1 / OTHER_INPUTS < a < OTHER_INPUTS:
        yield warning("other_inputs", layer.name, ratio=a, age=age)
    if not 1 / OTHER_GRADIENTS < g < OTHER_GRADIENTS and age >= OLD:
        yield warning("other_gradients", layer.name, ratio=g, age=age)


class Seen(NamedTuple):
    """A marked output and the loss's derivatives by it, on the host in float64.

    The loss ``L = w · mean_n ℓ(z_n)`` of ``N`` rows has
    ``∂L/∂z_n = w/N (E[t | z_n] − t_n)`` and ``∂²L/∂z² = w/N Λ(z)``. One product of the
    second derivative with a fixed vector is compared with every likelihood's ``Λ``.
    """

    likelihood: str  # of its mark
    number: int  # from 0 in program order
    alone: bool  # whether it is the only one
    value: np.ndarray  # z
    counts: np.ndarray  # which rows count
    terms: int  # how many
    slope: np.ndarray  # N ∂L/∂z
    bend: np.ndarray | None  # N ∂²L/∂z² v for a fixed v; None without forward mode
    fisher: dict[str, np.ndarray]  # Λ v by likelihood, weights of rows included
    given: np.ndarray | None  # the weight that the mark states

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
        slope, parts = jax.grad(tail), []
        for i, (output, own) in enumerate(zip(outputs, slope(values), strict=True)):
            v, bend = typed_like(output, direction, None), None
            if bent:
                tangents = [jnp.zeros_like(z) for z in values]
                tangents[i] = v
                bend = jax.jvp(slope, (values,), (tangents,))[1][i]
            names = [n for n in LIKELIHOODS if n == output.likelihood or v.ndim > 1]
            kinds = {name: output._replace(likelihood=name) for name in names}
            products = {n: typed_like(o, fisher_product, v) for n, o in kinds.items()}
            parts.append((output.value, output.mask, output.given, own, bend, products))
        return tuple(parts)

    operands = [*jax.tree.leaves(params), *jax.tree.leaves(tuple(batch))]
    names = [name for name in traced.marks if name not in BESIDE]
    try:
        arrays = jax.jit(lambda x: run(x, True))(operands)
    except TypeError:  # a rule for reverse mode only
        arrays = jax.jit(lambda x: run(x, False))(operands)
    found = enumerate(zip(names, jax.device_get(arrays), strict=True))
    return [record(name, i, len(names) == 1, *parts) for i, (name, parts) in found]


def record(
    likelihood: str,
    number: int,
    alone: bool,
    value: Any,
    mask: Any,
    given: Any,
    slope: Any,
    bend: Any,
    products: dict[str, Any],
) -> Seen:
    """What was computed of one output, times ``N``, zero in rows that do not count."""
    value = np.asarray(value, np.float64)
    rows = row_shape(value.shape, likelihood)
    counts = np.ones(rows, bool) if mask is None else mask.astype(bool)
    terms = max(int(counts.sum()), 1)

    def whole(x: Any, factor: Any) -> np.ndarray:
        flags = (counts * factor).reshape(rows + (1,) * (value.ndim - len(rows)))
        return np.asarray(x, np.float64) * flags

    given = None if given is None else np.asarray(given, np.float64)
    fisher = {
        name: whole(x, 1.0 if given is None else given) for name, x in products.items()
    }
    bend, slope = None if bend is None else whole(bend, terms), whole(slope, terms)
    facts = likelihood, number, alone, value, counts, terms
    return Seen(*facts, slope, bend, fisher, given)


def marks(outputs: Sequence[Seen]) -> Iterator[Finding]:
    """Marks that the loss contradicts, and weights that they do not state."""
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
    if total and seen.given is None:
        yield error("loss_is_a_sum", **numbers)
        return
    given = 1.0 if seen.given is None else float(seen.given.mean())
    said = "" if seen.given is None else " and weighs"
    words = {"mark": seen.likelihood, "said": said, "wanted": weight * given}
    yield warning("loss_is_scaled", None, words, **numbers)


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
    words = {"said": said, "mark": seen.likelihood}
    share = float("nan") if seen.bend is None else seen.fit(seen.likelihood)[1]
    numbers: dict[str, Any] = {"output": seen.number, "error": share}
    if are_probabilities(seen):
        yield error("wrong_mark/probabilities", None, words, **numbers)
        return
    others = [n for n in seen.fisher if seen.bend is not None and seen.fits(n)]
    if others:
        numbers |= {"likelihood": others[0], "weight": seen.fit(others[0])[0]}
        yield error("wrong_mark/other", None, words, **numbers)
        return
    size = np.linalg.norm(seen.slope)
    if seen.likelihood == "categorical" and size > 0 and seen.value.shape[-1] > 1:
        along = np.sum(seen.slope, -1) / math.sqrt(seen.value.shape[-1])
        shift = float(np.linalg.norm(along) / size)
        if shift > SHIFTED:
            numbers["shift"] = shift
            yield error("wrong_mark/softmax", None, words, **numbers)
            return
    if seen.bend is not None and np.linalg.norm(seen.bend) > 0 and of_rows(seen):
        yield notice("wrong_mark", None, words, **numbers)


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
    """Class labels that are no classes, where the loss is not finite."""
    if np.isfinite(loss):
        return
    for seen in (s for s in outputs if s.likelihood == "categorical"):
        classes = seen.value.shape[-1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tuple(batch)):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
                continue
            values = np.asarray(leaf)
            if values.shape != seen.counts.shape:
                continue
            bad = ((values < 0) | (values >= classes)) & seen.counts
            if bad.any():
                words = {"bad": bad.sum(), "all": bad.size, "last": classes - 1}
                name, low = f"args{jax.tree_util.keystr(path)}", int(values.min())
                numbers = {"argument": name, "least": low, "largest": int(values.max())}
                numbers["count"] = classes
                yield error("labels_out_of_range", None, words, **numbers)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a variable is made of; numbers are places among the loss's inputs."""

    inputs: frozenset[int] = frozenset()  # everything that it depends on
    trained: bool = False  # whether a parameter is among them
    stored: int | None = None  # what it is, up to its shape and a few numbers
    root: int | None = None  # the argument whose root it holds as a factor
    centred: int | None = None  # what was subtracted from activations
    scaled: frozenset[tuple[int, int]] = frozenset()  # (mean, variance) within it


class Reading:
    """One walk over a jaxpr, and what it found to standardise the inputs of layers."""

    def __init__(self) -> None:
        self.standardised: set[tuple[int, int]] = set()  # (mean, variance)

    def run(
        self, jaxpr: Jaxpr, origins: Sequence[Origin], constants: Any = None
    ) -> list[Origin]:
        """The origins of a jaxpr's outputs, given those of its inputs."""
        known = {**(constants or {}), **dict(zip(jaxpr.invars, origins, strict=True))}

        def origin(atom: Any) -> Origin:
            return Origin() if isinstance(atom, Literal) else known.get(atom, Origin())

        for eqn in jaxpr.eqns:
            found = self.equation(eqn, [origin(atom) for atom in eqn.invars])
            known.update(zip(eqn.outvars, found, strict=True))
        return [origin(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, origins: list[Origin]) -> Sequence[Origin]:
        """The origins of an equation's outputs."""
        body: Any = inside(eqn).jaxpr  # of a primitive that is not known: anything
        if isinstance(body, Jaxpr) and len(body.invars) == len(origins):
            found = self.run(body, origins)
            if len(found) == len(eqn.outvars) and eqn.primitive.name != "scan":
                return found
        return [self.combined(eqn.primitive.name, origins)] * len(eqn.outvars)

    def combined(self, name: str, origins: list[Origin]) -> Origin:
        """The origin of what a primitive makes of its operands."""
        union = Origin(
            frozenset().union(*(o.inputs for o in origins)),
            any(o.trained for o in origins),
            scaled=frozenset().union(*(o.scaled for o in origins)),
        )
        some = [o for o in origins if o.inputs]
        if name in PRODUCTS:
            weights = any(o.trained and not o.scaled for o in origins)
            self.standardised |= union.scaled if weights else frozenset()
            return union
        if name in ROOTS and len(some) == 1 and some[0].stored is not None:
            return dataclasses.replace(union, root=some[0].stored)
        if name not in CARRYING:
            return union
        if len(some) == 1:
            return some[0]
        return self.paired(name, union, some) if len(some) == 2 else union

    def paired(self, name: str, union: Origin, some: list[Origin]) -> Origin:
        """An elementwise operation of two arrays, neither of them a number."""
        left, right = some
        if name == "sub" and left.trained and right.stored is not None:
            return dataclasses.replace(union, centred=right.stored)
        if name not in ("mul", "div"):
            return union
        for one, other in ((left, right), (right, left)):
            if one.root is not None and other.centred is not None:
                pair = (other.centred, one.root)
                return dataclasses.replace(union, scaled=union.scaled | {pair})
            if one.root is not None and other.centred is None and not other.scaled:
                return dataclasses.replace(union, root=one.root)  # with the scale
            if one.centred is not None and other.root is None:
                return dataclasses.replace(union, centred=one.centred)
        return union


def evaluation_mode(
    found: Trace, params: Any, batch: Sequence[Any]
) -> Iterator[Finding]:
    """What evaluation mode leaves behind in the program of a loss.

    Batch norm standardises activations by *stored* averages: an argument is subtracted
    from what parameters have made, and the root of another one divides it, before a
    further layer. And dropout that is off leaves the PRNG key that came with the batch
    unread. Neither can be seen where the network takes no such argument.
    """
    num, data = len(jax.tree.leaves(params)), examples(found.num_examples, batch)
    flat, _ = jax.tree_util.tree_flatten_with_path(batch)
    leaves = [leaf for _, leaf in flat]
    values = [*leaves, *found.closed.consts]
    origins = [Origin(frozenset((i,)), trained=True) for i in range(num)]
    for i, value in enumerate(values):
        read = i < len(leaves) and data[i]
        stored = None if read or not is_array(value) else num + i
        origins.append(Origin(frozenset((num + i,)), stored=stored))
    jaxpr, reading = found.closed.jaxpr, Reading()
    middle = num + len(leaves)
    constants = dict(zip(jaxpr.constvars, origins[middle:], strict=True))
    loss = reading.run(jaxpr, origins[:middle], constants)[0]
    names = [f"args{jax.tree_util.keystr(path)}" for path, _ in flat]
    names += ["a constant"] * len(found.closed.consts)
    pairs = sorted((m - num, v - num) for m, v in reading.standardised)
    if pairs:
        mean, variance = (values[i] for i in pairs[0])
        new = not np.any(mean) and bool(np.all(np.asarray(variance) == 1))
        state = ", which are still 0 and 1, as at the start" if new else ""
        where = " and ".join(names[i] for i in pairs[0])
        numbers = {"places": len(pairs), "first": where}
        say = warning if new else notice
        yield say("stored_averages", None, {"state": state}, **numbers)
    for i, leaf in enumerate(leaves):
        if is_key(leaf) and num + i not in loss.inputs:
            yield notice("unused_key", argument=names[i])


def examples(terms: int, batch: Sequence[Any]) -> list[bool]:
    """Which leaves of a batch have as many rows as there are examples.

    Their number is the longest leading axis that divides the number of loss terms. As
    many channels would look alike: where all arrays of some argument have that many
    rows, only such arguments count.
    """
    sizes = [size for size in leading_axes(tuple(batch)) if size and terms % size == 0]
    size = max(sizes, default=None)
    found = []
    for argument in batch:
        leaves = jax.tree.leaves(argument)
        flags = [not is_key(x) and np.shape(x)[:1] == (size,) for x in leaves]
        wanted = [np.ndim(x) > 0 and not is_key(x) for x in leaves]
        found.append((flags, any(wanted) and flags == wanted))
    whole = any(alike for _, alike in found)
    return [f and (alike or not whole) for flags, alike in found for f in flags]


def is_array(value: Any) -> bool:
    """Whether it can be an average that a network has stored, one for every channel."""
    floating = jnp.issubdtype(getattr(value, "dtype", np.int32), jnp.floating)
    return floating and math.prod(np.shape(value)) > 1
