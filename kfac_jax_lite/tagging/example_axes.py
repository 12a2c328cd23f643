"""Follows every axis of every variable through a jaxpr: where the examples are.

Shapes alone do not tell ``[time, batch, width]`` from ``[batch, time, width]`` if both
are equally long. One rule per primitive says which axes of its results are axes of its
operands; the results of a primitive without a rule have new axes.

An axis is a product of elementary indices, so that reshapes can be followed: one that
was flattened from examples and positions has two, the slower one first. Two axes that
meet elementwise have the same indices: whatever is learnt of one (that it splits into
two, say) then holds of the other.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Literal

from kfac_jax_lite.core.likelihoods import BESIDE, row_shape
from kfac_jax_lite.core.parameter_views import Shape
from kfac_jax_lite.core.pytree import is_raw_key
from kfac_jax_lite.core.types import Jaxpr, JaxprEqn, Var
from kfac_jax_lite.tagging.analysis import Walk, shape_of
from kfac_jax_lite.tagging.sites import (
    CALLS,
    CHECKPOINTS,
    CUSTOM_RULES,
    ConvGeometry,
    DenseGeometry,
    EmbeddingGeometry,
    Geometry,
    Plan,
    RaggedGeometry,
    Site,
    inside,
    manual_axes,
    scan_counts,
    spec_axes,
)


@dataclasses.dataclass(eq=False)
class Index:
    """An elementary index: how many values it takes, and what it turned out to be.

    Attributes:
        size: Number of values.
        parts: The indices it was found to be the product of (or equal to), if any.
        number: Of two that are equal the older one stays.
    """

    size: int
    parts: "Axis | None" = None
    number: int = dataclasses.field(default_factory=itertools.count().__next__)


# The indices an axis is the product of, slowest first; none for one of length 0 or 1.
Axis = tuple[Index, ...]
Axes = tuple[Axis, ...]


def fresh(size: int) -> Axis:
    """An axis of which nothing is known."""
    return (Index(size),) if size > 1 else ()


def fresh_axes(shape: Iterable[int]) -> Axes:
    """Axes of a value of which nothing is known."""
    return tuple(map(fresh, shape))


def length(axis: Axis) -> int:
    """How many values an axis takes."""
    return math.prod(index.size for index in axis)


def settled(axis: Iterable[Index]) -> Axis:
    """Indices in the terms of what they are known to be made of."""
    found: list[Index] = []
    left = [*axis][::-1]
    while left:
        index = left.pop()
        if index.parts is None:
            found.append(index)
        else:
            left += index.parts[::-1]
    return tuple(found)


def unify(first: Axis, second: Axis) -> None:
    """Notes that two axes of one length run over the same indices.

    They are matched from the slowest on, as far as their sizes allow.
    """
    left, right = settled(first), settled(second)
    if not left or not right:
        return
    a, b = left[0], right[0]
    if a is b:
        return unify(left[1:], right[1:])
    small, large = sorted((a, b), key=lambda index: (index.size, index.number))
    if large.size % small.size:
        return
    large.parts = (small, *fresh(large.size // small.size))
    unify(left, right)


def unify_all(first: Axes, second: Axes) -> None:
    """The same of all axes of two values of one shape."""
    for a, b in zip(first, second, strict=True):
        unify(a, b)


def reshaped(axes: Axes, shape: Shape) -> Axes:
    """Axes after a reshape; from where it cuts across indices on they are new."""
    left = settled(index for axis in axes for index in axis)
    found: list[Axis] = []
    for i, size in enumerate(shape):
        part = slowest(left, size)
        if part is None:
            return (*found, *fresh_axes(shape[i:]))
        axis, left = part
        found.append(axis)
    return tuple(found)


def slowest(indices: Axis, size: int) -> tuple[Axis, Axis] | None:
    """The slowest indices with ``size`` values in all, and the rest; None: cut."""
    if size <= 1:
        return (), indices
    if not indices:
        return None
    index, rest = indices[0], indices[1:]
    if size % index.size == 0:
        found = slowest(rest, size // index.size)
        return found and ((index, *found[0]), found[1])
    if index.size % size == 0:
        index.parts = (Index(size), Index(index.size // size))
        return slowest(settled(indices), size)
    return None


# By variable: the axis that each column counts along, if any; () is "never true".
Counts = dict[Var, tuple[Axis | None, ...]]
SAME = ("broadcast_in_dim", "reshape", "convert_element_type", "copy")


def count(eqn: JaxprEqn, axes: list[Axes], result: Axes, counts: Counts) -> None:
    """Notes whether the result of an equation counts, and what a gather picks."""
    name, out = eqn.primitive.name, eqn.outvars[0]
    known = [None if isinstance(a, Literal) else counts.get(a) for a in eqn.invars]
    if name == "iota":
        counts[out] = (result[eqn.params["dimension"]],)
    elif name in SAME and known[0]:
        counts[out] = known[0]
    elif name == "lt" and known[0] and is_zero(eqn.invars[1]):
        counts[out] = ()
    elif name == "select_n" and known[0] == () and known[1]:
        counts[out] = known[1]
    elif name == "concatenate" and any(known) and in_columns(eqn):
        counts[out] = tuple(column[0] if column else None for column in known)
    elif name == "gather" and known[1]:
        pick(eqn, axes[0], known[1])


def is_zero(atom: object) -> bool:
    """Whether an atom is the number 0."""
    return isinstance(atom, Literal) and bool(atom.val == 0)


def in_columns(eqn: JaxprEqn) -> bool:
    """Whether single columns are put side by side."""
    shapes = [shape_of(atom) for atom in eqn.invars]
    last = eqn.params["dimension"] == len(shapes[0]) - 1
    return last and all(shape[-1] == 1 for shape in shapes)


def pick(eqn: JaxprEqn, operand: Axes, columns: tuple[Axis | None, ...]) -> None:
    """An axis that is picked by its own numbers, from the first to the last, stays."""
    shape, starts = shape_of(eqn.invars[0]), eqn.params["dimension_numbers"]
    for column, axis in zip(columns, starts.start_index_map, strict=False):
        if column is not None and shape[axis] == length(column):
            unify(operand[axis], column)


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


def place_examples(
    walk: Walk,
    plan: Plan,
    jaxpr: Jaxpr,
    num_leaves: int,
    num_examples: int,
    num_terms: Sequence[int],
) -> tuple[Followed, "dict[Place, Examples]"]:
    """Sets ``positions`` of every candidate site; rows get the examples first."""
    found: Followed = {}
    follow(jaxpr, plan, [fresh_axes(shape_of(v)) for v in jaxpr.invars], found)
    given = [found[plan][v] for v in jaxpr.invars[num_leaves:] if has_rows(v.aval)]
    closed = [found[plan][v] for v in jaxpr.constvars if has_rows(v.aval)]
    batch = tuple(axes[0] for axes in (*given, *closed))
    terms = marked_terms(walk, found)
    if not walk.marks:
        first = numbering(given, num_examples) or numbering(closed, num_examples)
        for other in first[1:]:
            unify(first[0], other)
        terms = first[:1]
    # Where the terms are not known, the uses of one parameter agree on their order.
    orders: dict[int, Axis] = {}
    examples: dict[Place, Examples] = {}
    for site in walk.sites:
        n = terms_of(site, num_terms, num_examples)
        chosen = [terms[k] for k in sorted(site.marks or range(len(terms)))]
        chosen = [axis for axis in chosen if length(axis) == n]
        for other in chosen[1:]:
            unify(chosen[0], other)
        known = Examples(chosen[0] if chosen else (), batch, n)
        examples[place_of(site)] = known
        own = known.terms or orders.get(site.primary.leaf, ())
        before = row_axes(walk, site, found)
        site.positions = positions(site, before, here(known._replace(terms=own), site))
        axes = row_axes(walk, site, found)  # in the order that the rows have now
        if not own and site.positions is not None:
            orders[site.primary.leaf] = leading(axes or (), n)
        if isinstance(site.geometry, RaggedGeometry) and site.positions != 1:
            site.positions = None  # an example's rows are of several groups
        site.places = has_places(walk, site)
        if site.positions is None and site.kind == "scale_shift":
            site.positions = by_sequence(site.geometry.rows, axes, here(known, site))
    apart_on_devices(walk.sites)
    return found, examples


def apart_on_devices(sites: list[Site]) -> None:
    """Examples of several devices cannot be added up over several uses of a layer."""
    uses: dict[int, int] = {}
    for site in sites:
        leaf = site.primary.leaf
        uses[leaf] = uses.get(leaf, 0) + site.repeat
    for site in sites:
        if site.devices > 1 and uses[site.primary.leaf] > 1:
            site.positions = None


def terms_of(site: Site, num_terms: Sequence[int], num_examples: int) -> int:
    """``N`` of the outputs that depend on a site; of the first where they differ."""
    numbers = {num_terms[k] for k in site.marks}
    return numbers.pop() if len(numbers) == 1 else num_examples


# A plan, an equation's number and that of its result: what stands there.
Place = tuple[Plan, int, int]


def place_of(site: Site) -> Place:
    """Where a site stands."""
    plan, index = site.place  # type: ignore[misc]
    return plan, index, site.output


class Examples(NamedTuple):
    """What is known of the examples.

    Attributes:
        terms: The indices that number the terms of the loss, if it can be said.
        batch: First axes of the arguments and of what the loss closes over.
        num_examples: ``N``.
    """

    terms: Axis
    batch: Axes
    num_examples: int


def numbering(arguments: list[Axes], size: int) -> list[Axis]:
    """What numbers ``size`` terms, of arguments.

    First axes; else several, where all arguments that have so many agree about them
    (labels and what a convolution over time has seen do not).
    """
    first = [axes[0] for axes in arguments if length(axes[0]) == size]
    several = dict.fromkeys(settled(leading(axes, size)) for axes in arguments)
    fitting = [indices for indices in several if length(indices) == size]
    return first or (fitting if len(fitting) == 1 else [])


def leading(axes: Axes, size: int) -> Axis:
    """The slowest indices that take ``size`` values in all."""
    found: Axis = ()
    for index in (index for axis in axes for index in axis):
        if length(found) < size:
            found = (*found, index)
    return found


def has_rows(aval: Any) -> bool:
    """Whether an argument may have examples along its first axis (a key has not)."""
    return bool(aval.shape) and not is_raw_key(aval)


def marked_terms(walk: Walk, found: Followed) -> list[Axis]:
    """The indices that number the terms of every marked output, in program order."""
    terms: list[Axis] = []
    where = {
        id(walk.scopes[plan].jaxpr.eqns[index]): (plan, index)
        for plan in found
        for index in plan.marks
    }
    for mark in walk.marks:
        if mark.name in BESIDE:
            continue
        if id(mark.eqn) not in where:  # inside what is not followed
            terms.append(())
            continue
        plan, index = where[id(mark.eqn)]
        (var,) = walk.scopes[plan].jaxpr.eqns[index].outvars
        own = found[plan][var][: len(row_shape(shape_of(var), mark.name))]
        terms.append(tuple(index for axis in own for index in axis))
    return terms


def row_axes(walk: Walk, site: Site, found: Followed) -> Axes | None:
    """What is known of the axes of a site's rows."""
    plan, index = site.place  # type: ignore[misc]
    var: Any = walk.scopes[plan].jaxpr.eqns[index].outvars[site.output]
    axes, order = found.get(plan, {}).get(var), row_order(site.geometry)
    if axes is None or any(i >= len(axes) for i in order):
        return None
    return tuple(settled(axes[i]) for i in order)


def row_order(geometry: Geometry) -> Shape:
    """The axes of a site's output that are its rows, in their order."""
    if isinstance(geometry, ConvGeometry):
        return (geometry.out_spec[0], *geometry.out_spec[2:])
    if isinstance(geometry, DenseGeometry | EmbeddingGeometry):
        first = block_axes(geometry)
        return geometry.output_order[first : first + len(geometry.rows)]
    return geometry.order[: len(geometry.rows)]


def here(known: "Examples", site: Site) -> "Examples":
    """What is known of the examples of one device, where a site is run by several."""
    plan, _ = site.place  # type: ignore[misc]
    gone = settled(plan.devices)
    terms = tuple(index for index in settled(known.terms) if index not in gone)
    n = known.num_examples // site.devices
    if site.devices == 1 or (known.terms and length(terms) != n):
        return known
    batch = tuple(
        tuple(i for i in settled(axis) if i not in gone) for axis in known.batch
    )
    return Examples(terms, batch, n)


def block_axes(geometry: DenseGeometry | EmbeddingGeometry) -> int:
    """How many axes of a site's output number its blocks."""
    return 0 if isinstance(geometry, RaggedGeometry) else len(geometry.blocks)


def has_places(walk: Walk, site: Site) -> bool:
    """Whether rows are places of an expert that examples are sent to, some left empty.

    They hold data and there are matrices for every block, but examples have no axis.
    """
    plan, _ = site.place  # type: ignore[misc]
    geometry = site.geometry
    blocks = isinstance(geometry, DenseGeometry) and geometry.blocks
    if not blocks or site.positions is not None or isinstance(geometry, RaggedGeometry):
        return False
    return bool(walk.scopes[plan].dependencies(site.inputs[:1]) & walk.data_bit)


def positions(site: Site, axes: Axes | None, known: Examples) -> int | None:
    """How many rows belong to one term; the rows are put in order if need be.

    Of terms that nothing is known of, the shape must tell.
    """
    n, terms = known.num_examples, settled(known.terms)
    seen = [index for axis in axes or () for index in axis]
    if not terms:
        return positions_per_example(site.geometry.rows, n)
    if axes is None or any(seen.count(index) > 1 for index in terms):
        return None
    heads = {k: axis[0] for k, axis in enumerate(axes) if axis and within(axis, terms)}
    first = sorted(heads, key=lambda k: terms.index(heads[k]))
    order = (*first, *(k for k in range(len(axes)) if k not in heads))
    moved = reordered(site.geometry, order)
    if moved is not None:
        site.geometry, axes = moved, tuple(axes[k] for k in order)
    slowest = tuple(index for axis in axes for index in axis)[: len(terms)]
    return math.prod(site.geometry.rows) // n if slowest == terms else None


def by_sequence(rows: Shape, axes: Axes | None, known: Examples) -> int | None:
    """How many rows belong to an example that has several terms of the loss.

    So it is for a parameter that is added to whole sequences.
    """
    terms, n = settled(known.terms), known.num_examples
    if not axes or not axes[0] or axes[0] not in map(settled, known.batch):
        return None
    first = axes[0]
    # Rows that might be a term each are not grouped where nothing is known of terms.
    may_be_terms = n in itertools.accumulate(rows, operator.mul)
    slowest = first == terms[: len(first)] if terms else not may_be_terms
    rest = any(index in terms for axis in axes[1:] for index in axis)
    whole = slowest and not rest and rows[0] < n and n % rows[0] == 0
    return math.prod(rows[1:]) if whole else None


def within(axis: Axis, terms: Axis) -> bool:
    """Whether an axis numbers terms only."""
    return all(index in terms for index in axis)


def reordered(geometry: Geometry, order: Shape) -> Geometry | None:
    """The geometry with the axes of its rows in another order; None: it cannot."""
    if isinstance(geometry, ConvGeometry | RaggedGeometry):
        return None
    n = len(geometry.rows)

    def moved(axes: Shape, first: int = 0) -> Shape:
        rows = axes[first : first + n]
        return (*axes[:first], *(rows[k] for k in order), *axes[first + n :])

    rows = moved(geometry.rows)
    if isinstance(geometry, DenseGeometry | EmbeddingGeometry):
        first = block_axes(geometry)
        output = moved(geometry.output_order, first)
        if isinstance(geometry, DenseGeometry):
            own = 0 if geometry.shared else first
            return dataclasses.replace(
                geometry,
                rows=rows,
                input_order=moved(geometry.input_order, own),
                output_order=output,
            )
        if geometry.unit_rows != geometry.rows:
            return None  # rows were repeated along new axes
        return dataclasses.replace(
            geometry,
            rows=rows,
            unit_rows=rows,
            index_order=moved(geometry.index_order, first),
            output_order=output,
        )
    return dataclasses.replace(geometry, rows=rows, order=moved(geometry.order))


def positions_per_example(rows: Shape, num_examples: int) -> int | None:
    """How many rows belong to one example, by their shape: examples come first.

    They are the leading axes whose product is ``num_examples``. If a later axis is as
    long they may be there: nothing is said.

    Returns:
        ``R / N`` with rows reshapable to ``[N, R / N]``, or None when they are not.
    """
    if num_examples == 1:
        return math.prod(rows)
    rows = tuple(size for size in rows if size != 1)
    leading = [math.prod(rows[: k + 1]) for k in range(len(rows))]
    known = num_examples in leading and num_examples not in rows[1:]
    return math.prod(rows) // num_examples if known else None
