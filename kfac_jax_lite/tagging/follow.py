"""Follows every axis of every variable through a jaxpr: where the examples are.

Shapes alone do not tell ``[time, batch, width]`` from ``[batch, time, width]`` if both
are equally long. One rule per primitive says which axes of its results are axes of its
operands; the results of a primitive without a rule have new axes.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal

from kfac_jax_lite.tagging.analysis import shape_of
from kfac_jax_lite.tagging.counting import Counts, count
from kfac_jax_lite.tagging.indices import (
    Axes,
    fresh,
    fresh_axes,
    reshaped,
    unify,
    unify_all,
)
from kfac_jax_lite.tagging.layers import Plan, scan_counts
from kfac_jax_lite.types import Jaxpr, JaxprEqn, Var

Followed = dict[Plan, dict[Var, Axes]]
Enter = Callable[[int, Jaxpr, Sequence[Axes]], list[Axes]]
Rule = Callable[[JaxprEqn, list[Axes], Enter], list[Axes]]
RULES: dict[str, Rule] = {}
# An entry of the result depends on the entries in its place.
ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy copy_p
cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min
mul name ne neg nextafter not or pcast polygamma population_count pow pvary real
reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n
sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin
sinh sqrt square stop_gradient sub tan tanh xor zeta
"""


def follow(
    jaxpr: Jaxpr, plan: Plan, inputs: Sequence[Axes], found: Followed
) -> list[Axes]:
    """Follows the axes through a jaxpr and those inside it.

    Args:
        jaxpr: The program.
        plan: Its plan, whose children are those of the jaxprs inside it.
        inputs: Axes of its inputs.
        found: Axes of every variable by plan, filled in here.

    Returns:
        Axes of its outputs.
    """
    axes = found.setdefault(plan, {})
    axes.update((v, fresh_axes(shape_of(v))) for v in jaxpr.constvars)
    axes.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Axes:
        known = None if isinstance(atom, Literal) else axes.get(atom)
        return fresh_axes(shape_of(atom)) if known is None else known

    counts: Counts = {}
    for index, eqn in enumerate(jaxpr.eqns):

        def enter(number: int, inner: Jaxpr, inputs: Sequence[Axes], at: int = index):
            plans = plan.children.get(at, ())
            own = plans[number] if number < len(plans) else Plan()
            return follow(inner, own, inputs, found)

        follow_one = RULES.get(eqn.primitive.name, unknown)
        operands = [read(atom) for atom in eqn.invars]
        results = follow_one(eqn, operands, enter)
        axes.update(zip(eqn.outvars, results, strict=True))
        if results:
            count(eqn, operands, results[0], counts)
    return [read(atom) for atom in jaxpr.outvars]


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some primitives, by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


def unknown(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Nothing is known of the results."""
    del axes, enter
    return [fresh_axes(shape_of(var)) for var in eqn.outvars]


@rule(*ELEMENTWISE.split())
def elementwise(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes of operands meet where they are as long as the result's."""
    del enter
    shape = shape_of(eqn.outvars[0])
    found = list(fresh_axes(shape))
    for atom, own in zip(eqn.invars, axes, strict=True):
        if len(own) == len(shape):
            for i, size in enumerate(shape_of(atom)):
                if size == shape[i]:
                    unify(found[i], own[i])
    return [tuple(found)]


@rule("optimization_barrier", "psum", "psum2", "psum_invariant", "pmax", "pmin",
      "ppermute")  # fmt: skip
def in_place(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Every result has the axes of the operand in its place.

    Without those summed over by number, as ``psum`` does under ``vmap``.

    Args:
        eqn: The equation.
        axes: Axes of its operands.
        enter: Not needed.

    Returns:
        Axes of its results.
    """
    del enter
    gone = eqn.params.get("axes", ())
    return [tuple(a for i, a in enumerate(own) if i not in gone) for own in axes]


@rule("transpose")
def transpose(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes in another order."""
    del enter
    return [tuple(axes[0][i] for i in eqn.params["permutation"])]


@rule("reshape", "squeeze", "expand_dims")
def reshape(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes merged and split."""
    del enter
    order = eqn.params.get("dimensions") if eqn.primitive.name == "reshape" else None
    before = axes[0] if order is None else tuple(axes[0][i] for i in order)
    return [reshaped(before, shape_of(eqn.outvars[0]))]


@rule("broadcast_in_dim")
def broadcast(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes among new ones; one of length one may be repeated."""
    del enter
    found = list(fresh_axes(shape_of(eqn.outvars[0])))
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    for i, place in enumerate(eqn.params["broadcast_dimensions"]):
        if before[i] == after[place]:
            found[place] = axes[0][i]
    return [tuple(found)]


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and",
      "reduce_or", "reduce_xor", "argmax", "argmin", "reduce")  # fmt: skip
def reduced(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Some axes go."""
    del enter
    gone = eqn.params["dimensions" if eqn.primitive.name == "reduce" else "axes"]
    kept = tuple(a for i, a in enumerate(axes[0]) if i not in gone)
    return [kept for _ in eqn.outvars]


def renewed(changed: Sequence[bool], axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes, but for new ones where they have changed."""
    triples = zip(changed, axes, shape, strict=True)
    return tuple(fresh(size) if new else a for new, a, size in triples)


@rule("slice", "dynamic_slice", "tile")
def whole(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """An axis of unchanged length is the whole axis."""
    del enter
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    changed = [old != new for old, new in zip(before, after, strict=True)]
    return [renewed(changed, axes[0], after)]


@rule("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul",
      "scatter-min", "scatter_min", "scatter-max", "scatter_max")  # fmt: skip
def written(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The operand's axes; where in it the updates go is not followed."""
    del eqn, enter
    return [axes[0]]


@rule("dynamic_update_slice")
def updated(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The operand's axes, and the update's where it is as long."""
    del enter
    operand, update = map(shape_of, eqn.invars[:2])
    for i, (size, own) in enumerate(zip(operand, update, strict=True)):
        if size == own:
            unify(axes[0][i], axes[1][i])
    return [axes[0]]


@rule("sort", "rev", "fft", "split", "top_k", "cumsum", "cumprod", "cummax", "cummin",
      "cumlogsumexp")  # fmt: skip
def along(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """All axes but those along which entries change places are the operand's."""
    del enter
    p, rank = eqn.params, len(axes[0])
    if eqn.primitive.name == "fft":
        moved = range(rank - len(p["fft_lengths"]), rank)
    else:
        moved = p.get("dimensions", [p.get("dimension", p.get("axis"))])
    still = eqn.primitive.name.startswith("cum")
    results = []
    for var, own in zip(eqn.outvars, axes * len(eqn.outvars), strict=False):
        sizes = zip(shape_of(eqn.invars[0]), shape_of(var), strict=True)
        places = [i in moved and not still for i in range(rank)]
        changed = [a or old != new for a, (old, new) in zip(places, sizes, strict=True)]
        results.append(renewed(changed, own, shape_of(var)))
    return results


@rule("stack")
def stacked(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The operands' axes and a new one."""
    del enter
    for other in axes[1:]:
        unify_all(axes[0], other)
    place, shape = eqn.params["axis"], shape_of(eqn.outvars[0])
    return [(*axes[0][:place], fresh(shape[place]), *axes[0][place:])]


@rule("unstack")
def unstacked(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """One axis goes."""
    del enter
    gone = eqn.params["axis"]
    return [tuple(a for i, a in enumerate(axes[0]) if i != gone) for _ in eqn.outvars]


@rule("pad")
def pad(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes that are padded are new."""
    del enter
    changed = [any(config) for config in eqn.params["padding_config"]]
    return [renewed(changed, axes[0], shape_of(eqn.outvars[0]))]


@rule("reduce_window_max", "reduce_window_sum", "reduce_window_min")
def pooled(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes that are pooled over are new."""
    del enter
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    windows = zip(eqn.params["window_dimensions"], before, after, strict=True)
    changed = [size > 1 or old != new for size, old, new in windows]
    return [renewed(changed, axes[0], after)]


@rule("concatenate")
def concatenate(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """All axes but one are those of every operand."""
    del enter
    out, along = shape_of(eqn.outvars[0]), eqn.params["dimension"]
    for other in axes[1:]:
        for i, (a, b) in enumerate(zip(axes[0], other, strict=True)):
            if i != along:
                unify(a, b)
    changed = [i == along and len(axes) > 1 for i in range(len(out))]
    return [renewed(changed, axes[0], out)]


@rule("dot_general")
def product(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Batch axes, then the free ones of either side; contracted ones meet."""
    del enter
    (lhs_in, rhs_in), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    left, right = axes
    for i, j in zip((*lhs_in, *lhs_batch), (*rhs_in, *rhs_batch), strict=True):
        unify(left[i], right[j])
    taken = (*lhs_in, *lhs_batch), (*rhs_in, *rhs_batch)
    free = [
        tuple(a for i, a in enumerate(side) if i not in used)
        for side, used in zip(axes, taken, strict=True)
    ]
    return [(*(left[i] for i in lhs_batch), *free[0], *free[1])]


@rule("conv_general_dilated")
def convolution(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The batch axis stays."""
    del enter
    dims = eqn.params["dimension_numbers"]
    found = list(fresh_axes(shape_of(eqn.outvars[0])))
    if eqn.params["batch_group_count"] == 1:
        found[dims.out_spec[0]] = axes[0][dims.lhs_spec[0]]
    return [tuple(found)]


@rule("gather")
def gather(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes of the indices, and among them those of the operand taken whole."""
    del enter
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = axes
    out = shape_of(eqn.outvars[0])
    batch = dims.operand_batching_dims
    for i, j in zip(batch, dims.start_indices_batching_dims, strict=True):
        unify(operand[i], indices[j])
    found, offsets = list(fresh_axes(out)), dims.offset_dims
    shared = [i for i in range(len(out)) if i not in offsets]
    for place, axis in zip(shared, indices[:-1], strict=True):
        found[place] = axis
    gone = (*dims.collapsed_slice_dims, *batch)
    rest = [i for i in range(len(sizes)) if i not in gone]
    before = shape_of(eqn.invars[0])
    for place, i in zip(offsets, rest, strict=True):
        if sizes[i] == before[i]:
            found[place] = operand[i]
    return [tuple(found)]


@rule("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint",
      "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")  # fmt: skip
def call(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """A program that runs once."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(eqn.params[name] for name in names if name in eqn.params)
    return enter(0, getattr(inner, "jaxpr", inner), axes)


@rule("scan")
def scan(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """What is carried stays; what is scanned over or stacked up has the steps first."""
    n_const, n_carry = scan_counts(eqn)
    first = n_const + n_carry
    steps = fresh(eqn.params["length"])
    for scanned in axes[first:]:
        unify(steps, scanned[0])
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    out = enter(0, body, [*axes[:first], *(scanned[1:] for scanned in axes[first:])])
    for before, after in zip(axes[n_const:first], out[:n_carry], strict=True):
        unify_all(before, after)
    return [*out[:n_carry], *((steps, *own) for own in out[n_carry:])]


@rule("cond")
def cond(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The results of all branches are alike."""
    branches = enumerate(eqn.params["branches"])
    first, *others = [enter(k, branch.jaxpr, axes[1:]) for k, branch in branches]
    for other in others:
        for one, two in zip(first, other, strict=True):
            unify_all(one, two)
    return first
