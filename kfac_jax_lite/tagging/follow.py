"""Follows every axis of every variable through a jaxpr: where the examples are.

Shapes alone do not tell ``[time, batch, width]`` from ``[batch, time, width]`` if both
are equally long. One rule per primitive says which axes of its results are axes of its
operands; the results of a primitive without a rule have new axes.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any

from jax.extend.core import Literal

from kfac_jax_lite.tagging.analysis import shape_of
from kfac_jax_lite.tagging.counting import Counts, count
from kfac_jax_lite.tagging.indices import (
    Axes,
    Axis,
    fresh,
    fresh_axes,
    reshaped,
    unify,
    unify_all,
)
from kfac_jax_lite.tagging.layers import (
    CALLS,
    CHECKPOINTS,
    CUSTOM_RULES,
    Plan,
    inside,
    scan_counts,
)
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
    found: dict[int, Axis] = {}
    for atom, own in zip(eqn.invars, axes, strict=True):
        if len(own) == len(shape):
            for i, size in enumerate(shape_of(atom)):
                if size == shape[i]:
                    unify(found.setdefault(i, own[i]), own[i])
    return [tuple(found.get(i) or fresh(size) for i, size in enumerate(shape))]


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
    return [without(own, gone) for own in axes]


def without(axes: Axes, gone: Container[Any]) -> Axes:
    """The axes but those at some places."""
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


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
      "reduce_or", "reduce_xor", "argmax", "argmin", "reduce", "unstack")  # fmt: skip
def reduced(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Some axes go."""
    del enter
    return [without(axes[0], named(eqn)) for _ in eqn.outvars]


def named(eqn: JaxprEqn) -> Sequence[int]:
    """The axes that an equation names, whosever integers they are."""
    names = ("dimensions", "axes", "dimension", "axis")
    found = next(eqn.params[name] for name in names if name in eqn.params)
    return [int(i) for i in (found if isinstance(found, Sequence) else (found,))]


def renewed(axes: Axes, before: Any, after: Any, moved: Container[int] = ()) -> Axes:
    """Axes of an operand as those of the result, but for new ones.

    Args:
        axes: Axes of the operand.
        before: The operand.
        after: The result, of as many axes. One that is as long is the operand's.
        moved: But for those along which entries have changed places.

    Returns:
        Axes of the result.
    """
    sizes = zip(axes, shape_of(before), shape_of(after), strict=True)
    return tuple(
        axis if old == new and i not in moved else fresh(new)
        for i, (axis, old, new) in enumerate(sizes)
    )


@rule("slice", "dynamic_slice", "tile", "cumsum", "cumprod", "cummax", "cummin",
      "cumlogsumexp")  # fmt: skip
def whole(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """An axis of unchanged length is the whole axis."""
    del enter
    return [renewed(axes[0], eqn.invars[0], eqn.outvars[0])]


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


@rule("sort", "rev", "fft", "split", "top_k")
def along(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """All axes but those along which entries change places are the operand's."""
    del enter
    if eqn.primitive.name == "fft":
        rank = len(axes[0])
        moved: Sequence[int] = range(rank - len(eqn.params["fft_lengths"]), rank)
    else:
        moved = named(eqn)
    pairs = zip(axes * len(eqn.outvars), eqn.outvars, strict=False)
    return [renewed(own, eqn.invars[0], var, moved) for own, var in pairs]


@rule("stack")
def stacked(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The operands' axes and a new one."""
    del enter
    for other in axes[1:]:
        unify_all(axes[0], other)
    place, shape = eqn.params["axis"], shape_of(eqn.outvars[0])
    return [(*axes[0][:place], fresh(shape[place]), *axes[0][place:])]


@rule("pad")
def pad(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes that are padded are new."""
    del enter
    padded = [i for i, by in enumerate(eqn.params["padding_config"]) if any(by)]
    return [renewed(axes[0], eqn.invars[0], eqn.outvars[0], padded)]


@rule("reduce_window_max", "reduce_window_sum", "reduce_window_min")
def windows(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes that are pooled over are new."""
    del enter
    pooled = [i for i, n in enumerate(eqn.params["window_dimensions"]) if n > 1]
    return [renewed(axes[0], eqn.invars[0], eqn.outvars[0], pooled)]


@rule("concatenate")
def concatenate(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """All axes but one are those of every operand."""
    del enter
    joined = named(eqn) if len(axes) > 1 else ()
    for other in axes[1:]:
        unify_all(without(axes[0], joined), without(other, joined))
    return [renewed(axes[0], eqn.invars[0], eqn.outvars[0], joined)]


@rule("dot_general")
def product(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Batch axes, then the free ones of either side; contracted ones meet."""
    del enter
    (lhs_in, rhs_in), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    left, right = axes
    for i, j in zip((*lhs_in, *lhs_batch), (*rhs_in, *rhs_batch), strict=True):
        unify(left[i], right[j])
    taken = (*lhs_in, *lhs_batch), (*rhs_in, *rhs_batch)
    free = [without(side, used) for side, used in zip(axes, taken, strict=True)]
    return [(*(left[i] for i in lhs_batch), *free[0], *free[1])]


@rule("conv_general_dilated")
def convolution(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The batch axis stays, and those in space along which the kernel has length 1."""
    del enter
    p, kernel = eqn.params, shape_of(eqn.invars[1])
    lhs, rhs, out = p["dimension_numbers"]
    found = list(fresh_axes(shape_of(eqn.outvars[0])))
    if p["batch_group_count"] == 1:
        found[out[0]] = axes[0][lhs[0]]
    steps = zip(p["window_strides"], p["lhs_dilation"], p["padding"], strict=True)
    for i, (stride, spread, padding) in enumerate(steps, 2):
        if kernel[rhs[i]] == stride == spread == 1 and not any(padding):
            found[out[i]] = axes[0][lhs[i]]
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


@rule(*CALLS, *CHECKPOINTS, *CUSTOM_RULES)
def call(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """A program that runs once."""
    return enter(0, inside(eqn).jaxpr, axes)


@rule("scan")
def scan(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """What is carried stays; what is scanned over or stacked up has the steps first."""
    n_const, n_carry = scan_counts(eqn)
    first = n_const + n_carry
    steps = fresh(eqn.params["length"])
    for scanned in axes[first:]:
        unify(steps, scanned[0])
    body = inside(eqn).jaxpr
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
