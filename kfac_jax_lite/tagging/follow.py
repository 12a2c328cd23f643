"""Follows every axis of every variable through a jaxpr: where the examples are.

Shapes alone do not tell ``[time, batch, width]`` from ``[batch, time, width]`` if both
are equally long. One rule per primitive says which axes of its results are axes of its
operands; what has no rule keeps its axes if its shape stays, and has new ones if not.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Literal

from kfac_jax_lite.tagging.analysis import shape_of
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

    for index, eqn in enumerate(jaxpr.eqns):

        def enter(number: int, inner: Jaxpr, inputs: Sequence[Axes], at: int = index):
            plans = plan.children.get(at, ())
            own = plans[number] if number < len(plans) else Plan()
            return follow(inner, own, inputs, found)

        follow_one = RULES.get(eqn.primitive.name, same_shape)
        results = follow_one(eqn, [read(atom) for atom in eqn.invars], enter)
        axes.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers the rule of some primitives, by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


def same_shape(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Operands of the result's shape meet it elementwise; all else is new."""
    del enter
    shapes = [shape_of(var) for var in eqn.outvars]
    if len(shapes) > 1:
        return [fresh_axes(shape) for shape in shapes]
    pairs = zip(eqn.invars, axes, strict=True)
    alike = [own for atom, own in pairs if shape_of(atom) == shapes[0]]
    for other in alike[1:]:
        unify_all(alike[0], other)
    return [alike[0] if alike else fresh_axes(shape) for shape in shapes]


@rule("sort", "optimization_barrier", "while", "psum", "psum2", "psum_invariant",
      "pmax", "pmin", "ppermute")  # fmt: skip
def in_place(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Every result has the axes of the operand in its place, from the last on."""
    del enter
    return axes[len(axes) - len(eqn.outvars) :]


@rule("transpose")
def transpose(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes in another order."""
    del enter
    return [tuple(axes[0][i] for i in eqn.params["permutation"])]


@rule("reshape", "squeeze", "expand_dims")
def reshape(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes merged and split."""
    del enter
    return [reshaped(axes[0], shape_of(eqn.outvars[0]))]


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
      "reduce_or", "reduce_xor", "argmax", "argmin")  # fmt: skip
def reduced(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Some axes go."""
    del enter
    return [tuple(a for i, a in enumerate(axes[0]) if i not in eqn.params["axes"])]


@rule("slice", "dynamic_slice", "tile")
def whole(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """An axis of unchanged length is the whole axis."""
    del enter
    return [kept(axes[0], shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]))]


def kept(axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes:
    """Axes as they are where their length is, others new."""
    triples = zip(axes, before, after, strict=True)
    return tuple(a if old == new else fresh(new) for a, old, new in triples)


def but_for(changed: Sequence[bool], axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes, but for new ones where they have changed."""
    triples = zip(changed, axes, shape, strict=True)
    return tuple(fresh(size) if new else a for new, a, size in triples)


@rule("pad")
def pad(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes that are padded are new."""
    del enter
    changed = [any(config) for config in eqn.params["padding_config"]]
    return [but_for(changed, axes[0], shape_of(eqn.outvars[0]))]


@rule("reduce_window_max", "reduce_window_sum", "reduce_window_min")
def pooled(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """Axes that are pooled over are new."""
    del enter
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    windows = zip(eqn.params["window_dimensions"], before, after, strict=True)
    changed = [size > 1 or old != new for size, old, new in windows]
    return [but_for(changed, axes[0], after)]


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
    return [but_for(changed, axes[0], out)]


@rule("split", "top_k")
def divided(eqn: JaxprEqn, axes: list[Axes], enter: Enter) -> list[Axes]:
    """All axes but one are the operand's."""
    del enter
    changed = [i == eqn.params["axis"] for i in range(len(axes[0]))]
    return [but_for(changed, axes[0], shape_of(var)) for var in eqn.outvars]


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
