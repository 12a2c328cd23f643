"""Follows every axis of every variable through a jaxpr: where the examples are.

Shapes alone do not tell ``[time, batch, width]`` from ``[batch, time, width]`` if both
are equally long. One rule per primitive says which axes of its results are axes of its
operands; the results of a primitive without a rule have new axes.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any

from jax.extend.core import Literal

from kfac_jax_lite.core.types import Jaxpr, JaxprEqn, Var
from kfac_jax_lite.tagging.analysis import shape_of
from kfac_jax_lite.tagging.counting import Counts, count
from kfac_jax_lite.tagging.indices import (
    Axes,
    Axis,
    fresh,
    fresh_axes,
    length,
    reshaped,
    unify,
    unify_all,
)
from kfac_jax_lite.tagging.sites import (
    CALLS,
    CHECKPOINTS,
    CUSTOM_RULES,
    Plan,
    inside,
    manual_axes,
    scan_counts,
    spec_axes,
)

Followed = dict[Plan, dict[Var, Axes]]
Enter = Callable[..., list[Axes]]
Rule = Callable[[JaxprEqn, list[Axes], Enter], list[Axes]]
RULES: dict[str, Rule] = {}
# An entry of the result depends on the entries in its place.
ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
cbrt ceil clamp clz complex conj convert_element_type copy copy_p
cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt
lt_to max min mul name ne neg nextafter not or pcast polygamma population_count pow
pvary random_fold_in random_gamma random_gamma_grad random_seed real reduce_precision
regularized_incomplete_beta rem reshard round rsqrt select_n sharding_constraint
shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
stop_gradient sub tan tanh threefry2x32 xor zeta
"""


def follow(
    jaxpr: Jaxpr, plan: Plan, inputs: Sequence[Axes], found: Followed
) -> list[Axes]:
    """Follows the axes through a jaxpr and those inside it."""
    axes = found.setdefault(plan, {})
    axes.update((v, fresh_axes(shape_of(v))) for v in jaxpr.constvars)
    axes.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Axes:
        known = None if isinstance(atom, Literal) else axes.get(atom)
        return fresh_axes(shape_of(atom)) if known is None else known

    counts: Counts = {}
    for index, eqn in enumerate(jaxpr.eqns):

        def enter(
            number: int,
            inner: Jaxpr,
            inputs: Sequence[Axes],
            devices: Axis = (),
            at: int = index,
        ):
            plans = plan.children.get(at, ())
            own = plans[number] if number < len(plans) else Plan()
            own.devices = (*plan.devices, *devices)
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
    result = tuple(found.get(i) or fresh(size) for i, size in enumerate(shape))
    return [result] * len(eqn.outvars)


@rule("optimization_barrier", "device_put", "psum", "psum2", "psum_invariant", "pmax",
      "pmin", "ppermute")  # fmt: skip
def in_place(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Every result has the axes of the operand in its place.

    Without those summed over by number, as ``psum`` does under ``vmap``.
    """
    del enter
    gone = eqn.params.get("axes", ())
    return [without(own, gone) for own in axes]


def without(axes: Axes, gone: Container[Any]) -> Axes:
    """The axes but those at some places."""
    return tuple(axis for i, axis in enumerate(axes) if i not in gone)


@rule("bitcast_convert_type")
def other_bits(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Narrower numbers have an axis more, wider ones an axis less, the last."""
    del enter
    shape = shape_of(eqn.outvars[0])
    own = axes[0][: len(shape)]
    return [(*own, *fresh_axes(shape[len(own) :]))]


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
    names = ("dimensions", "axes", "dimension", "axis", "reduction_dimension")
    found = next(eqn.params[name] for name in names if name in eqn.params)
    return [int(i) for i in (found if isinstance(found, Sequence) else (found,))]


def renewed(axes: Axes, before: Any, after: Any, moved: Container[int] = ()) -> Axes:
    """Axes of an operand as those of the result, but for new ones."""
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
      "scatter-min", "scatter_min", "scatter-max", "scatter_max", "scatter-sub",
      "scatter_sub")  # fmt: skip
def written(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The operand's axes: those of a batch, and of updates where they are as long."""
    del enter
    operand, indices, updates = axes
    dims = eqn.params["dimension_numbers"]
    batch = dims.operand_batching_dims
    for i, j in zip(batch, dims.scatter_indices_batching_dims, strict=True):
        unify(operand[i], indices[j])
    windows = dims.update_window_dims
    unify_all(without(updates, windows), indices[:-1])
    gone = (*dims.inserted_window_dims, *batch)
    rest = [i for i in range(len(operand)) if i not in gone]
    before, written = shape_of(eqn.invars[0]), shape_of(eqn.invars[2])
    for i, j in zip(rest, windows, strict=True):
        if before[i] == written[j]:
            unify(operand[i], updates[j])
    return [operand]


@rule("dynamic_update_slice")
def updated(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The operand's axes, and the update's where it is as long."""
    del enter
    operand, update = map(shape_of, eqn.invars[:2])
    for i, (size, own) in enumerate(zip(operand, update, strict=True)):
        if size == own:
            unify(axes[0][i], axes[1][i])
    return [axes[0]]


@rule("sort", "rev", "fft", "split", "top_k", "approx_top_k")
def along(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """All axes but those along which entries change places are the operand's."""
    del enter
    if eqn.primitive.name == "fft":
        rank = len(axes[0])
        moved: Sequence[int] = range(rank - len(eqn.params["fft_lengths"]), rank)
    else:
        moved = named(eqn)
    for other in axes[1:]:  # what is sorted along with the first
        unify_all(without(axes[0], moved), without(other, moved))
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


@rule("reduce_window", "reduce_window_max", "reduce_window_sum", "reduce_window_min",
      "select_and_gather_add", "select_and_scatter",
      "select_and_scatter_add")  # fmt: skip
def windows(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes that are pooled over are new."""
    del enter
    pooled = [i for i, n in enumerate(eqn.params["window_dimensions"]) if n > 1]
    return [renewed(axes[0], eqn.invars[0], out, pooled) for out in eqn.outvars]


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


@rule("ragged_dot_general")
def ragged_product(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """As of ``dot_general``: rows stay in place, whichever group they are in."""
    del enter
    p = eqn.params["ragged_dot_dimension_numbers"]
    (lhs_in, rhs_in), (lhs_batch, rhs_batch) = p.dot_dimension_numbers
    left, right = axes[:2]
    for i, j in zip((*lhs_in, *lhs_batch), (*rhs_in, *rhs_batch), strict=True):
        unify(left[i], right[j])
    free = [
        without(left, (*lhs_in, *lhs_batch)),
        without(right, (*rhs_in, *rhs_batch, *p.rhs_group_dimensions)),
    ]
    found = [*(left[i] for i in lhs_batch), *free[0], *free[1]]
    shape = shape_of(eqn.outvars[0])
    if len(found) < len(shape):  # rows are summed by group: a new axis in front
        found = [fresh(shape[0]), *found]
    return [tuple(found)]


@rule("conv_general_dilated")
def convolution(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The batch axis stays, and those in space along which the kernel has length 1.

    Of grouped features the groups stay: they may be the examples of a ``vmap``.
    """
    del enter
    p, kernel = eqn.params, shape_of(eqn.invars[1])
    lhs, rhs, out = p["dimension_numbers"]
    found = list(fresh_axes(shape_of(eqn.outvars[0])))
    features = found[out[1]] = axes[1][rhs[0]]
    by_batch, by_feature = p["batch_group_count"], p["feature_group_count"]
    groups, found[out[0]] = in_groups(axes[0][lhs[0]], by_batch)
    if by_feature > 1:
        groups, _ = in_groups(axes[0][lhs[1]], by_feature)
    unify(groups, in_groups(features, max(by_batch, by_feature))[0])
    steps = zip(p["window_strides"], p["lhs_dilation"], p["padding"], strict=True)
    for i, (stride, spread, padding) in enumerate(steps, 2):
        if kernel[rhs[i]] == stride == spread == 1 and not any(padding):
            found[out[i]] = axes[0][lhs[i]]
    return [tuple(found)]


def in_groups(axis: Axis, groups: int) -> Axes:
    """An axis as groups and what is inside each."""
    return reshaped((axis,), (groups, length(axis) // groups))


def batched(rank: int, *primitives: str) -> None:
    """Registers primitives that act on the last ``rank`` axes of their operands."""

    @rule(*primitives)
    def leading(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
        """Axes of the batch are those of the operands, all others are new."""
        del enter
        batch = axes[0][: len(axes[0]) - rank]
        for other in axes[1:]:
            for one, two in zip(batch, other, strict=False):
                unify(one, two)
        shapes = map(shape_of, eqn.outvars)
        return [(*batch, *fresh_axes(shape[len(batch) :])) for shape in shapes]


batched(0, "random_bits", "random_split", "random_unwrap")
batched(1, "lu_pivots_to_permutation", "random_wrap", "tridiagonal_solve")
batched(2, "cholesky", "eig", "eigh", "geqp3", "geqrf", "hessenberg", "lu", "ormqr",
        "householder_product", "qr", "schur", "svd", "tridiagonal")  # fmt: skip


@rule("rng_bit_generator")
def bits_of_keys(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The next keys, and numbers of every key."""
    del enter
    shape, batch = shape_of(eqn.outvars[1]), axes[0][:-1]
    return [axes[0], (*batch, *fresh_axes(shape[len(batch) :]))]


@rule("triangular_solve")
def solved(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The batch's axes and that of the right-hand sides stay."""
    del enter
    rank = len(axes[1])
    for one, two in zip(axes[0][:-2], axes[1][:-2], strict=True):
        unify(one, two)
    mixed = rank - 2 if eqn.params["left_side"] else rank - 1
    return [renewed(axes[1], eqn.invars[1], eqn.outvars[0], (mixed,))]


@rule("custom_linear_solve")
def solved_by_hand(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Those of the program that solves."""
    lengths, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
    first = lengths.matvec + lengths.vecmat
    own = axes[first : first + lengths.solve]
    right = axes[sum(lengths) :]
    return enter(0, jaxprs.solve.jaxpr, [*own, *right])


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


@rule("shard_map")
def shard_map(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """An axis that is sharded has the devices first, and a part on each of them."""
    p = eqn.params
    devices = {name: fresh(p["mesh"].shape[name]) for name in sorted(manual_axes(eqn))}

    def on(spec: Any, place: int) -> Axis:
        names = spec_axes(tuple(spec)[place : place + 1])
        return tuple(index for name in names for index in devices.get(name, ()))

    inputs = []
    for own, spec in zip(axes, p["in_specs"], strict=True):
        parts = []
        for place, axis in enumerate(own):
            outer = on(spec, place)
            unify(outer, axis)
            sizes = (length(outer), length(axis) // length(outer))
            parts.append(reshaped((axis,), sizes)[-1])
        inputs.append(tuple(parts))
    numbers = tuple(index for axis in devices.values() for index in axis)
    out = enter(0, inside(eqn).jaxpr, inputs, numbers)
    return [
        tuple((*on(spec, place), *axis) for place, axis in enumerate(own))
        for own, spec in zip(out, p["out_specs"], strict=True)
    ]


@rule("while")
def while_loop(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """What is carried stays."""
    first = eqn.params["cond_nconsts"]
    carried = axes[first + eqn.params["body_nconsts"] :]
    out = enter(0, eqn.params["body_jaxpr"].jaxpr, axes[first:])
    for before, after in zip(carried, out, strict=True):
        unify_all(before, after)
    return out


@rule("cond")
def cond(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """The results of all branches are alike."""
    branches = enumerate(eqn.params["branches"])
    first, *others = [enter(k, branch.jaxpr, axes[1:]) for k, branch in branches]
    for other in others:
        for one, two in zip(first, other, strict=True):
            unify_all(one, two)
    return first
